"""Converting a checkpoint into EG-MLA: checks, plan, layer-by-layer work, and a folder written whole or not at all."""

import hashlib
import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

import egmla
from egmla import EGMLAConfig
from egmla.utils.files import read_json
from egmla.utils.folders import JOURNAL, check_space, check_target, staged_folder, staging_path
from egmla.utils.models import meta_model
from egmla.utils.provenance import (
    CONVERSION_REPORT,
    machine,
    public_name,
    software_versions,
    source_commit,
    weights_sha256,
)

from .calibration import MEASURED_TOKENS, SourceRun, measured_sequences
from .deepseek_export import check_layout, deepseek_attention, deepseek_config, query_factor
from .estimates import disk, estimate
from .families import find_family
from .families.base import Family
from .journal import Journal, check_unfinished
from .layers import exact_layer, gate_at_identity, low_rank_layer, smaller_latent_layer, target_config
from .plan import Plan, deal_ranks, full_widths, is_full_latent, plan_conversion, plan_latent
from .recipes import Recipe, find_recipe, nearest_recipe, recipe_options, refinement_options
from .refinement import ConvertedRun, Refinement
from .report import (
    Progress,
    converted_perplexity,
    draw_report,
    energy_by_rank,
    slots_per_frequency,
    source_perplexity,
    write_report,
)
from .shards import ShardWriter
from .source import Source
from .source_checks import check_tensors
from .sources import open_source
from .texts import (
    MAX_CHARACTERS_PER_TOKEN,
    EvaluationText,
    check_calibration_text,
    check_token_ids,
    open_evaluation,
    read_text,
)


