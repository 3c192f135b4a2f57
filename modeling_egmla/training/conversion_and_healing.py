"""A conversion and its healing as one run, measured at the end; the same call resumes it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from egmla.conversion.convert import (
    check_same_conversion,
    convert_checkpoint,
    different_settings,
    finished_report,
    measured,
)
from egmla.conversion.job import Job, dry_report, planned_report, prepare
from egmla.conversion.settings import ConversionSettings, check_settings
from egmla.utils.files import read_json, write_json
from egmla.utils.progress import Progress, Say
from egmla.utils.provenance import CONVERSION_REPORT, TRAINING_REPORT

from .healing import DEFAULTS, heal_checkpoint
from .run import check_job, open_texts, plan
from .run_folders import RunFolders
from .settings import TrainingSettings, training_arguments


# Entry of the training report: what `evaluate` says of the healed model.
MEASURED = "measured"


def convert_and_heal(
    source: str | Path,
    target: str | Path,
    conversion: ConversionSettings,
    healing: TrainingSettings,
    *,
    progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint, train it towards its source, and measure it on the text to evaluate on.

    The conversion stands in `TARGET.converted` until the healed model is written. Called again after an interruption,
    it resumes whichever of the three steps was interrupted.

    Args:
        source (`str` or `Path`): a local folder with safetensors, a Hub id, or a GGUF file.
        target (`str` or `Path`): a new or empty folder, or what an interrupted call has left.
        conversion (`ConversionSettings`): how to convert. Its `resume`, `dry_run` and `evaluate` hold for the whole.
        healing (`TrainingSettings`): how to heal.
        progress (*optional*): called with (stage, done, total).
        say (*optional*): called with one line of text on what is being done.

    Returns:
        `dict`: the training report, with the conversion's under `conversion`; with `dry_run` both plans.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for bad input, before any long work starts.
    """
    say = say or (lambda text: None)
    target = Path(target).resolve()
    converted = target.parent / f"{target.name}.converted"
    job = prepare(source, check_settings(conversion))
    longest = job.config.max_position_embeddings
    healing = replace(healing, sequence_length=min(healing.sequence_length, longest))
    healed = _healed_report(target, job) if conversion.resume and not conversion.dry_run else None
    if healed is None:
        RunFolders.of(target)
        plans = _plans(job, healing)
        if conversion.dry_run:
            return plans
        say(estimate_line(plans))
        if not conversion.resume:
            _remove_conversion(converted)
        if not _is_converted(converted, job):
            convert_checkpoint(source, converted, replace(conversion, evaluate=None), progress=progress)
        healed = heal_checkpoint(
            converted, target, healing, teacher=source, resume=conversion.resume, progress=progress, say=say
        )
    if job.evaluation is not None and MEASURED not in healed:
        report = read_json(target / CONVERSION_REPORT)
        healed[MEASURED] = measured(report, source, target, job.evaluation, progress, conversion.device)
        write_json(target / TRAINING_REPORT, healed, default=str)
    _remove_conversion(converted)
    return healed | {"conversion": read_json(target / CONVERSION_REPORT)}


def estimate_line(plans: dict[str, Any]) -> str:
    """Say how long both parts may take."""
    healing = plans["healing"]
    converting = plans["conversion"].get("estimate", {"seconds": 0.0})["seconds"]  # exact ones have none
    return (
        f"Converting takes roughly {converting / 60:,.0f} minutes here, healing on {healing['tokens']:,} tokens "
        f"{healing['estimated_seconds'] / 60:,.0f}."
    )


def _plans(job: Job, healing: TrainingSettings) -> dict[str, Any]:
    """Check the healing before anything is converted, and estimate both parts."""
    check_job(healing, job.config)
    open_texts(healing)
    arguments = training_arguments(healing, Path("unused.checkpoints"), DEFAULTS)
    return {"conversion": dry_report(job), "healing": plan(job.config, job.source.config, healing, arguments)}


def _remove_conversion(folder: Path) -> None:
    """Remove a finished conversion, and nothing else that may have this name."""
    if finished_report(folder) is not None:
        shutil.rmtree(folder)


def _is_converted(folder: Path, job: Job) -> bool:
    """Tell whether an interrupted call has finished this conversion; another one in its place is refused."""
    found = finished_report(folder)
    if found is not None:
        check_same_conversion(folder, found, planned_report(job))
    return found is not None


def _healed_report(target: Path, job: Job) -> dict[str, Any] | None:
    """Return the training report of a healed model that only waits to be measured, or `None`."""
    if job.evaluation is None or not (target / TRAINING_REPORT).is_file():
        return None
    report, conversion = (read_json(target / name) for name in (TRAINING_REPORT, CONVERSION_REPORT))
    return None if MEASURED in report or different_settings(conversion, planned_report(job)) else report


def healing_settings(data: list[str], tokens: int, conversion: ConversionSettings) -> TrainingSettings:
    """Return settings that suit the first tokens after a conversion: many small steps on long sequences."""
    return TrainingSettings(
        data,
        tokens,
        sequence_length=1024,
        batch_size=4,
        micro_batch_size=2,
        dtype=conversion.dtype,
        device=None if conversion.device is None else conversion.device.partition(":")[0],
    )
