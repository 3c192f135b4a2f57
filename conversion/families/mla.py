"""Families that already have multi-head latent attention."""

import math

import torch
from transformers import PreTrainedConfig

from egmla import EGMLAConfig
from egmla.configuration_egmla import MOE_MODULES
from egmla.conversion.source import TensorSlice
from egmla.modeling_egmla import mixture_of_experts

from .base import AttentionShape, Family, identity


# Fields of a source that its mixtures of experts are made by.
MOE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "hidden_act",
    "mlp_bias",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "topk_method",
    "norm_topk_prob",
    "routed_scaling_factor",
)


class MLA(Family):
    """A source that already is multi-head latent attention: tensors are copied, the gate starts at identity.

    Its latent is made smaller behind its norm, which stays as an encoder.

    Args:
        rope_interleave (`bool`): how its class pairs rotary dimensions when its configuration does not say.
    """

    latent = True

    def __init__(self, rope_interleave: bool = True):
        self.rope_interleave = rope_interleave

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        sparse = self.sparse_layers(config)
        if sparse and config.model_type not in (*MOE_MODULES, "egmla"):
            raise ValueError(
                f"{len(sparse)} of the {config.num_hidden_layers} layers of this {config.model_type} checkpoint are "
                f"mixtures of experts (first: layer {sparse[0]}), which are known for {', '.join(MOE_MODULES)}."
            )

    def sparse_layers(self, config: PreTrainedConfig) -> list[int]:
        """Layer indices with experts, from `mlp_layer_types` or `first_k_dense_replace`."""
        layers = range(config.num_hidden_layers)
        types = getattr(config, "mlp_layer_types", None)
        if types is not None:
            return [layer for layer in layers if types[layer] != "dense"]
        dense = getattr(config, "first_k_dense_replace", None)
        return [] if dense is None else list(layers[dense:])

    def mlp(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        if layer_idx not in self.sparse_layers(config):
            return super().mlp(config, layer_idx)
        with torch.device("meta"):
            names = mixture_of_experts(self.target_config(config)).state_dict()
        return identity(*(f"{self.layer_prefix(layer_idx)}mlp.{name}" for name in names))

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        """The layer's attention tensors, each by its own name."""
        biased = ["weight", "bias"] if config.attention_bias else ["weight"]
        names = [f"{part}.{kind}" for part in ("kv_a_proj_with_mqa", "o_proj") for kind in biased]
        names += ["kv_a_layernorm.weight", "kv_b_proj.weight"]
        if config.q_lora_rank is None:
            names += ["q_proj.weight"]
        else:
            names += ["q_a_layernorm.weight", "q_b_proj.weight", *(f"q_a_proj.{kind}" for kind in biased)]
        return identity(*(f"{self.layer_prefix(layer_idx)}self_attn.{name}" for name in names))

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        """Queries of the source's width; no keys beside the latent, so none that rotate or could be mixed."""
        query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        return AttentionShape(config.num_attention_heads, 0, query_dim, config.hidden_size, rotary_dim=0)

    def hooked_modules(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return "q_proj" if config.q_lora_rank is None else "q_b_proj", "kv_a_layernorm"

    def target_config(self, config: PreTrainedConfig, **attention) -> EGMLAConfig:
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_bias")
        fields = {name: getattr(config, name) for name in names} | attention
        interleave = getattr(config, "rope_interleave", None)
        fields["rope_interleave"] = self.rope_interleave if interleave is None else interleave
        if sparse := self.sparse_layers(config):
            fields["moe_layers"] = sparse
            fields["moe_config"] = {name: getattr(config, name) for name in MOE_FIELDS if hasattr(config, name)}
        return super().target_config(config, **fields)


class MiniCPM3(MLA):
    """Its multipliers on embeddings, on what each layer adds and on the head's input are weights here.

    With a tied head the embedding is stored scaled, and the final norm takes that scale off again.
    """

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        return self._scaled(super().attention(config, layer_idx), config, "o_proj.")

    def mlp(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, TensorSlice]:
        return self._scaled(super().mlp(config, layer_idx), config, "down_proj.")

    def passthrough_tensors(self, config: PreTrainedConfig, layer_idx: int | None) -> dict[str, TensorSlice]:
        parts = super().passthrough_tensors(config, layer_idx)
        if layer_idx is None:
            embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
            parts[embedding] = TensorSlice(embedding, scale=config.scale_emb)
            tied = config.scale_emb if config.tie_word_embeddings else 1.0
            parts[norm] = TensorSlice(norm, scale=1.0 / (config.logits_scaling * tied))
        return parts

    def _scaled(
        self, parts: dict[str, TensorSlice], config: PreTrainedConfig, projection: str
    ) -> dict[str, TensorSlice]:
        """The same tensors, those of the projection times what scales each residual branch."""
        scale = config.scale_depth / math.sqrt(config.num_hidden_layers)
        return {name: TensorSlice(name, scale=scale) if projection in name else rows for name, rows in parts.items()}
