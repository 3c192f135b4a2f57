"""Families that RMS-normalise queries and keys before they rotate them."""

from transformers import PreTrainedConfig

from egmla import EGMLAConfig

from .base import Family


class Qwen3(Family):
    """Queries and keys are RMS-normalised per head before they rotate, by `qk_norm_dim` or `kv_encoder_dim`."""

    window_per_layer = True
    qk_norm = "head"


class Olmo2(Qwen3):
    """All queries, and all keys, are one vector to normalise; the other norms stand behind attention and MLP."""

    window_per_layer = False
    qk_norm = "all"

    def layer_norms(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return "post_attention_layernorm", "post_feedforward_layernorm"

    def target_config(self, config: PreTrainedConfig, **attention) -> EGMLAConfig:
        return super().target_config(config, **attention, post_norm=True)
