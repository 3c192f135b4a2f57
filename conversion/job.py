"""A conversion that is checked and planned, before any long work."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from egmla import EGMLAConfig
from egmla.utils.models import meta_model
from egmla.utils.provenance import public_name

from .bits import SMALLER_SHARES, Budget
from .calibration import MEASURED_TOKENS, measured_sequences
from .deepseek_export import deepseek_attention, export_config, serving_note
from .estimates import Disk, disk, estimate
from .families import find_family
from .families.base import Family
from .layers import target_config
from .plan import (
    Plan,
    check_share_of_bytes,
    full_widths,
    is_full_latent,
    latent_ranks,
    plan_bits,
    plan_conversion,
    plan_latent,
    rank_note,
)
from .recipes import Recipe
from .refinement import Refinement
from .settings import CheckedSettings, command_line
from .source import Source
from .source_checks import check_tensors
from .sources import open_source
from .texts import EvaluationText, open_calibration, open_evaluation


# Statistics decide on rotary slots alone where the rank is kept: more text changes nothing.
BITS_TOKENS = 16384
REFINEMENT_TOKENS_FACTOR = 3  # with less text a refinement overfits


def calibration_tokens(tokens: int | None, refined: bool, allocates_bits: bool = False) -> int:
    """Return how many calibration tokens to use at most."""
    if allocates_bits and not refined:
        return tokens or BITS_TOKENS
    return tokens or MEASURED_TOKENS * (REFINEMENT_TOKENS_FACTOR if refined else 1)


@dataclass
class Job:
    """A conversion that is checked and planned.

    Attributes:
        settings: what was asked for; `exact` is decided.
        source: the opened checkpoint.
        family: its family.
        plan: the widths.
        config: the converted model's EG-MLA configuration as far as it is known before the work.
        written_config: the configuration to write: the same, or DeepSeek's.
        evaluation: the text to measure perplexity on, if any.
        sequences: calibration ids `[sequences, T]`; empty in exact mode.
        calibration: what the report says of the calibration text.
        stored_dtype: dtype of the attention's tensors in the converted checkpoint.
        room: bytes on disk.
        keeps_layers: whether bits are all that changes, since the gates are trained.
    """

    settings: CheckedSettings
    source: Source
    family: Family
    plan: Plan
    config: EGMLAConfig
    written_config: Any
    evaluation: EvaluationText | None
    sequences: torch.Tensor
    calibration: dict[str, Any] | None
    stored_dtype: torch.dtype
    room: Disk
    keeps_layers: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.settings.recipe

    @property
    def refinement(self) -> Refinement:
        return self.settings.refinement

    @property
    def budget(self) -> Budget:
        """What a cache with bits may take, and the smaller caches that it can be used as."""
        share: Any = self.settings.cache
        smaller = tuple(each for each in SMALLER_SHARES if each < share)
        return Budget(share, smaller, self.plan.source_elements, self.settings.max_rank)

    def passthrough_tensors(self, layer_idx: int | None) -> dict[str, torch.Tensor]:
        """Read what stays as it is: of a layer, or with `None` of everything outside the layers."""
        parts = self.family.passthrough_tensors(self.source.config, layer_idx)
        return {name: cast(name, self.source.read(part), self.settings.output_dtype) for name, part in parts.items()}

    def attention_tensors(self, layer_idx: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a layer's attention tensors as they are written, by their full names."""
        prefix = f"{self.family.layer_prefix(layer_idx)}self_attn."
        own = self.source.tensor(f"{prefix}o_proj.weight").dtype
        if self.settings.layout == "deepseek_v3":
            tensors = deepseek_attention(tensors, self.config, self.written_config)
        # With bits the attention is written anew in the end, and rounded only then.
        dtype = torch.float32 if self.settings.allocates_bits else self.settings.output_dtype or own
        return {f"{prefix}{name}": cast(f"{prefix}{name}", tensor, dtype) for name, tensor in tensors.items()}

    def final_config(self, layers: list[dict[str, Any]]) -> Any:
        """Return the configuration to write, with the rotary slots that the finished layers chose."""
        slots = [layer["rope_slots"] for layer in layers]
        config: Any
        if self.keeps_layers:
            config = copy.deepcopy(self.config)
        else:
            config = target_config(self.source.config, self.family, self.plan, slots, self.recipe.latent_norm)
        if self.settings.layout == "deepseek_v3":
            config = export_config(config)
        # Transformers loads in the dtype that the configuration names, whatever the file stores.
        config.dtype = self.settings.output_dtype or self.source.config.dtype or self.stored_dtype
        return config


