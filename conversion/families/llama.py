"""Families that describe grouped or multi-head attention as Llama has it, beside the base class, which is Llama."""

from transformers import PreTrainedConfig

from egmla.conversion.source import TensorSlice

from .base import Family, identity


class Mistral(Family):
    def bias_roles(self, config: PreTrainedConfig) -> str:
        return ""


class Qwen2(Family):
    window_per_layer = True

    def bias_roles(self, config: PreTrainedConfig) -> str:
        return "qkv"


class Phi3(Family):
    """Queries, keys and values are the rows of one tensor, and so are the two inner maps of the MLP."""

    partial_rotary = True

    def rotary_dim(self, config: PreTrainedConfig, head_dim: int) -> int:
        return int(head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1.0))

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        prefix, shape = f"{self.layer_prefix(layer_idx)}self_attn.", self.shape(config)
        queries, keys = shape.heads * shape.head_dim, shape.heads * shape.head_dim + shape.kv_width
        fused = f"{prefix}qkv_proj.weight"
        return {
            "q": TensorSlice(fused, 0, queries),
            "k": TensorSlice(fused, queries, keys),
            "v": TensorSlice(fused, keys),
            "o": TensorSlice(f"{prefix}o_proj.weight"),
        }

    def hooked_modules(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("qkv_proj",)

    def mlp(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        prefix, width = self.layer_prefix(layer_idx), config.intermediate_size
        fused = f"{prefix}mlp.gate_up_proj.weight"
        return {
            f"{prefix}mlp.gate_proj.weight": TensorSlice(fused, 0, width),
            f"{prefix}mlp.up_proj.weight": TensorSlice(fused, width),
            **identity(f"{prefix}mlp.down_proj.weight"),
        }


class SmolLM3(Family):
    window_per_layer = True

    def rotates(self, config: PreTrainedConfig, layer_idx: int) -> bool:
        return bool(config.no_rope_layers[layer_idx])
