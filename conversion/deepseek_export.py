"""Writing a converted model as a checkpoint of Transformers' own DeepSeek-V3 class, which serving engines know.

That class is multi-head latent attention without a gate, whose latent always has a norm and whose rotary key has the
stock frequencies of its width. A model that is just that keeps its function; any other is refused with the reason.
"""

import torch
from transformers import DeepseekV3Config, PreTrainedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from egmla import EGMLAConfig
from egmla.attention_egmla import softmax_scale
from egmla.modeling_egmla import EGMLARotaryEmbedding

from .families.base import KEPT_FIELDS
from .refinement import Refinement


LAYOUTS = ("egmla", "deepseek_v3")
# The name under which engines run whatever Transformers runs.
ANY_ARCHITECTURE = "TransformersForCausalLM"
LATENT_NORM_EPS = 1e-6  # fixed in DeepSeek's class
# Rope types whose frequencies are made one by one: those of every so many-th slot are those of a narrower table.
ELEMENTWISE_ROPE = ("default", "linear", "llama3")


def check_layout(layout: str, refinement: Refinement) -> None:
    """Raises `ValueError` for a layout that is not known, or has no place for what the refinement would train."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}.")
    if layout == "deepseek_v3" and refinement.steps and refinement.gate:
        raise ValueError(
            "layout='deepseek_v3' with a gate trained in refinement (--refine-gate, Refinement(gate=True)): that "
            "class has no gate, so it must stay at identity. Leave out --refine-gate, or --layout."
        )


def deepseek_config(config: EGMLAConfig) -> DeepseekV3Config:
    """The configuration of the same function in DeepSeek's class.

    Raises:
        ValueError: when that class has no such function; the message says why and what to do.
    """
    reasons = {
        "its latent has no norm; convert a source without a latent with --latent-norm": not config.kv_latent_norm,
        "its gate acts on keys and values (kv_gate='expanded')": config.kv_gate == "expanded",
        "its latent was made smaller behind its norm, by an encoder; export it at its own width (--exact)": (
            config.kv_encoder_dim is not None
        ),
        "its queries have biases": config.query_bias,
        "its MLPs have biases": config.mlp_bias,
        "some of its layers do not rotate (nope_layers)": config.nope_layers,
        "its queries and keys are normalised": config.qk_norm_dim or config.query_norm_dim,
        "its norms stand behind attention and MLP": config.post_norm,
        "it has mixtures of experts, which this layout does not write": config.moe_layers,
        "its layers have latents of different widths; give one --kv-lora-rank": isinstance(config.kv_lora_rank, list),
        "it has no rotary key (qk_rope_head_dim=0)": config.qk_rope_head_dim == 0,
        f"its latent norm has epsilon {config.latent_norm_eps}, there it is always {LATENT_NORM_EPS}": (
            config.latent_norm_eps != LATENT_NORM_EPS
        ),
    }
    _refuse([reason for reason, holds in reasons.items() if holds])
    fields = {name: getattr(config, name) for name in KEPT_FIELDS}
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        fields[name] = getattr(config, name)
    fields["rope_parameters"] = {**(config.rope_parameters or {})}
    deepseek = DeepseekV3Config(
        **fields,
        num_key_value_heads=config.num_attention_heads,
        attention_bias=config.attention_bias,
        rope_interleave=config.rope_interleave,
        first_k_dense_replace=config.num_hidden_layers,  # all of them
        num_mtp_layers=0,
    )
    deepseek.architectures = ["DeepseekV3ForCausalLM"]
    _check_frequencies(config, deepseek)
    return deepseek


def export_config(config: EGMLAConfig) -> DeepseekV3Config:
    """Return the configuration of an export, whose rotary pairs are always neighbours.

    Engines such as vLLM assume neighbours and do not read `rope_interleave`. vLLM's own DeepSeek class also drops
    attention biases silently, so a configuration with biases does not name it.

    Raises:
        ValueError: as `deepseek_config`.
    """
    deepseek = deepseek_config(config)
    deepseek.rope_interleave = True
    if deepseek.attention_bias:
        deepseek.architectures = [ANY_ARCHITECTURE]
    return deepseek


def deepseek_attention(
    tensors: dict[str, torch.Tensor], config: EGMLAConfig, deepseek: DeepseekV3Config
) -> dict[str, torch.Tensor]:
    """Return a layer's attention tensors in DeepSeek's class.

    The gate, which is at identity, is left out. Queries take the difference of the score scales. Rotary rows are put
    in the order of the export: pairs `(i, i + P / 2)` become the neighbours `(2 i, 2 i + 1)`.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("kv_gate_")}
    last = "q_b_proj.weight" if "q_b_proj.weight" in kept else "q_proj.weight"
    kept[last] = kept[last] * query_factor(config, deepseek)
    if deepseek.rope_interleave and not config.rope_interleave:
        heads, P = config.num_attention_heads, config.qk_rope_head_dim
        kept[last] = _interleave_rows(kept[last].unflatten(0, (heads, -1)), P).flatten(0, 1)
        for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
            if name in kept:
                kept[name] = _interleave_rows(kept[name][None], P)[0]
    return kept


