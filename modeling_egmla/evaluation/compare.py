"""Scores of several models side by side: paired differences, cache bytes, and a run that can be interrupted."""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from egmla.utils.files import check_writable

from .harness import (
    check_batch_size,
    check_lm_eval,
    check_model,
    check_model_args,
    quiet_git,
    run_settings,
    scores,
    task_leaves,
    write_results,
)


# How lm-eval makes a figure of the mean of its questions' values, for aggregations where that is all there is to it.
OF_THE_MEAN: dict[str, Callable[[float], float]] = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: math.exp(-mean),
    "weighted_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
# The metrics whose aggregation lm-eval's task files leave to the metric itself.
DEFAULT_AGGREGATIONS = {
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}


@dataclass
class Score:
    """One model's figure on one task.

    Attributes:
        model, task, metric, filter (`str`): what it is of.
        value (`float`): lm-eval's figure.
        stderr (`float`, *optional*): lm-eval's standard error.
        questions (`int`): how many it rests on.
        difference (`float`, *optional*): value minus the source's; None for the source.
        difference_stderr (`float`, *optional*): standard error of the difference over the same questions (jackknife,
            which for a mean is the usual one); None where the questions' values are not known.
    """

    model: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    questions: int
    difference: float | None = None
    difference_stderr: float | None = None


@dataclass
class ModelScores:
    """A model of the comparison.

    Attributes:
        name, path (`str`): its label and where it was loaded from.
        cache_elements_per_token (`int`): over all layers, counted in the cache of a forward pass.
        cache_bytes_per_token (`int`): the same in bytes of the model's number format.
        results (`dict`): its results, in lm-eval's format.
    """

    name: str
    path: str
    cache_elements_per_token: int
    cache_bytes_per_token: int
    results: dict[str, Any] = field(repr=False)


