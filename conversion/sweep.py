"""Several sizes and recipes of one source, each converted and measured, and which of them no other one beats."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from egmla.utils.files import read_json, write_json
from egmla.utils.plotting import COLOURS, check_matplotlib
from egmla.utils.progress import Progress, with_name
from egmla.utils.provenance import CONVERSION_REPORT, public_name, software_versions, source_commit

from .convert import convert_checkpoint
from .job import calibration_tokens as most_calibration_tokens
from .recipes import find_recipe
from .refinement import Refinement
from .report import converted_perplexity, source_perplexity, write_report
from .settings import RANK_ONLY
from .source import Source
from .sources import open_source
from .texts import (
    MAX_CHARACTERS_PER_TOKEN,
    EvaluationText,
    describe_texts,
    open_evaluation,
    read_text,
    text_paths,
)


SWEEP_REPORT, SWEEP_FIGURE = "sweep.json", "sweep.png"


def sweep(
    source: str | Path,
    target: str | Path,
    caches: Sequence[float],
    *,
    calibration: str | Path | Sequence[str | Path],
    evaluate: str | Path,
    recipes: Sequence[str] = ("default",),
    choices: Mapping[str, Any] | None = None,
    calibration_tokens: int | None = None,
    refinement: Refinement | None = None,
    evaluation_windows: int = 9,
    resume: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Converts a source at each size by each recipe and measures all of them on one text.

    The same call resumes an interrupted sweep: models that it finished with the same settings are not made again.

    Args:
        source (`str` or `Path`): as of `convert_checkpoint`.
        target (`str` or `Path`): folder for the models, `sweep.json` and `sweep.png`.
        caches (`Sequence[float]`): shares of the source's cache to keep.
        calibration (`str`, `Path` or a sequence of them): plain texts to calibrate on, as of `convert_checkpoint`.
        evaluate (`str` or `Path`): plain text to measure on.
        recipes (`Sequence[str]`): names in `RECIPES`.
        choices (`Mapping`, *optional*): choices changed in each recipe.
        calibration_tokens, refinement, evaluation_windows: as of `convert_checkpoint`.
        resume (`bool`): resume; otherwise a sweep in the folder is replaced, with its models of the same sizes and
            recipes.
        progress (*optional*): called with (stage, done, total).
        **options: further arguments of `convert_checkpoint`, the same for all.

    Returns:
        `dict`: what `sweep.json` holds: settings, the source's figures, a row per model.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, ImportError: for bad input, before any long work starts.
    """
    check_matplotlib()
    target = Path(target).resolve()
    if not caches or not recipes:
        raise ValueError(
            "A sweep needs at least one size and one recipe, such as caches=[0.5, 0.25] (--cache 0.5,0.25)."
        )
    settings, evaluation = _settings_and_evaluation(
        source, calibration, evaluate, choices, calibration_tokens, refinement, evaluation_windows, options
    )
    report = start_report(target, settings, resume)
    arguments = {
        "cache_dtype": RANK_ONLY,
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "refinement": refinement,
        **options,
    }
    jobs = {
        target / f"{recipe}-{cache:g}": {"cache": cache, "recipe": find_recipe(recipe, choices), **arguments}
        for recipe in recipes
        for cache in caches
    }
    # All of them are checked before the first is made.
    pending = [folder for folder in jobs if not (resume and is_finished(folder))]
    for folder in pending:
        # A finished model is removed after the check alone, so its name is not free yet.
        checked = folder.with_name(f"{folder.name}.new") if is_finished(folder) else folder
        convert_checkpoint(source, checked, **jobs[folder], evaluate=evaluate, dry_run=True)
    target.mkdir(parents=True, exist_ok=True)
    if not resume:
        write_json(target / SWEEP_REPORT, report)  # if this run is interrupted, the next can resume it
    for folder in filter(is_finished, pending):
        shutil.rmtree(folder)
    if "perplexity" not in report["source"]:
        report["source"]["perplexity"] = source_perplexity(source, evaluation, progress, options.get("device"))
        write_json(target / SWEEP_REPORT, report)
    report["rows"] = []
    for folder, job in jobs.items():
        if folder in pending:
            convert_checkpoint(source, folder, **job, resume=resume, progress=with_name(folder.name, progress))
        made = _measured(
            folder, evaluation, report["source"]["perplexity"], with_name(folder.name, progress), options.get("device")
        )
        report["source"]["elements"] = made["plan"]["source_elements"]
        report["rows"].append(_row(folder, job["cache"], made))
        write_json(target / SWEEP_REPORT, report)
    _mark_best(report["rows"])
    write_json(target / SWEEP_REPORT, report)
    _draw(report, target / SWEEP_FIGURE)
    return report


def _settings_and_evaluation(
    source: str | Path,
    calibration: str | Path | Sequence[str | Path],
    evaluate: str | Path,
    choices: Mapping[str, Any] | None,
    calibration_tokens: int | None,
    refinement: Refinement | None,
    evaluation_windows: int,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], EvaluationText]:
    """Read source and texts. Return all that the figures depend on, as `sweep.json` keeps it, and the windows."""
    opened = open_source(source)
    evaluation = open_evaluation(evaluate, opened.needed_tokenizer("evaluation"), opened.config, evaluation_windows)
    settings = {
        **identify_source(opened),
        "calibration": describe_calibration(calibration, calibration_tokens),
        "evaluation": evaluation.describe(),
        "choices": dict(choices or {}),
        "refinement": None if refinement is None else asdict(refinement),
        "options": {name: value for name, value in options.items() if value is not None},
    }
    return settings, evaluation


