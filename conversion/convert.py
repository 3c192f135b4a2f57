"""Converting a checkpoint into EG-MLA: check and plan, convert layer by layer, write a folder atomically."""

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save

import egmla
from egmla import EGMLAConfig
from egmla.utils.files import read_json
from egmla.utils.folders import JOURNAL, check_space, check_target, staged_folder, staging_path
from egmla.utils.models import meta_model
from egmla.utils.provenance import CONVERSION_REPORT, machine, software_versions, source_commit, weights_sha256

from .bits import spend_bits
from .job import Job, dry_report, planned_report, prepare, report_plan, wanted_shapes
from .journal import Journal, check_unfinished
from .layer_loop import allocate_ranks, converted_layers
from .report import (
    Progress,
    converted_perplexity,
    draw_report,
    slots_per_frequency,
    source_perplexity,
    through_caches,
    write_report,
)
from .settings import ConversionSettings, check_settings, find_settings
from .shards import ShardWriter
from .source import Source
from .texts import EvaluationText


EVALUATED_CACHES = 2  # of the sizes that a cache with bits can be used at, the largest: each takes a run


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    settings: ConversionSettings | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert a checkpoint of a supported family (`families/registry.py`) into an EG-MLA checkpoint.

    The gate of the result is at identity, unless the refinement trains it or the source's is trained.

    Args:
        source (`str` or `Path`): a local folder with safetensors, a Hub id, or a GGUF file.
        target (`str` or `Path`): a new or empty folder.
        settings (`ConversionSettings`, *optional*): what to do.
        progress (*optional*): called with (stage, done, total).
        **options: single settings by name, such as `exact=True` or `cache=0.5`; they win over `settings`. See
            `ConversionSettings` for all of them.

    Returns:
        `dict`: the conversion report (also written as `conversion_report.json`), or with `dry_run` its plan part. Its
            `seconds` and `peak_bytes` cover all `runs` of a conversion that was interrupted.

    Raises:
        ValueError, TypeError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
        OSError: when the disk has no room for the work, or the target cannot be written. Only what `resume` needs
            stays there.
    """
    started = time.time()
    checked = check_settings(find_settings(settings, options))
    target = Path(target).resolve()
    measures_only = checked.resume and checked.evaluate is not None and not checked.dry_run
    unmeasured = _unmeasured_report(target) if measures_only else None
    if unmeasured is None:
        check_target(target, checked.resume)
    job = prepare(source, checked)
    if unmeasured is None:
        check_space(target, job.room.needed_bytes)
    if job.source.tokenizer is None:
        warnings.warn(
            f"{source} has no tokenizer that can be read ({job.source.without_tokenizer}); the converted model will "
            "have none.",
            stacklevel=2,
        )
    if checked.dry_run:
        return dry_report(job)
    report = planned_report(job)
    if unmeasured is not None:
        check_same_conversion(target, unmeasured, report)
        report = unmeasured | {"command": report["command"]}
    else:
        report = _write(job, target, report, started, progress)
    if job.evaluation is not None:
        # The model is written: an interruption from here on costs the figures only, which the same command adds.
        report = _add_evaluation(report, source, target, job.evaluation, progress, checked.device)
    return report


def _write(
    job: Job, target: Path, report: dict[str, Any], started: float, progress: Progress | None
) -> dict[str, Any]:
    """Convert into the target, starting after what an interrupted run finished, and return the whole report."""
    resume = job.settings.resume
    identity = _journal_settings(job, report)
    if resume:
        check_unfinished(target, identity)
    with staged_folder(target, keep=True) as folder, torch.no_grad():
        journal = Journal(folder, identity, resume, started)
        if journal.report is not None:
            return journal.report  # an earlier run was stopped while it moved the files
        if job.recipe.ranks == "energy" and not job.plan.exact:
            job.plan = allocate_ranks(job, journal, progress)
            report["plan"] = report_plan(job.plan)
        writer = _write_layers(job, folder, journal, progress)
        config = job.final_config(journal.layers)
        _write_companions(folder, config, job.source, writer)
        if job.settings.allocates_bits:
            report["cache"] = spend_bits(
                folder,
                job.sequences,
                job.budget,
                keeps_channels=job.keeps_layers,
                device=job.settings.device,
                progress=progress,
            )
        report |= {
            "layers": journal.layers,
            **journal.spent(),
            "dtype": str(job.stored_dtype).removeprefix("torch."),
            "versions": software_versions(),
            "machine": _machine(job.settings),
            "commit": source_commit(),
            "weights_sha256": weights_sha256(folder),
        }
        if not job.plan.exact and not job.keeps_layers:
            report["slots_per_frequency"] = slots_per_frequency(
                [layer["rope_slots"] for layer in journal.layers], job.family.shape(job.source.config).frequencies
            )
            draw_report(folder, report)
        write_report(folder, report)
        journal.finish(report)
    return report


def _machine(settings: ConversionSettings) -> dict[str, Any]:
    """Return what changes rounding, with the kind of device that was chosen."""
    return machine() | ({} if settings.device is None else {"device": settings.device.partition(":")[0]})


def _journal_settings(job: Job, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the result depends on, in types that JSON keeps."""
    settings = {
        "source": job.source.fingerprint(),
        **{name: report[name] for name in ("layout", "plan", "recipe", "refinement", "calibration")},
        **({"bits": report["bits"]} if "bits" in report else {}),
        "dtype": job.settings.dtype,
        "versions": software_versions(),
        # Training amplifies differences in the order of sums, which depends on the machine.
        "machine": None if job.plan.exact else _machine(job.settings),
    }
    return json.loads(json.dumps(settings))


