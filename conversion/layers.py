"""A layer of the converted model: its attention tensors by their names, and the configuration that holds them."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from egmla import EGMLAConfig

from .calibration import LayerStatistics
from .closed_form import LatentAttention, exact_attention, low_rank_attention, smaller_latent
from .families.base import Family
from .plan import Plan
from .recipes import Recipe
from .source import Source


def low_rank_layer(
    source: Source, family: Family, layer_idx: int, statistics: LayerStatistics, plan: Plan, recipe: Recipe
) -> tuple[dict[str, torch.Tensor], list[int], torch.Tensor]:
    """Attention tensors, rotary slots and spectrum of a layer whose keys and values become a smaller latent."""
    config = source.config
    attention = low_rank_attention(
        family.read_attention(source, layer_idx),
        family.shape(config),
        statistics,
        plan.ranks[layer_idx],
        plan.rope_dim,
        recipe,
        _attention_factor(config),
        family.rotates(config, layer_idx),
        family.qk_norm is not None,
    )
    tensors = _attention_tensors(attention, bool(family.bias_roles(config)), True)
    norms = {"q": "q_norm.weight", "k": "kv_encoder_norm.weight"}
    tensors |= {norms[role]: source.tensor(name) for role, name in family.norms(layer_idx).items()}
    return tensors, attention.slots, attention.spectrum


def smaller_latent_layer(
    source: Source, family: Family, layer_idx: int, statistics: LayerStatistics, plan: Plan, recipe: Recipe
) -> tuple[dict[str, torch.Tensor], list[int], torch.Tensor]:
    """The same of a layer that has a latent: what makes it stays, and its rotary key as it is."""
    config, (tensors, slots) = source.config, exact_layer(source, family, layer_idx)
    kv_b, o = (tensors[f"{name}.weight"].double() for name in ("kv_b_proj", "o_proj"))
    smaller = smaller_latent(kv_b, o, config.qk_nope_head_dim, statistics, plan.ranks[layer_idx], recipe)
    for name in ("q_a_proj", "kv_encoder_proj", "kv_a_proj_with_mqa", "o_proj"):  # means go into biases: now all have
        if f"{name}.weight" in tensors:
            tensors.setdefault(f"{name}.bias", torch.zeros(len(tensors[f"{name}.weight"])))
    down = torch.block_diag(smaller.down, torch.eye(plan.rope_dim, dtype=torch.float64))
    down_bias = torch.nn.functional.pad(smaller.down_bias, (0, plan.rope_dim))
    weight, bias = (tensors[f"kv_a_proj_with_mqa.{kind}"] for kind in ("weight", "bias"))
    if family.latent_norm(config):
        tensors |= {"kv_encoder_proj.weight": weight, "kv_encoder_proj.bias": bias}
        tensors["kv_encoder_norm.weight"] = tensors.pop("kv_a_layernorm.weight")
    else:
        down, down_bias = down @ weight.double(), down @ bias.double() + down_bias
    return (
        tensors
        | {
            "kv_a_proj_with_mqa.weight": down,
            "kv_a_proj_with_mqa.bias": down_bias,
            "kv_b_proj.weight": smaller.kv_b,
            "o_proj.bias": tensors["o_proj.bias"] + smaller.o_bias,
        },
        slots,
        smaller.spectrum,
    )


def exact_layer(source: Source, family: Family, layer_idx: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Attention tensors and rotary slots of a layer that keeps its function."""
    if family.latent:
        prefix = f"{family.layer_prefix(layer_idx)}self_attn."
        parts = family.attention(source.config, layer_idx)
        return {name.removeprefix(prefix): source.read(rows) for name, rows in parts.items()}, []
    shape, weights = family.shape(source.config), family.read_attention(source, layer_idx)
    norms = {role: source.tensor(name) for role, name in family.norms(layer_idx).items()}
    biased = bool(family.bias_roles(source.config))
    if family.qk_norm != "all":
        attention = exact_attention(weights, shape, interleaved=bool(norms))
        tensors = _attention_tensors(attention, biased, biased)
    else:
        # The norm sees the queries of all heads, so it comes before they are put in place: a low-rank query of full
        # rank, whose second map does only that.
        place = torch.eye(shape.heads * shape.head_dim, dtype=torch.float64)
        attention = exact_attention(
            replace(weights, q=place, q_bias=torch.zeros_like(weights.q_bias)), shape, interleaved=True
        )
        tensors = _attention_tensors(attention, False, biased)
        tensors |= {"q_b_proj.weight": tensors.pop("q_proj.weight"), "q_a_proj.weight": weights.q}
        tensors["q_a_layernorm.weight"] = norms.pop("q")
        if biased:
            tensors["q_a_proj.bias"] = weights.q_bias
    for role, norm in norms.items():
        # In the order of the rows: pairs beside one another.
        tensors[f"{role}_norm.weight"] = norm.view(-1, 2, shape.frequencies).transpose(1, 2).reshape(-1)
    return tensors, attention.slots