@dataclass
class Comparison:
    """What `compare_scores` found: models in the order given, the source first, and their scores."""

    models: list[ModelScores]
    scores: list[Score]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_scores(
    models: Sequence[str],
    tasks: Sequence[str],
    output: str | os.PathLike,
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    model_args: Mapping[str, Any] | None = None,
    data_dir: str | os.PathLike | None = None,
    include_path: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Scores models on the same questions; the first is the one the others are compared with.

    Each model's result on a task is saved in `output` as soon as there is one. A run with the same settings takes
    up what an interrupted one left; a model whose files changed since is scored again.

    Args:
        models (`Sequence[str]`): folders or hub ids, the source first.
        tasks (`Sequence[str]`): as of `evaluate`; the groups of this package are run task by task.
        output (`str`): folder for `comparison.json`, one file in lm-eval's format per model, and the finished parts.
        say (*optional*): called with a line of text at each step.
        limit, num_fewshot, batch_size, model_args, data_dir, include_path, **settings: as of `evaluate`.

    Returns:
        `Comparison`: also written to `comparison.json`.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `evaluate`, before any model is loaded.
    """
    check_lm_eval()
    check_batch_size(batch_size)
    names = _labels(models)
    check_model_args(model_args)
    arguments = dict(model_args or {})
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, and a comparison writes a folder; give another output.")
    check_writable(output)
    for model in models:
        check_model(model, arguments.get("tokenizer"))
    from .local_tasks import GROUPS, EGMLATaskManager

    manager = EGMLATaskManager(data_dir, include_path, settings.get("metadata"))
    wanted = list(dict.fromkeys(name for task in manager.match(tasks) for name in GROUPS.get(task, (task,))))
    manager.prepare(wanted, num_fewshot)

    common = run_settings(limit, num_fewshot, batch_size, arguments, include_path, settings)
    folders = [include_path] if isinstance(include_path, (str, os.PathLike)) else list(include_path or ())
    inputs = {"data": _fingerprint(data_dir), "tasks": [_fingerprint(folder) for folder in folders]}
    total, found = len(models) * len(wanted), 0
    compared: list[ModelScores] = []
    questions: dict[str, dict[str, Any]] = {}
    reported: dict[str, None] = {}
    for name, model in zip(names, models, strict=True):
        key = _key({**common, **inputs, "model": _fingerprint(model)})
        parts = {task: _load_part(_part_file(output, name, task), key) for task in wanted}
        loaded = None
        for task, part in parts.items():
            found += 1
            if part is None:
                if loaded is None:
                    if say is not None:
                        say(f"Loading {name}")
                    loaded = _load(model, arguments, batch_size, settings.get("device"))
                start = time.perf_counter()
                part = _run(loaded, model, arguments, task, manager, limit, num_fewshot, batch_size, settings)
                part = {"key": key, "seconds": round(time.perf_counter() - start, 1), **part}
                write_results(_part_file(output, name, task), part)
                # As a resumed run reads it: tuples are lists, numbers are Python's.
                parts[task] = part = json.loads(_part_file(output, name, task).read_text(encoding="utf-8"))
                how = f"{part['seconds']} s"
            else:
                how = "from an earlier run"
            if say is not None:
                say(f"[{found}/{total}] {name}, {task}: {_summary(part['results'], task)} ({how})")
        done = [part for part in parts.values() if part is not None]
        for task, part in parts.items():
            if part is not None:
                reported |= dict.fromkeys(_with_figures(part["results"], task))
        compared.append(
            ModelScores(
                name,
                model,
                done[0]["cache_elements_per_token"],
                done[0]["cache_bytes_per_token"],
                _merge([part["results"] for part in done]),
            )
        )
        questions[name] = {leaf: values for part in done for leaf, values in part["questions"].items()}
        write_results(output / f"{_file_name(name)}.json", compared[-1].results)

    result = Comparison(compared, _all_scores(compared, list(reported), questions), common)
    write_results(output / "comparison.json", result.to_dict())
    return result


def _labels(models: Sequence[str]) -> list[str]:
    if len(models) < 2:
        raise ValueError(f"{len(models)} model was given: a comparison needs the source and one model or more.")
    names = [Path(model).name if Path(model).is_dir() else model for model in models]
    if len(set(names)) < len(names):
        names = [str(Path(model)) for model in models]
    if len({_file_name(name) for name in names}) < len(names):
        raise ValueError(f"The same model twice among {', '.join(models)}; give each once.")
    return names


def _file_name(name: str) -> str:
    found = re.sub(r"[^\w.+-]+", "_", name).strip("._") or "model"
    return f"{found}_model" if found == "comparison" else found  # not the name of the comparison's own file


def _part_file(output: Path, model: str, task: str) -> Path:
    return output / "parts" / _file_name(model) / f"{_file_name(task)}.json"


def _fingerprint(path: str | os.PathLike | None) -> Any:
    """Names, sizes and times of a folder's files: enough to notice a change without reading weights.

    Cards, reports and figures change no score.
    """
    if path is None or not Path(path).is_dir():
        return None if path is None else str(path)
    ignored = {".md", ".png"}
    files = sorted(
        file
        for file in Path(path).iterdir()
        if file.is_file() and file.suffix not in ignored and not file.name.endswith("_report.json")
    )
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _load_part(path: Path, key: str) -> dict[str, Any] | None:
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return part if part.get("key") == key else None


def _load(model: str, arguments: Mapping[str, Any], batch_size: int | str, device: str | None):
    from .lm_eval import EGMLAHarnessModel

    extra = {"batch_size": batch_size, "device": device}
    return EGMLAHarnessModel.create_from_arg_obj({"pretrained": model, **arguments}, extra)


def _run(loaded, model, arguments, task, manager, limit, num_fewshot, batch_size, settings) -> dict[str, Any]:
    """One model on one task: results in lm-eval's format, and each question's values."""
    from lm_eval import simple_evaluate

    from egmla.utils.accounting import cache_elements_per_layer, cache_id_bytes

    with quiet_git():
        results: Any = simple_evaluate(
            model=loaded,
            tasks=[task],
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            task_manager=manager,
            **{**settings, "log_samples": True},
        )
    results["config"].update(model="egmla", model_args={"pretrained": model, **arguments})
    questions = {}
    for leaf, samples in results.pop("samples").items():
        aggregations = {
            item["metric"]: item.get("aggregation") or DEFAULT_AGGREGATIONS.get(item["metric"], "mean")
            for item in results["configs"][leaf].get("metric_list") or ()
        }
        values: dict[str, dict[str, Any]] = {}
        for sample in samples:
            for metric in sample["metrics"]:
                kept = values.setdefault(
                    f"{metric},{sample['filter']}",
                    {"aggregation": str(aggregations.get(metric, "mean")), "values": {}},
                )
                kept["values"][f"{sample['doc_id']} {sample['doc_hash']}"] = sample[metric]
        questions[leaf] = values
    elements = sum(cache_elements_per_layer(loaded.model))
    return {
        "cache_elements_per_token": elements,
        "cache_bytes_per_token": elements * loaded.model.dtype.itemsize + cache_id_bytes(loaded.model.config),
        "results": results,
        "questions": questions,
    }


def _with_figures(results: Mapping[str, Any], task: str) -> list[str]:
    """The task itself, or the tasks behind a tag, file or group that has no figure of its own."""
    if scores(results, [task]):
        return [task]
    return [name for name in results["results"] if scores(results, [name])]


def _summary(results: Mapping[str, Any], task: str) -> str:
    rows = scores(results, _with_figures(results, task))
    return ", ".join(f"{row['metric']} {with_error(row['value'], row['stderr'])}" for row in rows) or "no figure"


def _merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of single tasks as lm-eval's results of one run."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict) and key != "config":
                merged.setdefault(key, {}).update(value)
            else:
                merged.setdefault(key, value)
    return merged


def _all_scores(
    models: Sequence[ModelScores], tasks: Sequence[str], questions: Mapping[str, Mapping[str, Any]]
) -> list[Score]:
    source = {(row["task"], row["metric"], row["filter"]): row for row in scores(models[0].results, tasks)}
    rows = []
    for model in models:
        for row in scores(model.results, tasks):
            score = Score(model=model.name, **row)
            reference = source.get((score.task, score.metric, score.filter))
            if model is not models[0] and reference is not None:
                score.difference = score.value - reference["value"]
                key = f"{score.metric},{score.filter}"
                leaves = task_leaves(model.results, score.task)
                score.difference_stderr = paired_stderr(
                    [questions[model.name].get(leaf, {}).get(key) for leaf in leaves],
                    [questions[models[0].name].get(leaf, {}).get(key) for leaf in leaves],
                )
            rows.append(score)
    return rows


def paired_stderr(
    first: Sequence[Mapping[str, Any] | None], second: Sequence[Mapping[str, Any] | None]
) -> float | None:
    """Standard error of the difference of two figures over the same questions, by the jackknife.

    Args:
        first, second (`Sequence[Mapping]`): of each task, `aggregation` and `values`: by question, a number or a
            pair of number and weight.

    Returns:
        `float` or None: None when the questions differ or are fewer than two, or the figure is no function of their
        mean.
    """
    pairs: list[tuple[Any, Any]] = []
    kinds = set()
    for one, other in zip(first, second, strict=True):
        if one is None or other is None or one["values"].keys() != other["values"].keys():
            return None
        kinds |= {one["aggregation"], other["aggregation"]}
        pairs += [(value, other["values"][question]) for question, value in one["values"].items()]
    if len(kinds) != 1 or len(pairs) < 2 or (of_the_mean := OF_THE_MEAN.get(kinds.pop())) is None:
        return None
    try:
        columns = [[_weighted(pair[index]) for pair in pairs] for index in (0, 1)]
    except (TypeError, ValueError):
        return None
    without = []
    for column in columns:
        total, weight = sum(value for value, _ in column), sum(weight for _, weight in column)
        without.append([of_the_mean((total - value) / (weight - own)) for value, own in column])
    differences = [one - other for one, other in zip(*without, strict=True)]
    mean = sum(differences) / len(differences)
    count = len(differences)
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in differences))


def _weighted(value: Any) -> tuple[float, float]:
    if isinstance(value, (list, tuple)):
        number, weight = value
        return float(number), float(weight)
    return float(value), 1.0


def metric_name(metric: str, filter: str) -> str:
    """A metric for people, with its filter where one was used: exact_match (strict-match)."""
    return metric if filter == "none" else f"{metric} ({filter})"


def with_error(value: float, stderr: float | None) -> str:
    """A figure for people: 0.655 ± 0.034."""
    digits = 3 if abs(value) < 10 else 2
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


def plot_scores(comparison: Comparison, path: str | os.PathLike) -> None:
    """Draws score against cache bytes per token, a panel per task and metric, with standard errors; saves a PNG.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    from egmla.utils.plotting import COLOURS, check_matplotlib

    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Score]] = {}
    for score in comparison.scores:
        panels.setdefault(f"{score.task}, {metric_name(score.metric, score.filter)}", []).append(score)
    if not panels:
        raise ValueError("None of the tasks has a figure, so there is nothing to draw.")
    cache = {model.name: model.cache_bytes_per_token / 1024 for model in comparison.models}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (heading, points) in zip(axes, panels.items(), strict=False):
        for index, model in enumerate(comparison.models):
            for score in (point for point in points if point.model == model.name):
                axis.errorbar(
                    cache[model.name],
                    score.value,
                    yerr=score.stderr,
                    fmt="s" if index == 0 else "o",
                    color=COLOURS[index % len(COLOURS)],
                    capsize=4,
                    markersize=8,
                    label=model.name,
                )
        axis.set_title(heading, fontsize=11, fontweight="bold", loc="left")
        axis.set_xlim(0, 1.1 * max(cache.values()))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False, fontsize=10)
    figure.supxlabel("cache, KiB per token (bars: standard error)", fontsize=10)
    figure.savefig(path, dpi=160)
