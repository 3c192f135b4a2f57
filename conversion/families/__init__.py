"""Source architectures: what maps to what, and what is special. conversion/README.md says which variants are refused.

| family        | attention tensors              | biases        | special                                          |
|---------------|--------------------------------|---------------|--------------------------------------------------|
| llama         | q_proj, k_proj, v_proj, o_proj | optional, all | every RoPE type; head_dim free                   |
| mistral       | the same                       | none          | head_dim free; a window must not bite            |
| qwen2         | the same                       | q, k, v       | a window must not bite                           |
| phi3          | rows of qkv_proj; o_proj       | none          | rows of gate_up_proj; partial rotation; longrope |
| smollm3       | as llama                       | optional, all | layers without rotation (`nope_layers`)          |
| qwen3         | as llama, q_norm, k_norm       | optional, all | smaller with an encoder: keys are not linear     |
| olmo2         | the same                       | optional, all | the same; norms behind attention and MLP         |
| deepseek_v3   | copied under their names       | optional      | experts too; smaller with an encoder             |
| deepseek_v2   | copied                         | optional      | the same; pairs always interleaved               |
| youtu         | copied                         | optional      | smaller with an encoder                          |
| minicpm3      | copied                         | optional      | the same; multipliers go into the weights        |
| glm4_moe_lite | copied                         | optional      | experts too; smaller with an encoder             |
| egmla         | copied                         | optional      | gate at identity; an encoder only for its norm   |

A family is an entry of `FAMILIES`: `Family` (which is llama) or a subclass that says what differs. Names outside of
attention are the same in source and target unless `copied` or `mlp` say otherwise.
"""

import difflib
import math
from dataclasses import replace
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from egmla import EGMLAConfig
from egmla.configuration_egmla import MOE_MODULES
from egmla.conversion.sources import Rows, Source
from egmla.modeling_egmla import EGMLAAttention, mixture_of_experts

from .base import KEPT_FIELDS, AttentionShape, AttentionWeights, Family, unchanged


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

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, Rows]:
        prefix, shape = f"model.layers.{layer_idx}.self_attn.", self.shape(config)
        queries, keys = shape.heads * shape.head_dim, shape.heads * shape.head_dim + shape.kv_width
        fused = f"{prefix}qkv_proj.weight"
        return {
            "q": Rows(fused, 0, queries),
            "k": Rows(fused, queries, keys),
            "v": Rows(fused, keys),
            "o": Rows(f"{prefix}o_proj.weight"),
        }

    def probes(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("qkv_proj",)

    def mlp(self, config: PreTrainedConfig, prefix: str) -> dict[str, Rows]:
        fused, width = f"{prefix}mlp.gate_up_proj.weight", config.intermediate_size
        return {
            f"{prefix}mlp.gate_proj.weight": Rows(fused, 0, width),
            f"{prefix}mlp.up_proj.weight": Rows(fused, width),
            **unchanged(f"{prefix}mlp.down_proj.weight"),
        }


class SmolLM3(Family):
    window_per_layer = True

    def rotates(self, config: PreTrainedConfig, layer_idx: int) -> bool:
        return bool(config.no_rope_layers[layer_idx])


class Qwen3(Family):
    """Queries and keys are RMS-normalised per head before they turn, by `qk_norm_dim` or `kv_encoder_dim`."""

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
        """Numbers of the layers with experts, from `mlp_layer_types` or `first_k_dense_replace`."""
        layers = range(config.num_hidden_layers)
        types = getattr(config, "mlp_layer_types", None)
        if types is not None:
            return [layer for layer in layers if types[layer] != "dense"]
        dense = getattr(config, "first_k_dense_replace", None)
        return [] if dense is None else list(layers[dense:])

    def mlp(self, config: PreTrainedConfig, prefix: str) -> dict[str, Rows]:
        if int(prefix.split(".")[2]) not in self.sparse_layers(config):
            return super().mlp(config, prefix)
        with torch.device("meta"):
            names = mixture_of_experts(self.target_config(config)).state_dict()
        return unchanged(*(f"{prefix}mlp.{name}" for name in names))

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, Rows]:
        """The layer's attention tensors, each by its own name."""
        biased = ["weight", "bias"] if config.attention_bias else ["weight"]
        names = [f"{part}.{kind}" for part in ("kv_a_proj_with_mqa", "o_proj") for kind in biased]
        names += ["kv_a_layernorm.weight", "kv_b_proj.weight"]
        if config.q_lora_rank is None:
            names += ["q_proj.weight"]
        else:
            names += ["q_a_layernorm.weight", "q_b_proj.weight", *(f"q_a_proj.{kind}" for kind in biased)]
        return unchanged(*(f"model.layers.{layer_idx}.self_attn.{name}" for name in names))

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        """Queries of the source's width; no keys beside the latent, so none that turn or could be mixed."""
        query_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        return AttentionShape(config.num_attention_heads, 0, query_dim, config.hidden_size, rotary_dim=0)

    def probes(self, config: PreTrainedConfig) -> tuple[str, ...]:
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

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, Rows]:
        return self._scaled(super().attention(config, layer_idx), config, "o_proj.")

    def mlp(self, config: PreTrainedConfig, prefix: str) -> dict[str, Rows]:
        return self._scaled(super().mlp(config, prefix), config, "down_proj.")

    def copied(self, config: PreTrainedConfig, layer_idx: int | None) -> dict[str, Rows]:
        parts = super().copied(config, layer_idx)
        if layer_idx is None:
            embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
            parts[embedding] = Rows(embedding, scale=config.scale_emb)
            tied = config.scale_emb if config.tie_word_embeddings else 1.0
            parts[norm] = Rows(norm, scale=1.0 / (config.logits_scaling * tied))
        return parts

    def _scaled(self, parts: dict[str, Rows], config: PreTrainedConfig, projection: str) -> dict[str, Rows]:
        """The same tensors, those of the projection times what scales each residual branch."""
        scale = config.scale_depth / math.sqrt(config.num_hidden_layers)
        return {name: Rows(name, scale=scale) if projection in name else rows for name, rows in parts.items()}


