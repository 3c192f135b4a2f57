"""Libraries that quantise weights find an EG-MLA model's linear layers, as they find Llama's."""

import pytest
import torch
from cases import difference, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM


pytestmark = pytest.mark.long  # in front, see conftest.py


# fp32 sums in another order. What is quantised is the weight, which both paths read alike.
TOLERANCE = 1e-4
# LLM.int8 rounds a matmul's inputs too: one part in 127 of each row's largest, in logits around 3.
INT8_TOLERANCE = 0.15


def make_model() -> EGMLAForCausalLM:
    torch.manual_seed(0)
    config = EGMLAConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return EGMLAForCausalLM(config).eval()


def quantized(folder, **options):
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantised")
    make_model().save_pretrained(folder)
    return folder


def rounding(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean deviation of logits, relative to their mean magnitude."""
    return ((given - expected).abs().mean() / expected.abs().mean()).item()


def cached_logits(model, ids) -> torch.Tensor:
    cache = EGMLACache(model.config)
    return torch.cat([model(input_ids=chunk, past_key_values=cache).logits for chunk in ids.split([6, 1, 1, 1], 1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("bits, tolerance", [(4, TOLERANCE), (8, INT8_TOLERANCE)])
def test_bitsandbytes_quantises_every_layer_but_the_head(checkpoint, bits, tolerance):
    model, ids = quantized(checkpoint, **{f"load_in_{bits}bit": True}), token_ids(2, 9, vocab_size=128)
    kinds = {type(module).__name__ for module in model.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {{4: "Linear4bit", 8: "Linear8bitLt"}[bits]}
    whole = make_model()
    matrices = sum(module.weight.numel() for module in whole.model.layers.modules() if isinstance(module, nn.Linear))
    saved = whole.get_memory_footprint() - model.get_memory_footprint()
    assert saved >= matrices * (4 - bits / 8) * 0.95
    expected = model(ids, use_cache=False).logits
    assert 0 < rounding(expected, whole(ids).logits) < (0.7 if bits == 4 else 0.1)
    assert difference(cached_logits(model, ids), expected) <= tolerance
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


@torch.no_grad()
def test_bitsandbytes_checkpoints_load_again(checkpoint, tmp_path):
    model, ids = quantized(checkpoint, load_in_4bit=True), token_ids(2, 9, vocab_size=128)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert difference(again(ids).logits, model(ids).logits) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_learns_and_decodes(checkpoint, bits):
    """A few steps of LoRA on a quantised model: the loss falls, and the cache gives what training saw."""
    peft = pytest.importorskip("peft")
    model = quantized(checkpoint, **{f"load_in_{bits}bit": True})
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "up_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    ids = token_ids(2, 9, vocab_size=128)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert difference(cached_logits(model, ids), expected) <= (TOLERANCE if bits == 4 else INT8_TOLERANCE)


@torch.no_grad()
def test_torch_ao_quantises_dynamically():
    """Its layers round their inputs by the range of a whole call, so results depend on chunks by rounding."""
    model, ids = make_model(), token_ids(2, 9, vocab_size=128)
    whole = model(ids).logits
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    expected = model(ids, use_cache=False).logits
    assert 0 < rounding(expected, whole) < 0.15
    assert rounding(cached_logits(model, ids), expected) < 0.15


def test_fine_grained_fp8_finds_every_layer():
    """Its kernels need a GPU; what it replaces does not."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    llama = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    for model, matrices in ((make_model(), 2 * 8), (LlamaForCausalLM(llama), 2 * 7)):
        replaced = replace_with_fp8_linear(
            model, modules_to_not_convert=["lm_head"], quantization_config=FineGrainedFP8Config()
        )
        kinds = [type(module).__name__ for name, module in replaced.named_modules() if isinstance(module, nn.Linear)]
        assert kinds.count("FP8Linear") == matrices and kinds.count("Linear") == 1