def _attention_factor(config: PreTrainedConfig) -> float:
    """What the rope type multiplies cosines and sines by (YaRN and LongRoPE do, others 1)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = config.rope_parameters["rope_type"]
    return 1.0 if rope_type == "default" else float(ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))[1])


def target_config(
    config: PreTrainedConfig, family: Family, plan: Plan, slots: list[list[int]], latent_norm: bool = False
) -> EGMLAConfig:
    """The converted model's configuration; `slots` of every layer, `latent_norm` of sources without a latent."""
    ranks = plan.ranks[0] if len(set(plan.ranks)) == 1 else plan.ranks
    if family.latent:
        fields: dict[str, Any] = {"kv_gate": "latent"}
        if not plan.exact:
            fields |= {"kv_lora_rank": ranks, "kv_latent_norm": False, "attention_bias": True}
            if family.latent_norm(config):
                fields |= {
                    "kv_encoder_dim": config.kv_lora_rank + plan.rope_dim,
                    "kv_encoder_norm_dim": config.kv_lora_rank,
                }
        return family.target_config(config, **fields)
    shape = family.shape(config)
    same_slots = all(layer == slots[0] for layer in slots)
    biased = bool(family.bias_roles(config))
    nope_layers = [layer for layer in range(config.num_hidden_layers) if not family.rotates(config, layer)]
    fields = {
        "kv_lora_rank": ranks,
        "qk_nope_head_dim": shape.head_dim - shape.rotary_head_dim if plan.exact else shape.head_dim,
        "qk_rope_head_dim": plan.rope_dim,
        "v_head_dim": shape.head_dim,
        "kv_latent_norm": latent_norm,
        "kv_gate": "latent",
        "softmax_scale": shape.head_dim**-0.5,
        "rope_interleave": False,
        "rope_table_dim": shape.rotary_head_dim,
        "rope_slots": slots[0] if same_slots else slots,
        "nope_layers": nope_layers or None,
        "attention_bias": not plan.exact or biased,
        "query_bias": biased,
    }
    return family.target_config(config, **fields | _norm_fields(config, family, plan))


def _norm_fields(config: PreTrainedConfig, family: Family, plan: Plan) -> dict[str, Any]:
    """Fields of a source with normalised queries and keys; those of exact mode stand behind their projections."""
    if family.qk_norm is None:
        return {}
    shape, together = family.shape(config), family.qk_norm == "all"
    key_group = shape.kv_width if together else shape.head_dim
    if not plan.exact:
        return {
            "query_norm_dim": shape.heads * shape.head_dim if together else shape.head_dim,
            "kv_encoder_dim": 2 * shape.kv_width,
            "kv_encoder_norm_dim": key_group,
            "kv_encoder_norm_groups": shape.kv_width // key_group,
            "latent_norm_eps": config.rms_norm_eps,
        }
    fields = {"rope_interleave": True, "qk_norm_dim": key_group}
    if together:
        width = shape.heads * shape.head_dim
        fields |= {"q_lora_rank": width, "latent_norm_eps": config.rms_norm_eps, "query_bias": False}
    return fields


def _attention_tensors(attention: LatentAttention, query_bias: bool, attention_bias: bool) -> dict[str, torch.Tensor]:
    """The layer's tensors by their names in the attention module."""
    tensors = {
        "q_proj.weight": attention.q,
        "kv_a_proj_with_mqa.weight": attention.kv_a,
        "kv_b_proj.weight": attention.kv_b,
        "o_proj.weight": attention.o,
    }
    if attention.encoder is not None and attention.encoder_bias is not None:
        tensors |= {"kv_encoder_proj.weight": attention.encoder, "kv_encoder_proj.bias": attention.encoder_bias}
    if attention.latent_gain is not None:
        tensors["kv_a_layernorm.weight"] = attention.latent_gain
    if attention.q_rope_scale is not None and attention.slots:
        tensors["q_rope_scale"] = attention.q_rope_scale
    if query_bias:
        tensors["q_proj.bias"] = attention.q_bias
    if attention_bias:
        tensors |= {"kv_a_proj_with_mqa.bias": attention.kv_a_bias, "o_proj.bias": attention.o_bias}
    return tensors


def gate_at_identity(rank: int, config: PreTrainedConfig, layer_idx: int) -> dict[str, torch.Tensor]:
    """A layer's gate: LayerNorm with weight 0 and bias 1 = exactly 1; the map before it is random, to be trained."""
    generator = torch.Generator().manual_seed(layer_idx)
    return {
        "kv_gate_proj.weight": torch.randn(rank, config.hidden_size, generator=generator) * config.initializer_range,
        "kv_gate_norm.weight": torch.zeros(rank),
        "kv_gate_norm.bias": torch.ones(rank),
    }