def prepare(source: str | Path, settings: CheckedSettings) -> Job:
    """Open a source, check the settings against it and plan the conversion.

    Raises:
        ValueError, FileNotFoundError: for anything that would stop the conversion later.
    """
    opened = open_source(source)
    family = find_family(opened.config)
    settings, plan = _planned(opened.config, family, settings)
    recipe, refinement = settings.recipe, settings.refinement
    _check_recipe(opened.config, family, plan, settings)
    keeps_layers = _keeps_layers(opened, family, settings)
    own: Any = opened.config if keeps_layers else _planned_config(opened.config, family, plan, recipe)
    written: Any = export_config(own) if settings.layout == "deepseek_v3" else own
    if plan.exact:
        _check_exact(settings)
    evaluation = None
    if settings.evaluate is not None:
        tokenizer = opened.needed_tokenizer("evaluation")
        evaluation = open_evaluation(settings.evaluate, tokenizer, opened.config, settings.evaluation_windows)
    sequences, calibration = torch.empty(0, 0, dtype=torch.long), None
    if not plan.exact:
        refined = bool(refinement.steps)
        tokens = calibration_tokens(settings.calibration_tokens, refined, settings.allocates_bits)
        sequences, calibration = open_calibration(
            opened, settings.calibration, tokens, recipe.sequence_length, evaluation
        )
        calibration["sequences_measured"] = measured_sequences(sequences, refined=refined)
    check_tensors(opened, family)
    if not keeps_layers:
        family.check_weights(opened)
    stored = settings.output_dtype or opened.tensor(f"{family.layer_prefix(0)}self_attn.o_proj.weight").dtype
    states_shape = (0, 0, 0) if plan.exact else (*sequences.shape, opened.config.hidden_size)
    room = disk(wanted_shapes(meta_model(written)).values(), stored, states_shape, refinement)
    texts = evaluation, sequences, calibration
    return Job(settings, opened, family, plan, own, written, *texts, stored, room, keeps_layers)


def _keeps_layers(opened: Source, family: Family, settings: CheckedSettings) -> bool:
    """Tell whether bits are all that changes. Otherwise check that layers can get another latent."""
    if settings.allocates_bits:
        check_tensors(opened, family)  # whose gates are read
        if family.has_trained_gate(opened):
            return True
    family.check_new_latent(opened.config)
    return False


def planned_report(job: Job) -> dict[str, Any]:
    """Return the part of the report that is known before the work."""
    settings, source, plan = job.settings, job.source, job.plan
    evaluation = None if job.evaluation is None else job.evaluation.describe()
    asked = ("exact", "kv_lora_rank", "qk_rope_head_dim", "cache", "cache_dtype", "max_rank", "calibration_tokens")
    report: dict[str, Any] = {
        "source": {
            "label": public_name(source.label),
            "model_type": source.config.model_type,
            "cache_elements_per_token": plan.source_elements,
            **source.origin,
        },
        "command": command_line(source.label, settings, job.calibration, evaluation),
        "layout": settings.layout,
        "plan": report_plan(plan),
        "settings": {name: getattr(settings, name) for name in (*asked, "dtype")},
        "recipe": None if plan.exact else asdict(settings.recipe),
        "refinement": None if plan.exact or not settings.refinement.steps else asdict(settings.refinement),
        "calibration": job.calibration,
        "tokenizer": None if source.tokenizer is None else type(source.tokenizer).__name__,
    }
    if job.calibration is not None:
        report["settings"]["calibration_tokens"] = job.calibration["tokens_asked"]
    if settings.allocates_bits:
        report["bits"] = {"share": settings.cache, "max_rank": settings.max_rank}
    if (note := serving_note(job.written_config)) is not None:
        report["serving"] = note
    if (note := rank_note(plan)) is not None:
        report["rank"] = note
    return report


def report_plan(plan: Plan) -> dict[str, Any]:
    """Return what the report says of a plan."""
    return {**asdict(plan), "cache_kept": plan.kept}


def dry_report(job: Job) -> dict[str, Any]:
    """Return the planned report with bytes on disk, and an estimate of time and memory where there is calibration."""
    report = planned_report(job) | {"disk": asdict(job.room)}
    if not job.plan.exact:
        shape = job.family.shape(job.source.config)
        bits = job.settings.allocates_bits
        report["estimate"] = asdict(estimate(job.config, shape, job.plan, job.sequences, job.refinement, bits))
    return report


def _planned(config: PreTrainedConfig, family: Family, settings: CheckedSettings) -> tuple[CheckedSettings, Plan]:
    """Decide whether the conversion is exact, and plan its widths."""
    given = settings.kv_lora_rank, settings.qk_rope_head_dim
    full = is_full_latent(config, *given) if family.latent else given == full_widths(family.shape(config))
    if not settings.calibration and full:
        settings = settings.made_exact()  # all that the source has: nothing to calibrate
    if settings.allocates_bits:
        return settings, _planned_with_bits(config, family, settings)
    widths = settings.exact, settings.kv_lora_rank, settings.qk_rope_head_dim, settings.cache
    if family.latent:
        return settings, plan_latent(config, *widths)
    return settings, plan_conversion(config, family.shape(config), *widths, settings.recipe)