MIN_SEQUENCES = 4
CALIBRATION_TOKENS = MEASURED_TOKENS
RANK_TOKENS = 24576  # that ranks are dealt out by
REFINEMENT_TOKENS_FACTOR = 3  # it learns the text it sees by heart where there is less (conversion/README.md)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    exact: bool = False,
    kv_lora_rank: int | list[int] | None = None,
    qk_rope_head_dim: int | None = None,
    cache: float | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    evaluate: str | Path | None = None,
    evaluation_windows: int = 9,
    recipe: str | Recipe | None = None,
    latent_norm: bool = False,
    refinement: Refinement | None = None,
    layout: str = "egmla",
    dtype: str | None = None,
    resume: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint of a supported family (`families.py`) into an EG-MLA checkpoint.

    Its gate is at identity, unless the refinement trains it.

    Args:
        source (`str` or `Path`): a local folder with safetensors, a hub id, or a GGUF file.
        target (`str` or `Path`): a new or empty folder.
        exact (`bool`): same function and cache size as the source; needs no calibration.
        kv_lora_rank (`int` or `list[int]`, *optional*): latent width `R`, one or per layer.
        qk_rope_head_dim (`int`, *optional*): rotary width `P`.
        cache (`float`, *optional*): share of the source's cache to keep, instead of `kv_lora_rank`.
        calibration (`str` or `Path`, *optional*): a plain text, required unless `exact`; never the evaluation text.
        calibration_tokens (`int`, *optional*): tokens of it to use at most; 65,536 by default, 196,608 with
            refinement.
        evaluate (`str` or `Path`, *optional*): a plain text to measure perplexity on, of the source and the result.
        evaluation_windows (`int`): windows of it, of 2,048 tokens or the source's whole context, to use at most.
        recipe (`str` or `Recipe`, *optional*): choices of the closed form, or a name in `RECIPES`.
        latent_norm (`bool`): give the latent a norm, which layout `"deepseek_v3"` wants (a choice of the recipe too).
        refinement (`Refinement`, *optional*): choices of the refinement behind it; `Refinement(steps=0)` for none,
            which is the default of the peers' recipes.
        layout (`str`): `"egmla"`, or `"deepseek_v3"` for a checkpoint of Transformers' own DeepSeek-V3 class.
        dtype (`str`, *optional*): dtype to write, `"float32"`, `"bfloat16"` or `"float16"`; the source's by default.
        resume (`bool`): go on where an interrupted conversion into the same target with the same settings stopped.
        dry_run (`bool`): check everything, return the plan, the bytes on disk and an estimate of time and memory,
            write nothing.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `dict`: the conversion report (also written as `conversion_report.json`), or with `dry_run` its plan part. Of a
            conversion that was interrupted its `seconds` and `peak_bytes` cover all `runs`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        OSError: when its disk has no room for the work, or the target cannot be written; nothing is left there but
            what `resume` goes on from.
    """
    started = time.time()
    target = Path(target).resolve()
    refined = refinement is not None and refinement.steps > 0
    recipe = find_recipe(recipe, {"latent_norm": True} if latent_norm else None)
    if refinement is None:
        refinement = Refinement() if nearest_recipe(recipe) == "default" else Refinement(steps=0)
    check_layout(layout, refinement)
    output_dtype = _parse_dtype(dtype)
    unmeasured = _unmeasured_report(target) if resume and evaluate is not None and not dry_run else None
    if unmeasured is None:
        check_target(target, resume)
    opened = open_source(source)
    family = find_family(opened.config)
    if family.latent:
        if calibration is None and is_full_latent(opened.config, kv_lora_rank, qk_rope_head_dim):
            exact, kv_lora_rank, qk_rope_head_dim = True, None, None  # as below
        plan = plan_latent(opened.config, exact, kv_lora_rank, qk_rope_head_dim, cache)
    else:
        shape = family.shape(opened.config)
        if calibration is None and (kv_lora_rank, qk_rope_head_dim) == full_widths(shape):
            exact, kv_lora_rank, qk_rope_head_dim = True, None, None  # all that the source has: nothing to calibrate
        plan = plan_conversion(opened.config, shape, exact, kv_lora_rank, qk_rope_head_dim, cache, recipe)
        if family.qk_norm is not None and recipe.freqfold > 1:
            raise ValueError(
                f"freqfold={recipe.freqfold}: this {opened.config.model_type} source normalises its queries, so a "
                "rotary slot can only take components of its own frequency; use freqfold=1."
            )
    _check_latent_norm(opened.config, family, plan, recipe)
    if recipe.ranks == "energy" and (len(set(plan.ranks)) > 1 or layout == "deepseek_v3"):
        raise ValueError(
            "ranks='energy' deals out the ranks of all layers: it takes one kv_lora_rank (or cache) to begin with, "
            "and layout='deepseek_v3' has one width for all layers; give one rank and layout 'egmla', or leave it out."
        )
    own = _planned_config(opened.config, family, plan, recipe)
    planned: Any = deepseek_config(own) if layout == "deepseek_v3" else own
    if plan.exact:
        _check_exact(calibration, calibration_tokens, refined, recipe)
    evaluation = None
    if evaluate is not None:
        tokenizer = opened.needed_tokenizer("evaluation")
        evaluation = open_evaluation(evaluate, tokenizer, opened.config, evaluation_windows)
    sequences, calibration_report = torch.empty(0, 0, dtype=torch.long), None
    if not exact:
        if calibration_tokens is None:
            calibration_tokens = CALIBRATION_TOKENS * (REFINEMENT_TOKENS_FACTOR if refinement.steps else 1)
        sequences, calibration_report = _calibration_sequences(
            opened, calibration, calibration_tokens, recipe.sequence_length, evaluation
        )
        calibration_report["sequences_measured"] = measured_sequences(sequences, refined=bool(refinement.steps))
    check_tensors(opened, family)
    family.check_weights(opened)
    stored = output_dtype or opened.tensor(f"{family.layer_prefix(0)}self_attn.o_proj.weight").dtype
    states_shape = (0, 0, 0) if exact else (*sequences.shape, opened.config.hidden_size)
    room = disk(_wanted_shapes(meta_model(planned)).values(), stored, states_shape, refinement)
    if unmeasured is None:
        check_space(target, room.needed_bytes)
    report: dict[str, Any] = {
        "source": {
            "label": public_name(opened.label),
            "model_type": opened.config.model_type,
            "cache_elements_per_token": plan.source_elements,
            **opened.origin,
        },
        "command": _command(
            opened.label,
            exact,
            kv_lora_rank,
            qk_rope_head_dim,
            cache,
            calibration_report,
            recipe,
            refinement,
            evaluation,
            layout,
            dtype,
        ),
        "layout": layout,
        "plan": {**asdict(plan), "cache_kept": plan.kept},
        "settings": {
            "exact": exact,
            "kv_lora_rank": kv_lora_rank,
            "qk_rope_head_dim": qk_rope_head_dim,
            "cache": cache,
            "calibration_tokens": calibration_tokens,
            "dtype": dtype,
        },
        "recipe": None if exact else asdict(recipe),
        "refinement": None if exact or not refinement.steps else asdict(refinement),
        "calibration": calibration_report,
        "tokenizer": None if opened.tokenizer is None else type(opened.tokenizer).__name__,
    }
    if opened.tokenizer is None:
        warnings.warn(
            f"{source} has no tokenizer that can be read ({opened.without_tokenizer}); the converted model will have "
            "none.",
            stacklevel=2,
        )
    if dry_run:
        report["disk"] = asdict(room)
        if not exact:
            report["estimate"] = asdict(estimate(own, family.shape(opened.config), plan, sequences, refinement))
        return report
    if unmeasured is not None and evaluation is not None:
        _check_same_conversion(target, unmeasured, report)
        return _add_evaluation(unmeasured | {"command": report["command"]}, source, target, evaluation, progress)

    settings = {
        "source": opened.fingerprint(),
        **{name: report[name] for name in ("layout", "plan", "recipe", "refinement", "calibration")},
        "dtype": dtype,
        "versions": software_versions(),
        "machine": None if plan.exact else machine(),  # training carries on in which order sums were taken
    }
    settings = json.loads(json.dumps(settings))  # as the journal of an earlier run has them
    if resume:
        check_unfinished(target, settings)
    with staged_folder(target, keep=True) as folder, torch.no_grad():
        journal = Journal(folder, settings, resume, started)
        if journal.report is None:
            if recipe.ranks == "energy" and not plan.exact:
                plan = _plan_by_energy(opened, family, plan, recipe, sequences, journal, progress)
                report["plan"] = {**asdict(plan), "cache_kept": plan.kept}
            finished = len(journal.layers)
            writer = ShardWriter(folder, parts=finished + 1 if finished else 0)
            if not finished:
                for name, rows in family.passthrough_tensors(opened.config, None).items():
                    writer.add(name, _cast(name, opened.read(rows), output_dtype))
                writer.end_part()
            elif progress is not None:
                progress("convert", finished, len(plan.ranks))
            for tensors, details, states in _converted_layers(
                opened, family, plan, recipe, refinement, sequences, journal, progress
            ):
                layer_idx = details["layer"]
                for name, rows in family.passthrough_tensors(opened.config, layer_idx).items():
                    writer.add(name, _cast(name, opened.read(rows), output_dtype))
                own_dtype = opened.tensor(f"{family.layer_prefix(layer_idx)}self_attn.o_proj.weight").dtype
                if layout == "deepseek_v3":
                    tensors = deepseek_attention(tensors, query_factor(own, planned))
                for name, tensor in tensors.items():
                    name = f"{family.layer_prefix(layer_idx)}self_attn.{name}"
                    writer.add(name, _cast(name, tensor, output_dtype or own_dtype))
                writer.end_part()
                journal.finish_layer(details, states)
            writer.finish()
            slots = [layer["rope_slots"] for layer in journal.layers]
            config: Any = target_config(opened.config, family, plan, slots, recipe.latent_norm)
            if layout == "deepseek_v3":
                config = deepseek_config(config)
            config.dtype = stored
            _write_companions(folder, config, opened, writer)
            report |= {
                "layers": journal.layers,
                **journal.spent(),
                "dtype": str(config.dtype).removeprefix("torch."),
                "versions": software_versions(),
                "machine": machine(),
                "commit": source_commit(),
                "weights_sha256": weights_sha256(folder),
            }
            if not plan.exact:
                report["slots_per_frequency"] = slots_per_frequency(
                    [layer["rope_slots"] for layer in journal.layers], family.shape(opened.config).frequencies
                )
                draw_report(folder, report)
            write_report(folder, report)
            journal.finish(report)
        else:
            report = journal.report  # an earlier run was stopped while it moved the files
    if evaluation is not None:
        # The model is written: an interruption from here on costs the figures only, which the same command adds.
        report = _add_evaluation(report, source, target, evaluation, progress)
    return report


def _unmeasured_report(target: Path) -> dict[str, Any] | None:
    """The report of a finished conversion whose perplexity was not measured, if that is what `target` holds."""
    path = target / CONVERSION_REPORT
    if not path.is_file() or not (target / "config.json").is_file() or (staging_path(target) / JOURNAL).is_file():
        return None
    report = read_json(path, "choose another target or remove it")
    return None if "evaluation" in report else report


def _check_same_conversion(target: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises `FileExistsError` where a finished conversion is not the one that is asked for."""
    wanted = json.loads(json.dumps(wanted))
    if wanted["recipe"] and wanted["recipe"]["ranks"] == "energy":  # dealt out once it has begun
        wanted["plan"]["ranks"] = found["plan"]["ranks"]
    different = [
        name
        for name in ("source", "layout", "plan", "recipe", "refinement", "calibration")
        if found.get(name) != wanted[name]
    ]
    if found.get("settings", {}).get("dtype") != wanted["settings"]["dtype"]:
        different.append("dtype")
    if found.get("weights_sha256") != weights_sha256(target):
        different.append("weights")
    if different:
        raise FileExistsError(
            f"{target} exists and is not empty: it holds a finished conversion with other settings "
            f"({', '.join(different)}). Give the same ones to measure it, choose another target or remove it."
        )