def _interleave_rows(rows: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """Reorder the last `P` rows of `[heads, rows, ...]` from halves to pairs of neighbours."""
    order = torch.arange(rows.shape[1])
    order[-rope_dim:] = order[-rope_dim:].view(2, -1).T.flatten()
    return rows[:, order]


def serving_note(config: PreTrainedConfig) -> str | None:
    """Return what an engine must do to serve an export, or `None` where nothing is special."""
    if config.model_type != "deepseek_v3" or not getattr(config, "attention_bias", False):
        return None
    return (
        "This export has attention biases, which the DeepSeek classes of engines drop. So its config.json names "
        f"{ANY_ARCHITECTURE}: with VLLM_MLA_DISABLE=1 in the environment vLLM serves it by Transformers' code (tested "
        "on a CPU). Saving the model anew with Transformers loses that name: set it again."
    )


def query_factor(config: EGMLAConfig, deepseek: DeepseekV3Config) -> float:
    """What our scores are multiplied by, over what DeepSeek's are."""
    with torch.device("meta"):
        return softmax_scale(config) / DeepseekV3Attention(deepseek, 0).scaling


def _check_frequencies(config: EGMLAConfig, deepseek: DeepseekV3Config) -> None:
    ours = EGMLARotaryEmbedding(config)  # type: ignore[arg-type]
    type_, pairs = (config.rope_parameters or {})["rope_type"], len(ours.inv_freq)
    given = (
        "its rotary slots are not at the stock frequencies of a rotary key of that width "
        f"({config.qk_rope_head_dim}, rope_type {type_!r})"
    )
    if 2 * pairs != config.qk_rope_head_dim and type_ not in ELEMENTWISE_ROPE:
        _refuse(
            [
                f"{given}; those of this type depend on the width, so a narrower key than the source's never has "
                f"them; convert with --set slots=uniform and --qk-rope-head-dim {2 * pairs}"
            ]
        )
    theirs = DeepseekV3RotaryEmbedding(deepseek)
    slots = config.rope_slots if config.rope_slots is not None else list(range(config.qk_rope_head_dim // 2))
    layers = slots if slots and isinstance(slots[0], list) else [slots]
    same = all(
        ours.inv_freq[layer].shape == theirs.inv_freq.shape and torch.allclose(ours.inv_freq[layer], theirs.inv_freq)
        for layer in layers
    )
    if not same or ours.attention_scaling != theirs.attention_scaling:
        fold = next(fold for fold in (4, 3, 2, pairs) if pairs % fold == 0)
        folds = f" --set freqfold={fold} and a --qk-rope-head-dim which that allows"
        _refuse([f"{given}; convert with --set slots=uniform{folds if type_ in ELEMENTWISE_ROPE else ''}"])


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(
            f"This conversion does not fit layout deepseek_v3: {'; '.join(reasons)}. Or leave --layout out."
        )