def _planned_with_bits(config: PreTrainedConfig, family: Family, settings: CheckedSettings) -> Plan:
    """Plan a conversion that keeps the rank, for a cache with bits."""
    if settings.exact or settings.kv_lora_rank is not None:
        raise ValueError(
            f"cache={settings.cache} with exact={settings.exact}, kv_lora_rank={settings.kv_lora_rank}: give either "
            "cache or kv_lora_rank or exact: each decides the size of the cache (max_rank limits the rank of cache)."
        )
    share: Any = settings.cache
    if family.latent:
        check_share_of_bytes(share)
        return plan_latent(config, False, latent_ranks(config), settings.qk_rope_head_dim)
    return plan_bits(config, family.shape(config), share, settings.qk_rope_head_dim, settings.recipe)


def _check_recipe(config: PreTrainedConfig, family: Family, plan: Plan, settings: CheckedSettings) -> None:
    """Raise `ValueError` for choices of a recipe that this source, plan or layout does not allow."""
    recipe = settings.recipe
    if family.qk_norm is not None and recipe.freqfold > 1:
        raise ValueError(
            f"freqfold={recipe.freqfold}: this {config.model_type} source normalises its queries, so a rotary slot "
            "can only take components of its own frequency; use freqfold=1."
        )
    _check_latent_norm(config, family, plan, recipe)
    if recipe.ranks == "energy" and (len(set(plan.ranks)) > 1 or settings.layout == "deepseek_v3"):
        raise ValueError(
            "ranks='energy' allocates the ranks of all layers: it takes one kv_lora_rank (or cache) to begin with, "
            "and layout='deepseek_v3' has one width for all layers; give one rank and layout 'egmla', or leave it out."
        )


def _check_latent_norm(config: PreTrainedConfig, family: Family, plan: Plan, recipe: Recipe) -> None:
    if not recipe.latent_norm:
        return
    if family.latent or family.qk_norm is not None:
        has = "a latent with its own norm, if any" if family.latent else "an encoder between input and latent"
        raise ValueError(f"latent_norm: a {config.model_type} source has {has}; leave it out.")
    if plan.exact or min(plan.ranks) < 2:
        raise ValueError(
            f"latent_norm with exact={plan.exact}, kv_lora_rank={min(plan.ranks)}: the norm takes one number of the "
            "latent, and of an exact one none is left over; use kv_lora_rank of at least 2, below the full width."
        )


def _check_exact(settings: CheckedSettings) -> None:
    """Refuse what exact mode has no use for: nothing asked for is ignored."""
    given = {
        "calibration text (--calibration, --calibration-tokens)": (
            bool(settings.calibration) or settings.calibration_tokens is not None
        ),
        "refinement (--refine-steps, --refine-gate)": settings.refinement_given,
        "choices of a recipe (--recipe, --set)": settings.recipe != Recipe(),
    }
    if unused := [name for name, there in given.items() if there]:
        raise ValueError(
            f"exact mode keeps the source's function and has no use for {' and '.join(unused)}; leave that out, or "
            "--exact, and say how small the cache shall be."
        )


def _planned_config(config: PreTrainedConfig, family: Family, plan: Plan, recipe: Recipe) -> EGMLAConfig:
    """The converted model's configuration as far as it is known before the work: rotary slots only if uniform."""
    count = plan.rope_dim // 2
    stride = 0 if plan.exact or recipe.slots != "uniform" or not count else family.shape(config).frequencies // count
    slots = [[stride * slot for slot in range(count)]] * len(plan.ranks)
    return target_config(config, family, plan, slots, recipe.latent_norm)


def wanted_shapes(model: Any) -> dict[str, torch.Size]:
    """The tensors in a model's checkpoint, by name."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    return wanted


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor in the dtype to write, `None` for its own; what decides between experts stays as fine as it is.

    Raises:
        ValueError: when it has values that dtype cannot hold.
    """
    if dtype in (None, tensor.dtype) or name.endswith("e_score_correction_bias"):
        return tensor
    written = tensor.to(dtype)
    if not torch.stack(written.aminmax()).isfinite().all():
        raise ValueError(
            f"Tensor {name} of the converted model has values of up to {tensor.abs().max():.3g}, and {dtype} holds up "
            f"to {torch.finfo(dtype).max:.3g}; use dtype bfloat16 or float32 (--dtype)."
        )
    return written