def _add_evaluation(
    report: dict[str, Any], source: str | Path, target: Path, evaluation: EvaluationText, progress: Progress | None
) -> dict[str, Any]:
    """The report of a written model with perplexities before and after, which is written too."""
    perplexities = {
        "source": source_perplexity(source, evaluation, progress),
        "converted": converted_perplexity(target, evaluation, progress),
    }
    report = report | {"evaluation": evaluation.describe() | perplexities}
    write_report(target, report)
    return report


def _plan_by_energy(
    source: Source,
    family: Family,
    plan: Plan,
    recipe: Recipe,
    sequences: torch.Tensor,
    journal: Journal,
    progress: Progress | None,
) -> Plan:
    """The plan with ranks dealt out by the energy of each layer's latent, measured on the first calibration text."""
    ranks = journal.ranks
    if ranks is None:
        count, spectra = len(plan.ranks), []
        run = SourceRun(source, family, sequences[: -(-RANK_TOKENS // sequences.shape[1])], recipe.weighting)
        for layer_idx in range(count):
            statistics = run.measure(layer_idx).statistics
            spectra.append(_layer_of(family)(source, family, layer_idx, statistics, plan, recipe)[2])
            if progress is not None:
                progress("ranks", layer_idx + 1, count)
        ranks = deal_ranks(spectra, plan.ranks[0])
        journal.note_ranks(ranks)
    return replace(plan, ranks=ranks)


def _layer_of(family: Family) -> Callable[..., tuple[dict[str, torch.Tensor], list[int], torch.Tensor]]:
    """What computes a smaller layer of the family."""
    return smaller_latent_layer if family.latent else low_rank_layer


def _converted_layers(
    source: Source,
    family: Family,
    plan: Plan,
    recipe: Recipe,
    refinement: Refinement,
    sequences: torch.Tensor,
    journal: Journal,
    progress: Progress | None,
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]]:
    """Each layer's attention tensors, what the report says of it, and the hidden states behind it, in order.

    Begins behind the layers that are in the journal.
    """
    config, count = source.config, source.config.num_hidden_layers
    if plan.exact:
        for layer_idx in range(len(journal.layers), count):
            tensors, layer_slots = exact_layer(source, family, layer_idx)
            tensors |= gate_at_identity(plan.ranks[layer_idx], config, layer_idx)
            yield tensors, {"layer": layer_idx, "rope_slots": layer_slots}, {}
            if progress is not None:
                progress("convert", layer_idx + 1, count)
        return

    measured = measured_sequences(sequences, refined=bool(refinement.steps))
    if not refinement.steps:
        refinement = Refinement(steps=0, dtype="float32")  # errors are measured, no more
    run = SourceRun(source, family, sequences, recipe.weighting, refinement.dtype, measured)
    converted = ConvertedRun(run, refinement)
    states = journal.states()
    if states:
        run.states, converted.states = states["source"], states["converted"]
    slots: list[list[int]] = [layer["rope_slots"] for layer in journal.layers]
    for layer_idx in range(len(journal.layers), count):
        stages = _layer_progress(progress, layer_idx, count, refined=bool(refinement.steps))
        rank, source_states = plan.ranks[layer_idx], run.states
        calibration = run.measure(layer_idx, stages["calibrate"])
        compute, statistics = _layer_of(family), calibration.statistics
        tensors, layer_slots, spectrum = compute(source, family, layer_idx, statistics, plan, recipe)
        tensors |= gate_at_identity(rank, config, layer_idx)
        slots.append(layer_slots)
        spectrum = spectrum.clamp_min(0)
        details = {
            "layer": layer_idx,
            "kv_lora_rank": rank,
            "rope_slots": layer_slots,
            "energy_kept": float(spectrum[:rank].sum() / spectrum.sum()),
            "energy_by_rank": energy_by_rank(spectrum),
        }
        copied = {name: source.read(rows) for name, rows in family.passthrough_tensors(config, layer_idx).items()}
        prefix = family.layer_prefix(layer_idx)
        layer_tensors = {name.removeprefix(prefix): tensor for name, tensor in copied.items()}
        layer_tensors |= {f"self_attn.{name}": tensor for name, tensor in tensors.items()}
        # Of the config only this layer is looked at, so the layers to come may have its slots.
        all_slots = slots + [layer_slots] * (count - len(slots))
        layer_config = target_config(config, family, plan, all_slots, recipe.latent_norm)
        refined, details["attention_error"] = converted.refine(
            layer_config, layer_idx, layer_tensors, source_states, calibration.outputs, stages.get("refine")
        )
        # Without refinement in fp64 as they are, so that they are rounded once.
        yield (
            refined if refinement.steps else tensors,
            details,
            {"source": run.states, "converted": converted.states},
        )


def _layer_progress(progress: Progress | None, layer_idx: int, count: int, refined: bool) -> dict[str, Any]:
    """What reports the steps inside of a layer as parts of it, by stage."""
    stages = ["calibrate", "refine"] if refined else ["calibrate"]
    if progress is None:
        return dict.fromkeys(stages)

    def report(stage: str) -> Callable[[int, int], None]:
        first = layer_idx + stages.index(stage) / len(stages)
        return lambda done, total: progress("convert", first + done / total / len(stages), count)

    return {stage: report(stage) for stage in stages}


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


def _check_exact(
    calibration: str | Path | None, calibration_tokens: int | None, refined: bool, recipe: Recipe
) -> None:
    """Refuses what exact mode has no use for: nothing asked for is ignored."""
    text = calibration is not None or calibration_tokens is not None
    given = {
        "calibration text (--calibration, --calibration-tokens)": text,
        "refinement (--refine-steps, --refine-gate)": refined,
        "choices of a recipe (--recipe, --set)": recipe != Recipe(),
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


def _wanted_shapes(model: Any) -> dict[str, torch.Size]:
    """The tensors in a model's checkpoint, by name."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    return wanted


def _write_companions(folder: Path, config: Any, source: Source, writer: ShardWriter) -> None:
    """Config, code, tokenizer and generation settings; checks that the weights are just those the model wants."""
    model = meta_model(config)
    wanted = _wanted_shapes(model)
    if wanted != writer.shapes:
        different = sorted(set(wanted.items()) ^ set(writer.shapes.items()))[:4]
        raise ValueError(f"The converted tensors are not those of the model's config; first differences: {different}.")
    own = isinstance(config, EGMLAConfig)
    if own:
        config.auto_map = dict(egmla.configuration_egmla.AUTO_MAP)
        config.architectures = ["EGMLAForCausalLM"]
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if source.generation_config is not None:
        source.generation_config.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)


def _calibration_sequences(
    source: Source, calibration: str | Path | None, tokens: int, length: int, evaluation: EvaluationText | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    if calibration is None:
        raise ValueError(
            "A smaller cache needs calibration text: pass calibration=FILE (--calibration FILE), a plain text file "
            f"of at least {MIN_SEQUENCES * length} tokens that is not your evaluation text."
        )
    path = Path(calibration)
    text = read_text(path, "Calibration", MAX_CHARACTERS_PER_TOKEN * tokens)
    tokenizer = source.needed_tokenizer("calibration")
    check_calibration_text(path, text, evaluation)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    length = min(length, source.config.max_position_embeddings)
    # Where the tokenizer puts a first token before every text, that token draws the attention: it must be measured.
    first = tokenizer("a")["input_ids"][: -len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    first = [token for token in first if token == tokenizer.bos_token_id]
    own = length - len(first)
    count = min(ids.numel(), tokens) // own
    if count < MIN_SEQUENCES:
        raise ValueError(
            f"{path.name} gives {min(ids.numel(), tokens)} calibration tokens; at least {MIN_SEQUENCES * length} are "
            f"required ({MIN_SEQUENCES} sequences of {length}), {64 * length} are recommended. Use a longer text or "
            "more calibration_tokens."
        )
    sequences = ids[: count * own].view(count, own)
    if first:
        sequences = torch.cat((torch.full((count, 1), first[0]), sequences), dim=1)
    check_token_ids(sequences, source.config)
    return sequences, {
        "file": path.name,
        "tokens_asked": tokens,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sequences": count,
        "sequence_length": length,
    }


def _command(
    label, exact, kv_lora_rank, qk_rope_head_dim, cache, calibration, recipe, refinement, evaluation, layout, dtype
) -> str:
    """The command that does this conversion again, with names in place of paths."""
    words = ["egmla", "convert", public_name(label), "TARGET", *(["--exact"] if exact else [])]
    if isinstance(kv_lora_rank, list):
        kv_lora_rank = ",".join(map(str, kv_lora_rank))
    options = {"--kv-lora-rank": kv_lora_rank, "--qk-rope-head-dim": qk_rope_head_dim, "--cache": cache}
    if calibration is not None:
        options |= {"--calibration": calibration["file"], "--calibration-tokens": calibration["tokens_asked"]}
        options["--refine-steps"] = refinement.steps
    if evaluation is not None:
        options |= {"--evaluate": evaluation.name, "--evaluation-windows": len(evaluation.windows)}
    options |= {"--layout": None if layout == "egmla" else layout, "--dtype": dtype}
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    if calibration is not None and refinement.steps:
        words += refinement_options(refinement)
    return shlex.join(words + ([] if exact else recipe_options(recipe)))


def _parse_dtype(dtype: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(known)}, or left out for the source's own.")
    return None if dtype is None else known[dtype]


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
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
