"""EG-MLA checkpoints as sources."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from egmla import EGMLAConfig
from egmla.conversion.source import Source, TensorSlice
from egmla.converted_attention_egmla import ConvertedAttention
from egmla.expanded_gate_egmla import attention_class

from .base import AttentionShape, Family, identity
from .mla import MLA
from .normed import Olmo2


class EGMLA(MLA):
    """An EG-MLA checkpoint: with its gate at identity its latent is made smaller, with a fresh gate.

    With trained gates its channels get bits, and nothing else changes.
    """

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        if config.qk_rope_head_dim == 0:
            raise ValueError(
                "This egmla checkpoint has no rotary key (qk_rope_head_dim=0), which conversion requires."
            )

    def gate(self, config: PreTrainedConfig, layer_idx: int) -> tuple[str, ...]:
        return tuple(name for name in self._names(config, layer_idx) if ".kv_gate_" in name)

    def has_trained_gate(self, source: Source) -> bool:
        if source.config.kv_gate != "latent" or self._trained_gate(source) is None:
            return False
        if source.config.qk_norm_dim is not None:
            raise ValueError(
                f"{source.label} has trained gates and normed rotary keys (qk_norm_dim={source.config.qk_norm_dim}): "
                "its channels get bits in the order of their importance, and that norm fixes the places of rotary "
                "pairs. Use quantization='int4' for its cache, or convert the checkpoint it was trained from."
            )
        return True

    def check_new_latent(self, config: PreTrainedConfig) -> None:
        if config.kv_latent_norm and (config.kv_encoder_dim is not None or isinstance(config.kv_lora_rank, list)):
            raise ValueError(
                f"This egmla checkpoint normalises latents (kv_latent_norm) with kv_lora_rank={config.kv_lora_rank}, "
                f"kv_encoder_dim={config.kv_encoder_dim}. That norm would be in the encoder, which must not be there "
                "already and has one width for all layers; convert the checkpoint it was made of instead."
            )

    def check_weights(self, source: Source) -> None:
        if (found := self._trained_gate(source)) is not None:
            layer_idx, moved = found
            raise ValueError(
                f"The gate of layer {layer_idx} of {source.label} is trained ({moved}): another latent would have no "
                "such gate. Give its channels bits and keep the latent (cache=0.25 alone, --cache 0.25), which gates "
                "on the latent (kv_gate='latent') allow; or convert a checkpoint whose gate is at identity."
            )

    def _trained_gate(self, source: Source) -> tuple[int, str] | None:
        """Return the first layer whose gate has moved from where gates start, and how one can tell."""
        for layer_idx in range(source.config.num_hidden_layers):
            for name in self.gate(source.config, layer_idx):
                identity = {"kv_gate_norm.weight": 0, "kv_gate_norm.bias": 1}.get(name.partition("self_attn.")[2])
                if identity is not None and not (source.tensor(name) == identity).all():
                    return layer_idx, f"{name} is not {identity}"
        return None

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        return identity(*(name for name in self._names(config, layer_idx) if ".kv_gate_" not in name))

    def _names(self, config: Any, layer_idx: int) -> list[str]:
        with torch.device("meta"):
            names = attention_class(config)(config, layer_idx).state_dict()
        return [f"{self.layer_prefix(layer_idx)}self_attn.{name}" for name in names]

    def sparse_layers(self, config: PreTrainedConfig) -> list[int]:
        return list(config.moe_layers or ())

    def layer_norms(self, config: PreTrainedConfig) -> tuple[str, ...]:
        family = Olmo2() if config.post_norm else Family()
        return family.layer_norms(config)

    def latent_norm(self, config: PreTrainedConfig) -> bool:
        return config.kv_latent_norm

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        if config.query_norm_dim is None:
            return super().shape(config)
        return replace(super().shape(config), head_dim=config.qk_nope_head_dim)

    def hooked_modules(self, config: PreTrainedConfig) -> tuple[str, ...]:
        queries, latents = super().hooked_modules(config)
        if config.query_norm_dim is not None:
            queries = "q_norm"
        return queries, latents if config.kv_latent_norm else "kv_a_proj_with_mqa"

    def meta_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        model = super().meta_model(EGMLAConfig(**{**config.to_dict(), "kv_gate": None, "kv_gate_embedding_dim": None}))
        for module in model.modules():
            if isinstance(module, ConvertedAttention) and module.rope_slots is not None:  # in no checkpoint
                slots = torch.tensor(config.layer_rope_slots(module.layer_idx))
                module.register_buffer("rope_slots", slots, persistent=False)
        return model

    def layer_kwargs(self, tables: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        halves = [table[..., : table.shape[-1] // 2].unsqueeze(1) for table in tables]
        return {"position_embeddings": tuple(halves), "gate_input": None}

    def target_config(self, config: PreTrainedConfig, **attention) -> EGMLAConfig:
        return EGMLAConfig(**{**config.to_dict(), "kv_gate_embedding_dim": None, **attention})