def identify_source(opened: Source) -> dict[str, Any]:
    """Return what a report says of a source, and of the software: figures of others could not be compared."""
    fingerprint = json.dumps(opened.fingerprint(), sort_keys=True)
    return {
        "source": public_name(opened.label),
        # A hash: the configuration in it is long, and the report may be published.
        "source_fingerprint": hashlib.sha256(fingerprint.encode()).hexdigest(),
        "versions": software_versions(),
    }


def describe_calibration(calibration: str | Path | Sequence[str | Path], tokens: int | None) -> dict[str, Any]:
    """Return what `sweep.json` keeps of the calibration texts: their names and the hash of what may be read."""
    paths, most = text_paths(calibration), MAX_CHARACTERS_PER_TOKEN * most_calibration_tokens(tokens, refined=True)
    return {
        **describe_texts(paths, [read_text(path, "Calibration", most) for path in paths]),
        "tokens_asked": tokens,
    }


def _measured(
    folder: Path, evaluation: EvaluationText, of_source: float, progress: Progress | None, device: str | None
) -> dict[str, Any]:
    """Return a model's report. Measure its perplexity first where the report has none."""
    made = read_json(folder / CONVERSION_REPORT)
    if "evaluation" not in made:
        found = converted_perplexity(folder, evaluation, progress, device)
        made["evaluation"] = evaluation.describe() | {"source": of_source, "converted": found}
        write_report(folder, made)
    return made


def start_report(target: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return the report of an earlier run, or a new one.

    Args:
        target (`Path`): the folder of the sweep.
        settings (`dict`): all that its figures depend on.
        resume (`bool`): whether an earlier run counts.

    Raises:
        FileExistsError: when the folder holds something else.
        ValueError: when the earlier run had other settings.
    """
    path = target / SWEEP_REPORT
    if not path.is_file() and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        raise FileExistsError(f"{target} exists and holds no sweep; choose another folder or remove it.")
    if not (resume and path.is_file()):
        return {
            "settings": settings,
            "source": {"name": settings["source"]},
            "commit": source_commit(),
        }
    report = read_json(path, "remove it to measure the models in its folder again")
    settings = json.loads(json.dumps(settings))
    changed = [name for name, value in settings.items() if report["settings"].get(name) != value]
    if changed:
        raise ValueError(
            f"{target} holds a sweep with other settings ({', '.join(changed)}), and figures of both could not be "
            "compared; choose another folder or remove it."
        )
    return report


def is_finished(folder: Path) -> bool:
    """Tell whether a folder of a sweep holds a whole model."""
    return (folder / "config.json").is_file() and (folder / CONVERSION_REPORT).is_file()


def _row(folder: Path, cache: float, made: Mapping[str, Any]) -> dict[str, Any]:
    plan = made["plan"]
    return {
        "recipe": folder.name.removesuffix(f"-{cache:g}"),
        "cache": cache,
        "folder": folder.name,
        "rope_dim": plan["rope_dim"],
        "ranks": plan["ranks"],
        "elements": plan["target_elements"],
        "cache_kept": plan["cache_kept"],
        "perplexity": made["evaluation"]["converted"],
        "seconds": made["seconds"],
        "command": made["command"],
    }


def _mark_best(rows: list[dict[str, Any]]) -> None:
    """Notes for each row whether no other one is smaller and better at once (the Pareto front)."""
    for row in rows:
        size = (row["elements"], row["perplexity"])
        others = [(other["elements"], other["perplexity"]) for other in rows]
        row["best"] = not any(a <= size[0] and b <= size[1] and (a, b) != size for a, b in others)


def _draw(report: Mapping[str, Any], path: Path) -> None:
    """Perplexity against cache elements per token, a line per recipe; hollow points are beaten by another one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    source, evaluation = report["source"], report["settings"]["evaluation"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, recipe in enumerate(dict.fromkeys(row["recipe"] for row in report["rows"])):
        colour = COLOURS[(number + 1) % len(COLOURS)]
        rows = sorted((row for row in report["rows"] if row["recipe"] == recipe), key=lambda row: row["elements"])
        axis.plot(
            [row["elements"] for row in rows],
            [row["perplexity"] for row in rows],
            color=colour,
            label=recipe,
            zorder=1,
        )
        for row in rows:
            face = colour if row["best"] else "white"
            axis.scatter(row["elements"], row["perplexity"], s=50, facecolor=face, edgecolor=colour, zorder=2)
            axis.annotate(
                f"{row['perplexity']:.2f}",
                (row["elements"], row["perplexity"]),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=9,
            )
    axis.axhline(source["perplexity"], color=COLOURS[0], linestyle="--", zorder=0)
    axis.scatter(source["elements"], source["perplexity"], marker="s", color=COLOURS[0], label="source", zorder=2)
    if max(row["perplexity"] for row in report["rows"]) > 5 * source["perplexity"]:
        axis.set_yscale("log")
    axis.set_xlim(0, 1.1 * source["elements"])
    axis.set_xlabel("cache, elements per token", fontsize=10)
    axis.set_ylabel(f"perplexity, {evaluation['windows']} windows of {evaluation['file']}", fontsize=10)
    axis.set_title(source["name"], fontsize=12, fontweight="bold", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)
