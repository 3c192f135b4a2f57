"""Score several models side by side: paired differences, cache bytes, and a run that can be interrupted."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from egmla.utils.accounting import cache_elements_per_layer, cache_id_bytes
from egmla.utils.files import check_writable

from .harness import (
    check_batch_size,
    check_lm_eval,
    check_model,
    check_model_args,
    run_settings,
    scores,
    task_leaves,
    write_results,
)
from .paired import paired_stderr
from .quiet import quiet_git


# Metrics whose aggregation lm-eval's task files leave to the metric itself.
DEFAULT_AGGREGATIONS = {
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}


@dataclass
class Score:
    """The result of one model on one task.

    Attributes:
        model, task, metric, filter (`str`): what was scored.
        value (`float`): lm-eval's result.
        stderr (`float`, *optional*): lm-eval's standard error.
        questions (`int`): how many were asked.
        difference (`float`, *optional*): value minus the source's; None for the source.
        difference_stderr (`float`, *optional*): standard error of the difference over the same questions (jackknife;
            for a mean that is the usual one); None where the questions' values are not known.
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
    """One model of a comparison.

    Attributes:
        name, path (`str`): its label and where it was loaded from.
        cache_elements_per_token (`int`): over all layers, counted in the cache of a forward pass.
        cache_bytes_per_token (`int`): the same in bytes, in the model's dtype.
        results (`dict`): its results, in lm-eval's format.
    """

    name: str
    path: str
    cache_elements_per_token: int
    cache_bytes_per_token: int
    results: dict[str, Any] = field(repr=False)


@dataclass
class Comparison:
    """Result of `compare_scores`: the models in the order given, the source first, and their scores."""

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
    resume: bool = True,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Score models on the same questions, and compare each with the first one, the source.

    Each model's result on each task is saved in `output` at once. The same call resumes an interrupted run. A model
    whose files have changed is scored again.

    Args:
        models (`Sequence[str]`): folders or hub ids, the source first.
        tasks (`Sequence[str]`): as in `evaluate`; the groups of this package are run task by task.
        output (`str`): folder for `comparison.json`, one file in lm-eval's format per model, and the finished parts.
        resume (`bool`): take the parts that an interrupted run finished; otherwise all are scored again.
        say (*optional*): called with a line of text at each step.
        limit, num_fewshot, batch_size, model_args, data_dir, include_path, **settings: as in `evaluate`.

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
        parts = {task: _load_part(_part_file(output, name, task), key) if resume else None for task in wanted}
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
                # Read it back as a resumed run does: tuples become lists, numbers are Python's.
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
    return f"{found}_model" if found == "comparison" else found  # the comparison's own file has that name


def _part_file(output: Path, model: str, task: str) -> Path:
    return output / "parts" / _file_name(model) / f"{_file_name(task)}.json"


def _fingerprint(path: str | os.PathLike | None) -> Any:
    """List names, sizes and times of a folder's files, to notice a change without reading weights.

    Cards, reports and plots change no score, so they are not listed.
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
    """Score one model on one task: results in lm-eval's format, and each question's values."""
    from lm_eval import simple_evaluate

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
    """Return the task, or the tasks of a tag, file or group that has no result of its own."""
    if scores(results, [task]):
        return [task]
    return [name for name in results["results"] if scores(results, [name])]


def _summary(results: Mapping[str, Any], task: str) -> str:
    rows = scores(results, _with_figures(results, task))
    return ", ".join(f"{row['metric']} {with_error(row['value'], row['stderr'])}" for row in rows) or "no result"


def _merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge results of single tasks into lm-eval's results of one run."""
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


def metric_name(metric: str, filter: str) -> str:
    """Name a metric for people, with its filter if it has one: exact_match (strict-match)."""
    return metric if filter == "none" else f"{metric} ({filter})"


def with_error(value: float, stderr: float | None) -> str:
    """Format a result for people: 0.655 ± 0.034."""
    digits = 3 if abs(value) < 10 else 2
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")