class EGMLA(MLA):
    """An EG-MLA checkpoint whose gate is at identity: its latent is made smaller, with a fresh gate."""

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        if config.qk_rope_head_dim == 0:
            raise ValueError(
                "This egmla checkpoint has no rotary key (qk_rope_head_dim=0), which conversion requires."
            )
        if config.kv_latent_norm and (config.kv_encoder_dim is not None or isinstance(config.kv_lora_rank, list)):
            raise ValueError(
                f"This egmla checkpoint normalises latents (kv_latent_norm) with kv_lora_rank={config.kv_lora_rank}, "
                f"kv_encoder_dim={config.kv_encoder_dim}. That norm would be in the encoder, which must not be there "
                "already and has one width for all layers; convert the checkpoint it was made of instead."
            )

    def gate(self, config: PreTrainedConfig, layer_idx: int) -> tuple[str, ...]:
        return tuple(name for name in self._names(config, layer_idx) if ".kv_gate_" in name)

    def check_weights(self, source: Source) -> None:
        for layer_idx in range(source.config.num_hidden_layers):
            for name in self.gate(source.config, layer_idx):
                identity = {"kv_gate_norm.weight": 0, "kv_gate_norm.bias": 1}.get(name.partition("self_attn.")[2])
                if identity is not None and not (source.tensor(name) == identity).all():
                    raise ValueError(
                        f"The gate of layer {layer_idx} of {source.label} is trained ({name} is not {identity}): a "
                        "smaller latent would have no such gate. Convert a checkpoint whose gate is at identity."
                    )

    def attention(self, config: PreTrainedConfig, layer_idx: int) -> dict[str, Rows]:
        return unchanged(*(name for name in self._names(config, layer_idx) if ".kv_gate_" not in name))

    def _names(self, config: Any, layer_idx: int) -> list[str]:
        with torch.device("meta"):
            names = EGMLAAttention(config, layer_idx).state_dict()
        return [f"model.layers.{layer_idx}.self_attn.{name}" for name in names]

    def sparse_layers(self, config: PreTrainedConfig) -> list[int]:
        return list(config.moe_layers or ())

    def layer_norms(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return FAMILIES["olmo2" if config.post_norm else "llama"].layer_norms(config)

    def latent_norm(self, config: PreTrainedConfig) -> bool:
        return config.kv_latent_norm

    def shape(self, config: PreTrainedConfig) -> AttentionShape:
        if config.query_norm_dim is None:
            return super().shape(config)
        return replace(super().shape(config), head_dim=config.qk_nope_head_dim)

    def probes(self, config: PreTrainedConfig) -> tuple[str, ...]:
        queries, latents = super().probes(config)
        if config.query_norm_dim is not None:
            queries = "q_norm"
        return queries, latents if config.kv_latent_norm else "kv_a_proj_with_mqa"

    def skeleton(self, config: PreTrainedConfig) -> PreTrainedModel:
        model = super().skeleton(EGMLAConfig(**{**config.to_dict(), "kv_gate": None, "kv_gate_embedding_dim": None}))
        for module in model.modules():
            if isinstance(module, EGMLAAttention) and module.rope_slots is not None:  # in no checkpoint
                slots = torch.tensor(config.layer_rope_slots(module.layer_idx))
                module.register_buffer("rope_slots", slots, persistent=False)
        return model

    def context(self, tables: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        halves = [table[..., : table.shape[-1] // 2].unsqueeze(1) for table in tables]
        return {"position_embeddings": tuple(halves), "gate_input": None}

    def target_config(self, config: PreTrainedConfig, **attention) -> EGMLAConfig:
        return EGMLAConfig(**{**config.to_dict(), "kv_gate_embedding_dim": None, **attention})


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Mistral(),
    "qwen2": Qwen2(),
    "phi3": Phi3(),
    "smollm3": SmolLM3(),
    "qwen3": Qwen3(),
    "olmo2": Olmo2(),
    "deepseek_v3": MLA(),
    "deepseek_v2": MLA(),
    "youtu": MLA(),
    "minicpm3": MiniCPM3(rope_interleave=False),
    "glm4_moe_lite": MLA(),
    "egmla": EGMLA(),
}

# Architectures people ask for: the nearest supported one, and what EG-MLA or its conversion lacks for them.
EXPERTS = "mixtures of experts"
MISSING = {
    "mixtral": ("mistral", EXPERTS),
    "qwen2_moe": ("qwen2", EXPERTS),
    "qwen3_moe": ("qwen3", EXPERTS),
    "phimoe": ("phi3", f"{EXPERTS} and LayerNorm"),
    "olmoe": ("olmo2", EXPERTS),
    "gpt_oss": ("llama", f"{EXPERTS}, attention sinks and sliding windows"),
    "deepseek_v32": ("deepseek_v3", f"{EXPERTS} and the indexer that picks tokens"),
    "qwen3_next": ("qwen3", "linear attention layers"),
    "ministral": ("mistral", "sliding windows"),
    "gemma": ("llama", "norms that multiply by 1 + weight, and scaled embeddings"),
    "gemma2": ("llama", "soft-capped logits, norms behind attention and MLP, sliding windows"),
    "gemma3_text": ("qwen3", "norms behind attention and MLP, sliding windows"),
    "olmo": ("llama", "norms without weights, and clipped queries, keys and values"),
    "olmo3": ("olmo2", "sliding windows"),
    "glm4": ("phi3", "norms behind attention and MLP, and interleaved rotation of half a head"),
    "granite": ("llama", "multipliers on embeddings, scores, residual branches and logits"),
    "cohere": ("llama", "LayerNorm, attention beside the MLP, and scaled logits"),
    "starcoder2": ("qwen2", "LayerNorm, an MLP without gate, sliding windows"),
    "gpt_neox": ("llama", "LayerNorm, attention beside the MLP, and an MLP without gate"),
    "phi": ("phi3", "LayerNorm, attention beside the MLP, and an MLP without gate"),
    "gpt2": ("llama", "learned positions, LayerNorm, and an MLP without gate"),
}


def refuse_architecture(model_type: str) -> NoReturn:
    """Raises `ValueError` that names the architecture, the nearest supported one and what is missing."""
    by_name = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.0)[0]
    near, lacks = MISSING.get(model_type, (by_name, "a description of its layers (nearest is by name alone)"))
    raise ValueError(
        f"Architecture {model_type!r} is not supported. Supported: {', '.join(FAMILIES)}. Nearest: {near}; "
        f"missing: {lacks}. A new family is an entry in conversion/families.py."
    )


def find_family(config: PreTrainedConfig) -> Family:
    """The family of a source.

    Raises:
        ValueError: for an architecture or a variant that is not supported; the message names the architecture, the
            nearest supported one and what is missing.
    """
    if config.model_type not in FAMILIES:
        refuse_architecture(config.model_type)
    family = FAMILIES[config.model_type]
    family.check(config)
    return family


__all__ = ["FAMILIES", "KEPT_FIELDS", "AttentionShape", "AttentionWeights", "Family", "find_family"]
