"""The named configurations that every test file walks, and the models made of them."""

import shutil

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from egmla import EGMLAConfig, EGMLAForCausalLM


needs_compiler = pytest.mark.skipif(
    not shutil.which("c++") and not shutil.which("g++"),
    reason="torch.compile and the CPU kernel need a C++ compiler",
)

# `2 R - N - V` is 28 and `R (N + V)` 480. Absorption pays up to 17 new tokens, so short tests reach both paths.
BASE = {
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
    # Large enough for attention to be far from uniform and for errors to show in the logits.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

MODEL_CASES = {
    "input-gate": {},
    "table-gate": {"kv_gate_embedding_dim": 10, "tie_word_embeddings": False},
    "gate-off": {"kv_gate": None},
    "query-low-rank": {"q_lora_rank": 20, "attention_bias": True, "query_bias": True},
    "biases": {"attention_bias": True, "query_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "no-latent-norm": {"kv_latent_norm": False, "rope_interleave": False},
    "no-rope": {"qk_rope_head_dim": 0, "kv_gate_embedding_dim": 10},
    "no-nope": {"qk_nope_head_dim": 0, "qk_rope_head_dim": 16},
    "rank-per-layer": {"kv_lora_rank": [12, 28], "kv_gate_embedding_dim": 10},
    "rope-slots": {"rope_interleave": False, "rope_table_dim": 32, "rope_slots": [15, 0, 7, 3]},
    "rope-slots-per-layer": {
        "rope_table_dim": 16,
        "rope_slots": [[0, 1, 6, 2], [5, 5, 0, 3]],
        "softmax_scale": 0.31,
        "q_lora_rank": 20,
    },
    "qk-norms, nope layer": {"qk_norm_dim": 4, "nope_layers": [1], "rope_slots": [3, 0, 1, 1]},
    "post-norm": {"post_norm": True, "qk_norm_dim": 8, "q_lora_rank": 20, "rope_interleave": False},
    # Normed keys beside values as they are, queries normed per head: Qwen3 below full width.
    "encoder, normed queries": {
        "kv_encoder_dim": 28,
        "kv_encoder_norm_dim": 8,
        "kv_encoder_norm_groups": 2,
        "query_norm_dim": 8,
        "kv_latent_norm": False,
        "rope_interleave": False,
        "rope_table_dim": 8,
        "rope_slots": [[3, 0, 0, 2], [1, 1, 2, 3]],
        "attention_bias": True,
        "query_bias": True,
    },
    # One norm over all of them, and no rotary slots: OLMo 2 below full width, a shrunk MLA latent.
    "encoder of one group": {
        "kv_encoder_dim": 20,
        "kv_encoder_norm_dim": 14,
        "query_norm_dim": 32,
        "rope_interleave": False,
        "post_norm": True,
    },
    "always-absorbed": {"kv_lora_rank": 6, "softmax_scale": 0.4},
    # Short texts are within the first tokens, which are cached as they are.
    "allocated bits": {
        "kv_cache_bits": {
            "group_tokens": 8,
            "first_tokens": 256,
            "layers": [
                {"latent": [[8, 6], [4, 10], [3, 2]], "rope": [[6, 1], [2, 2]]},
                {"latent": [[2, 9]], "rope": []},
            ],
        }
    },
    "expanded gate": {"kv_gate": "expanded"},
    "expanded gate, tables": {
        "kv_gate": "expanded",
        "kv_gate_embedding_dim": 10,
        "kv_lora_rank": [12, 28],
        "q_lora_rank": 20,
        "rope_interleave": False,
        "tie_word_embeddings": False,
    },
}

# Cases whose caches have allocated bits unless asked otherwise: no gradients, and no fixed size.
ALLOCATED_CASES = tuple(name for name, fields in MODEL_CASES.items() if "kv_cache_bits" in fields)

# Not among the cases above: the reference implementation has no experts, which are Transformers' own.
EXPERTS = {
    "moe_layers": [1],
    "moe_config": {
        "model_type": "deepseek_v3",
        "hidden_size": BASE["hidden_size"],
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
}

# Cases whose gates are computed from the ids of all cached tokens: no absorption, and no cache but EGMLACache.
EXPANDED_CASES = tuple(name for name, fields in MODEL_CASES.items() if fields.get("kv_gate") == "expanded")

# Cases whose behaviour covers the expensive tests: each gate, per-layer ranks, no rotary part.
CORE_CASES = ("input-gate", "table-gate", "gate-off", "no-rope", "rank-per-layer", "rope-slots")

# The files that travel in every checkpoint.
CODE_FILES = {
    f"{name}_egmla.py"
    for name in (
        "absorption",
        "allocated_cache",
        "attention",
        "bit_allocation",
        "cache",
        "cache_layers",
        "channel_codes",
        "configuration",
        "converted_attention",
        "cpu",
        "entries",
        "eviction",
        "expanded_gate",
        "generation",
        "left_padding",
        "modeling",
        "quantization",
        "quantized_cache",
        "quantized_entries",
    )
}

ROPE_CASES = {
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
        "factor": 8.0,
    },
}


def tiny_config(case: str = "input-gate", **overrides) -> EGMLAConfig:
    """Configuration of a named case, with fields replaced."""
    return EGMLAConfig(**{**BASE, **MODEL_CASES[case], **overrides})


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 1) -> None:
    """Moves every gate, norm weight, bias and padding row away from the identity or zero it starts at."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            scale = 0.5 if "kv_gate" in name else 0.3
            parameter.add_(scale * noise.to(parameter.dtype))
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(0.2 * noise)


def tiny_model(case: str = "input-gate", model_class=EGMLAForCausalLM, seed: int = 0, **overrides):
    """A small model of a named case in evaluation mode, its weights fixed by `seed` and its gates not at identity."""
    torch.manual_seed(seed)
    attention = overrides.pop("attn_implementation", "sdpa")
    config = tiny_config(case, **overrides)
    config._attn_implementation = attention
    model = model_class(config)
    perturb(model, seed + 1)
    return model.eval()


def token_ids(batch: int, length: int, seed: int = 3, vocab_size: int = BASE["vocab_size"]) -> torch.Tensor:
    """Random ids `[batch, length]` without the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (batch, length), generator=generator)


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference, after checking that shapes agree and everything is finite."""
    if left.shape != right.shape:
        raise AssertionError(f"shapes {tuple(left.shape)} and {tuple(right.shape)} differ")
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise AssertionError("not finite")
    return (left.double() - right.double()).abs().max().item()


def plain_attention(query, entries, mask, scaling):
    """By definition, in fp64: queries `[B, H, T, W]` on entries `[B, 1, S, W]`, which are key and value."""
    scores = query.double() @ entries.double().transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ entries.double()


def exact_entries(layer) -> torch.Tensor:
    """What a quantised layer holds, `[B, 1, S, R + P]` in fp32, without the rounding of the model's format."""
    entries = layer.entries
    entries.dtype = torch.float32
    return entries.to_tensor()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, enough to tokenise calibration text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="\x00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\x01", chat_template="{{ messages }}")
