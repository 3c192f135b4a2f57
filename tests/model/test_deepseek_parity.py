"""With the gate off, or at identity, the model is DeepSeek-V2/V3: same weights under the same names, same logits."""

import copy

import pytest
import torch
from cases import difference, token_ids
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM


# Same sums in fp32, but keys and queries are laid out in another order: measured 2e-6 on logits up to 5.
TOLERANCE = 1e-5

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
SOURCES = {
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM, {"q_lora_rank": None}),
    "v3 query low-rank": (DeepseekV3Config, DeepseekV3ForCausalLM, {"q_lora_rank": 20}),
    "v3 biases": (DeepseekV3Config, DeepseekV3ForCausalLM, {"q_lora_rank": 20, "attention_bias": True}),
    "v3 half split": (DeepseekV3Config, DeepseekV3ForCausalLM, {"q_lora_rank": None, "rope_interleave": False}),
    "v3 yarn": (DeepseekV3Config, DeepseekV3ForCausalLM, {"q_lora_rank": 20, "rope_parameters": YARN}),
    "v3 tied": (DeepseekV3Config, DeepseekV3ForCausalLM, {"q_lora_rank": None, "tie_word_embeddings": True}),
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM, {"q_lora_rank": None}),
    "v2 query low-rank": (DeepseekV2Config, DeepseekV2ForCausalLM, {"q_lora_rank": 20}),
    "v2 biases": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {"q_lora_rank": 20, "attention_bias": True, "mlp_bias": True},
    ),
    "v2 yarn": (DeepseekV2Config, DeepseekV2ForCausalLM, {"q_lora_rank": 20, "rope_parameters": YARN}),
}
GATES = {"input gate": {"kv_gate_embedding_dim": None}, "table gate": {"kv_gate_embedding_dim": 10}}


@pytest.fixture(params=list(SOURCES))
def source(request):
    """A dense DeepSeek model with weights, biases and norms that all matter, in evaluation mode."""
    config_class, model_class, fields = SOURCES[request.param]
    fields = copy.deepcopy({**SHAPE, "num_key_value_heads": SHAPE["num_attention_heads"], **fields})
    config = config_class(first_k_dense_replace=SHAPE["num_hidden_layers"], **fields)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def converted_config(config, **fields) -> EGMLAConfig:
    """The EG-MLA configuration of a dense DeepSeek model: its own fields under their own names."""
    names = [*SHAPE, "q_lora_rank", "attention_bias"]
    return EGMLAConfig(
        **{name: getattr(config, name) for name in names if name not in ("initializer_range",)},
        rope_interleave=getattr(config, "rope_interleave", True),
        mlp_bias=getattr(config, "mlp_bias", False),
        rope_parameters=dict(config.rope_parameters),
        **fields,
    )


def converted(source, **fields) -> EGMLAForCausalLM:
    """The source's state dict, loaded without a rename; nothing but gate parameters may be missing."""
    model = EGMLAForCausalLM(converted_config(source.config, **fields)).eval()
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    assert all(".kv_gate_" in name for name in missing)
    assert bool(missing) == (model.config.kv_gate is not None)
    return model


@torch.no_grad()
def cached_logits(model, ids, cache=None) -> torch.Tensor:
    """Logits of a prefill of six tokens and decode steps of one."""
    out = model(ids[:, :6], past_key_values=cache, use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for position in range(6, ids.shape[1]):
        logits.append(model(ids[:, position : position + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gate_off_equals_deepseek(source, implementation):
    source.set_attn_implementation(implementation)
    model, ids = converted(source, kv_gate=None), token_ids(2, 14)
    model.set_attn_implementation(implementation)
    expected = source(ids, use_cache=False).logits
    assert expected.std() > 0.5
    assert difference(model(ids, use_cache=False).logits, expected) <= TOLERANCE
    assert difference(cached_logits(source, ids), expected) <= TOLERANCE
    for cache in (EGMLACache(model.config), EGMLACache(model.config, max_cache_len=16)):
        assert difference(cached_logits(model, ids, cache), expected) <= TOLERANCE


@torch.no_grad()
def test_generates_deepseeks_tokens(source):
    model, ids = converted(source, kv_gate=None), token_ids(2, 6)
    expected = source.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0), expected)


@torch.no_grad()
@pytest.mark.parametrize("gate", list(GATES))
def test_gate_at_identity_is_exactly_gate_off(source, gate):
    """Bit for bit in fp32, in prefill and decode: multiplying by 1 is exact."""
    plain, gated, ids = converted(source, kv_gate=None), converted(source, **GATES[gate]), token_ids(2, 14)
    assert torch.equal(gated(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    for length in (None, 16):
        given = cached_logits(gated, ids, EGMLACache(gated.config, max_cache_len=length))
        assert torch.equal(given, cached_logits(plain, ids, EGMLACache(plain.config, max_cache_len=length)))


@pytest.mark.parametrize("gate", list(GATES))
def test_gate_at_identity_learns_at_the_first_step(source, gate):
    """A gate that starts as 1 must not be stuck there."""
    gated, ids = converted(source, **GATES[gate]), token_ids(2, 14)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    gated(ids, labels=ids).loss.backward()
    for layer in gated.model.layers:
        assert layer.self_attn.kv_gate_norm.weight.grad.abs().min() > 0
        assert layer.self_attn.kv_gate_norm.bias.grad.abs().min() > 0
    optimizer.step()
    gated.zero_grad()
    gated(ids, labels=ids).loss.backward()
    for layer in gated.model.layers:
        assert layer.self_attn.kv_gate_proj.weight.grad.abs().max() > 0
        if gated.config.kv_gate_embedding_dim is not None:
            assert layer.self_attn.kv_gate_embedding.weight.grad.abs().max() > 0


@torch.no_grad()
def test_parity_notices_a_difference(source):
    """The comparison can fail: a gate moved by a thousandth is seen."""
    gated, ids = converted(source, **GATES["input gate"]), token_ids(2, 14)
    for layer in gated.model.layers:
        layer.self_attn.kv_gate_norm.weight.add_(1e-3)
    assert difference(gated(ids).logits, source(ids).logits) > 10 * TOLERANCE