def _write_layers(job: Job, folder: Path, journal: Journal, progress: Progress | None) -> ShardWriter:
    """Write all tensors; a layer is finished when the journal says so."""
    finished = len(journal.layers)
    writer = ShardWriter(folder, parts=finished + 1 if finished else 0)
    if not finished:
        writer.add_part(job.passthrough_tensors(None))
    elif progress is not None:
        progress("convert", finished, len(job.plan.ranks))
    for tensors, details, states in converted_layers(job, journal, progress):
        layer_idx = details["layer"]
        writer.add_part(job.passthrough_tensors(layer_idx) | job.attention_tensors(layer_idx, tensors))
        journal.finish_layer(details, states)
    writer.finish()
    return writer


def finished_report(target: Path) -> dict[str, Any] | None:
    """Return the report of a finished conversion, `None` where `target` holds none."""
    path = target / CONVERSION_REPORT
    if not path.is_file() or not (target / "config.json").is_file() or (staging_path(target) / JOURNAL).is_file():
        return None
    return read_json(path, "choose another target or remove it")


def _unmeasured_report(target: Path) -> dict[str, Any] | None:
    """Return the report of a finished conversion whose perplexity was not measured, if `target` holds one."""
    report = finished_report(target)
    return None if report is None or "evaluation" in report else report


def different_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name what differs between a finished conversion's report and the planned report of one that is asked for."""
    wanted = json.loads(json.dumps(wanted))
    if wanted["recipe"] and wanted["recipe"]["ranks"] == "energy":  # allocated once it has begun
        wanted["plan"]["ranks"] = found["plan"]["ranks"]
    different = [
        name
        for name in ("source", "layout", "plan", "recipe", "refinement", "calibration", "bits")
        if found.get(name) != wanted.get(name)
    ]
    if found.get("settings", {}).get("dtype") != wanted["settings"]["dtype"]:
        different.append("dtype")
    return different


def check_same_conversion(target: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `FileExistsError` where a finished conversion is not the one that is asked for."""
    different = different_settings(found, wanted)
    if found.get("weights_sha256") != weights_sha256(target):
        different.append("weights")
    if different:
        raise FileExistsError(
            f"{target} exists and is not empty: it holds a finished conversion with other settings "
            f"({', '.join(different)}). Give the same ones to measure it, choose another target or remove it."
        )


def _add_evaluation(
    report: dict[str, Any],
    source: str | Path,
    target: Path,
    evaluation: EvaluationText,
    progress: Progress | None,
    device: str | None,
) -> dict[str, Any]:
    """The report of a written model with perplexities before and after, which is written too."""
    report = report | {"evaluation": measured(report, source, target, evaluation, progress, device)}
    write_report(target, report)
    return report


def measured(
    report: Mapping[str, Any],
    source: str | Path,
    folder: Path,
    evaluation: EvaluationText,
    progress: Progress | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure a converted model, which may have been healed since, beside its source: through its caches with bits.

    Args:
        report (`Mapping`): its conversion report.
        source (`str` or `Path`): the checkpoint that was converted.
        folder (`Path`): the model.
        evaluation (`EvaluationText`): the text.
        progress (*optional*): called with (stage, done, total).
        device (`str`, *optional*): the CPU by default.

    Returns:
        `dict`: what the text is, and the figures.
    """
    if "cache" in report:
        shares = [budget["share"] for budget in report["cache"]["budgets"]]
        figures = through_caches(source, folder, evaluation, shares[:EVALUATED_CACHES], progress, device)
    else:
        figures = {
            "source": source_perplexity(source, evaluation, progress, device),
            "converted": converted_perplexity(folder, evaluation, progress, device),
        }
    return evaluation.describe() | figures


def _write_companions(folder: Path, config: Any, source: Source, writer: ShardWriter) -> None:
    """Config, code, tokenizer and generation settings; checks that the weights are just those the model wants."""
    model = meta_model(config)
    wanted = wanted_shapes(model)
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
