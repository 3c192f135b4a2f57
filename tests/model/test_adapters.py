"""Adapters: whatever PEFT puts around a module, logits with a cache equal those without one."""

import os
from unittest import mock

import pytest
import torch
from cases import difference, tiny_model, token_ids
from torch import nn

from egmla import EGMLACache
from egmla.absorption_egmla import can_absorb


peft = pytest.importorskip("peft")

# fp32 sums in another order, logits up to 6 (adapters add to them).
TOLERANCE = 5e-5
# Every tuner of PEFT that can be put around a linear layer, with what it needs on a module of 24 to 80 elements. But
# not Lily: it averages over all tokens of a call, so no model has the same logits with a cache.
TUNERS = {
    "lora": ("LoraConfig", {"r": 4}),
    "lora with bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "rslora with dropout": ("LoraConfig", {"r": 4, "use_rslora": True, "lora_dropout": 0.3}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "ia3 on inputs": ("IA3Config", {"feedforward_modules": ["kv_b_proj"]}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "vera": ("VeraConfig", {"r": 4}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "vblora": ("VBLoRAConfig", {"r": 4, "vector_length": 8, "num_vectors": 16}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "shira": ("ShiraConfig", {"r": 4}),
    "miss": ("MissConfig", {"r": 4}),
    "road": ("RoadConfig", {"group_size": 8}),
    "delora": ("DeloraConfig", {"r": 4}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "tinylora": ("TinyLoraConfig", {"r": 2}),
    "modules to save": ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["kv_b_proj"]}),
}


@pytest.fixture(autouse=True)
def same_environment():
    """PEFT's BOFT leaves another compiler in `CXX` where its CUDA code does not compile."""
    with mock.patch.dict(os.environ):
        yield


def adapted(name: str, **overrides):
    """A tiny model with a tuner around `kv_b_proj`, its trained parameters moved away from where they start."""
    kind, options = TUNERS[name]
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    config = getattr(peft, kind)(**{"target_modules": ["kv_b_proj"], **options})
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=False, **overrides), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def cached_logits(model, ids) -> torch.Tensor:
    """Logits at every position by a prefill, a chunk and single tokens."""
    cache = EGMLACache(model.config)
    return torch.cat([model(input_ids=chunk, past_key_values=cache).logits for chunk in ids.split([5, 2, 1, 1], 1)], 1)


def up_projection(model, layer: int = 0) -> nn.Module:
    return model.get_base_model().model.layers[layer].self_attn.kv_b_proj


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(TUNERS))
def test_cached_logits_with_any_adapter(name, implementation):
    model, ids = adapted(name, attn_implementation=implementation), token_ids(2, 9)
    plain = tiny_model(tie_word_embeddings=False)(ids).logits
    expected = model(input_ids=ids, use_cache=False).logits
    assert (expected - plain).abs().max() > 100 * TOLERANCE, "the adapter does nothing"
    assert difference(cached_logits(model, ids), expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "lora with bias", "dora", "ia3", "vera", "modules to save"])
def test_affine_adapters_are_absorbed(name):
    """The cache is not expanded for them, so decoding stays fast."""
    assert can_absorb([up_projection(adapted(name))], 24, torch.zeros(1))


@torch.no_grad()
def test_adapters_in_training_mode_are_not_absorbed():
    """Their dropout differs from call to call."""
    model = adapted("rslora with dropout").train()
    assert not can_absorb([up_projection(model)], 24, torch.zeros(1))


class Around(nn.Module):
    """A module around a layer, with a function of the layer's input and output."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x):
        return self.function(x, self.layer(x))


AROUND = {
    "nothing": (True, lambda x, y: y),
    "a constant": (True, lambda x, y: y + 1),
    "a factor": (True, lambda x, y: 3 * y),
    "relu": (False, lambda x, y: y.relu()),
    "tanh": (False, lambda x, y: y.tanh()),
    "a little of an activation": (False, lambda x, y: y + 1e-3 * nn.functional.silu(y)),
    "a square of the input": (False, lambda x, y: y + x[..., :1] ** 2),
    "a normalised output": (False, lambda x, y: nn.functional.normalize(y, dim=-1)),
    "the token before": (False, lambda x, y: y + y.roll(1, dims=1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", list(AROUND))
def test_only_affine_modules_are_absorbed(name):
    affine, function = AROUND[name]
    model, ids = tiny_model(), token_ids(2, 9)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Around(layer.self_attn.kv_b_proj, function).eval()
    assert can_absorb([model.model.layers[0].self_attn.kv_b_proj], 24, torch.zeros(1)) is affine
    if name != "the token before":  # its chunks differ by definition
        expected = model(ids, use_cache=False).logits
        assert difference(cached_logits(model, ids), expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["lora", "lora with bias"])
def test_adapters_are_absorbed_in_every_dtype(name, dtype):
    """Rounding alone must not look like an activation."""
    layer = up_projection(adapted(name).to(dtype))
    assert can_absorb([layer], 24, torch.zeros(1, dtype=dtype))
    assert not can_absorb([Around(layer, lambda x, y: y + 0.2 * y.relu()).eval()], 24, torch.zeros(1, dtype=dtype))


@torch.no_grad()
def test_hooks_are_heeded():
    """A hook that changes the output, on the module as it is."""
    model, ids = tiny_model(), token_ids(2, 9)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    expected = model(ids, use_cache=False).logits
    assert difference(cached_logits(model, ids), expected) <= TOLERANCE


def test_gradients_of_an_absorbed_bias():
    """Of the affine map that a step absorbs: as by one forward."""
    results = []
    for cached in (False, True):
        model, ids = adapted("lora with bias"), token_ids(2, 9)
        if cached:
            cache = EGMLACache(model.config)
            logits = [model(input_ids=chunk, past_key_values=cache).logits for chunk in ids.split([5, 2, 1, 1], 1)]
            logits = torch.cat(logits, 1)
        else:
            logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 6
    for name, gradient in results[0].items():
        assert difference(results[1][name], gradient) <= 2e-5 * max(1.0, gradient.abs().max().item()), name
