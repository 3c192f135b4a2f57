"""Source architectures: what is copied as it is, and where attention keeps its weights.

| family  | projections                    | biases        | special                                  |
|---------|--------------------------------|---------------|------------------------------------------|
| llama   | q_proj, k_proj, v_proj, o_proj | optional, all | every RoPE type; head_dim free           |
| mistral | the same                       | none          | sliding window refused (not supported)   |

A family is one entry of `FAMILIES`; everything outside of attention has the same names in the source and in EG-MLA.
"""

import difflib
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from egmla import EGMLAConfig


# Configuration fields with the same name and meaning in the source and in EG-MLA.
KEPT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
)


@dataclass(frozen=True)
class AttentionShape:
    """Widths of a source's attention: `H` query heads, `g` key/value heads, `d` head width, `D` hidden size."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int

    @property
    def kv_width(self) -> int:
        """Width `g d` of all keys (or all values) of a token."""
        return self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def frequencies(self) -> int:
        """Rotary frequencies `d / 2`."""
        return self.head_dim // 2


@dataclass(frozen=True)
class AttentionWeights:
    """A layer's attention in fp64: weights (out x in) and biases, zero where the source has none."""

    q: torch.Tensor  # [H d, D]
    k: torch.Tensor  # [g d, D]
    v: torch.Tensor  # [g d, D]
    o: torch.Tensor  # [D, H d]
    q_bias: torch.Tensor
    k_bias: torch.Tensor
    v_bias: torch.Tensor
    o_bias: torch.Tensor


@dataclass(frozen=True)
class Family:
    """A supported architecture: names of its attention projections and whether they may carry biases."""

    name: str
    has_biases: bool

    def attention_tensors(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, str]:
        """Names of a layer's attention tensors by role (`q`, `k_bias`, ...)."""
        prefix = f"model.layers.{layer_idx}.self_attn."
        names = {role: f"{prefix}{role}_proj.weight" for role in "qkvo"}
        if self.has_biases and getattr(config, "attention_bias", False):
            names |= {f"{role}_bias": f"{prefix}{role}_proj.bias" for role in "qkvo"}
        return names

    def copied_tensors(self, config: PreTrainedConfig, layer_idx: int | None) -> list[str]:
        """Names that stay as they are: of one layer, or with `None` of everything outside of the layers."""
        if layer_idx is None:
            head = [] if config.tie_word_embeddings else ["lm_head.weight"]
            return ["model.embed_tokens.weight", "model.norm.weight", *head]
        prefix = f"model.layers.{layer_idx}."
        kinds = ["weight", "bias"] if getattr(config, "mlp_bias", False) else ["weight"]
        mlp = [f"{prefix}mlp.{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in kinds]
        return [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight", *mlp]

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        """The widths of the source's attention."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return AttentionShape(config.num_attention_heads, config.num_key_value_heads, head_dim, config.hidden_size)

    def target_config(self, config: PreTrainedConfig, **attention) -> EGMLAConfig:
        """The EG-MLA configuration that keeps everything but the attention; `attention` are its fields."""
        fields = {name: getattr(config, name) for name in KEPT_FIELDS if hasattr(config, name)}
        return EGMLAConfig(**fields, mlp_bias=getattr(config, "mlp_bias", False), **attention)


FAMILIES = {
    "llama": Family("llama", has_biases=True),
    "mistral": Family("mistral", has_biases=False),
}


def find_family(config: PreTrainedConfig) -> Family:
    """The family of a source.

    Raises:
        ValueError: for an architecture or a variant that is not supported; the message lists those that are.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)
        raise ValueError(
            f"Architecture {model_type!r} is not supported. Supported: {', '.join(FAMILIES)} (nearest by name: "
            f"{near[0]}). A new family is an entry in conversion/families.py."
        )
    if getattr(config, "sliding_window", None):
        raise ValueError(
            f"This {model_type} checkpoint attends in a sliding window of {config.sliding_window} tokens, which "
            "EG-MLA does not have. Use a checkpoint without one (Mistral 7B v0.2 and later), or set sliding_window "
            "to null in its config.json to convert it for contexts no longer than the window."
        )
    if isinstance(getattr(config, "rope_parameters", None), dict) and config.rope_parameters.get(
        "partial_rotary_factor", 1.0
    ) not in (None, 1.0):
        raise ValueError(
            f"This {model_type} checkpoint rotates only part of its heads (partial_rotary_factor="
            f"{config.rope_parameters['partial_rotary_factor']}), which conversion does not support yet."
        )
    return FAMILIES[model_type]
