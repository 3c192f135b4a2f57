"""Scores beside a checkpoint: lm-eval's JSON, without what is private or nobody repeats a figure with."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egmla.evaluation.harness import write_json


SCORES_FOLDER = "evaluation"
RESULTS, SOURCE_RESULTS, COMPARISON, PLOT = "results.json", "source_results.json", "comparison.json", "scores.png"
# What of lm-eval's results goes along; the rest describes the machine and its folders.
KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "git_hash",
    "date",
    "transformers_version",
    "lm_eval_version",
    "max_length",
)
KEPT_OF_CONFIG = (
    "model",
    "model_args",
    "model_num_parameters",
    "model_dtype",
    "batch_size",
    "limit",
    "bootstrap_iters",
    "gen_kwargs",
    "random_seed",
    "numpy_seed",
    "torch_seed",
    "fewshot_seed",
)
KEPT_OF_TASKS = ("dataset_path", "dataset_name", "validation_split", "test_split", "num_fewshot", "metadata")


def adopt_scores(folder: str | Path, scores: str | Path) -> list[Path]:
    """Copies scores of a checkpoint into its folder `evaluation`, in lm-eval's format, fit to be published.

    Args:
        folder (`str` or `Path`): the checkpoint.
        scores (`str` or `Path`): results of lm-eval (`egmla eval --output`, `lm_eval --output_path`), or the output of
            `egmla compare`, from which this checkpoint and the source are taken; a file or its folder.

    Returns:
        `list[Path]`: the files written.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds no scores, or those of another model.
    """
    folder, file = Path(folder), _scores_file(Path(scores))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}).") from error
    if not isinstance(content, dict) or not {"results", "models"} & set(content):
        raise ValueError(
            f"{file} holds no scores: give a JSON file of `egmla eval --output` or lm_eval, or the output folder of "
            "`egmla compare`."
        )
    if "models" not in content:
        _check_same(folder, _pretrained(content), file)
        written = {RESULTS: public_results(content, folder.resolve().name)}
    else:
        written = _from_comparison(folder, content, file)
    target = folder / SCORES_FOLDER
    target.mkdir(exist_ok=True)
    # What an earlier adoption left would be read as belonging to this one.
    for name in (RESULTS, SOURCE_RESULTS, COMPARISON, PLOT):
        (target / name).unlink(missing_ok=True)
    for name, json_content in written.items():
        write_json(target / name, json_content)
    files = [target / name for name in written]
    plot = file.with_name(PLOT)
    if "models" in content and plot.is_file():
        files.append(Path(shutil.copyfile(plot, target / PLOT)))
    return files


def _scores_file(path: Path) -> Path:
    if path.is_dir():
        # lm_eval makes a folder per model and a file per run.
        found = [path / "comparison.json"] if (path / "comparison.json").is_file() else []
        found = found or sorted(path.rglob("results_*.json"), key=lambda file: file.name)
        if not found:
            raise FileNotFoundError(f"{path} holds no scores: neither comparison.json nor lm-eval's results_*.json.")
        return found[-1]
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give the JSON of `egmla eval --output`, or a folder.")
    return path


def _from_comparison(folder: Path, content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    models = content["models"]
    own = [model for model in models[1:] if _same(folder, model["path"])]
    if not own:
        names = ", ".join(str(model["path"]) for model in models[1:])
        raise ValueError(f"{file} has no scores of {folder}; it compares {names} with {models[0]['path']}.")
    source, model = models[0], own[0]
    names = {source["name"]: "source", model["name"]: "model"}
    return {
        RESULTS: public_results(model["results"], folder.resolve().name),
        SOURCE_RESULTS: public_results(source["results"], _public_name(source["path"])),
        COMPARISON: {
            "models": [
                {
                    "name": names[entry["name"]],
                    "cache_elements_per_token": entry["cache_elements_per_token"],
                    "cache_bytes_per_token": entry["cache_bytes_per_token"],
                }
                for entry in (source, model)
            ],
            "scores": [
                {**score, "model": names[score["model"]]} for score in content["scores"] if score["model"] in names
            ],
            "settings": {**content["settings"], "model_args": _public(content["settings"].get("model_args", {}))},
        },
    }


def _pretrained(results: Mapping[str, Any]) -> str:
    arguments = results.get("config", {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(pair.split("=", 1) for pair in arguments.split(",") if "=" in pair)
    return str(arguments.get("pretrained", ""))


def _check_same(folder: Path, model: str, file: Path) -> None:
    if not _same(folder, model):
        raise ValueError(f"{file} holds the scores of {model or 'a model without a name'}, not of {folder}.")


def _same(folder: Path, model: str) -> bool:
    # By name as well: scores may have been taken on another machine.
    return bool(model) and (Path(model).resolve() == folder.resolve() or Path(model).name == folder.resolve().name)


def _public_name(model: str) -> str:
    """A hub id as it is, of a local path its last part."""
    return model if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not Path(model).exists() else Path(model).name


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~"))):
        return Path(value).name
    return value


def public_results(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """lm-eval's results under the model's public name, with file names in place of paths."""
    config = {key: results["config"][key] for key in KEPT_OF_CONFIG if key in results.get("config", {})}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(pair.split("=", 1) for pair in arguments.split(",") if "=" in pair)
    config["model_args"] = {**_public(arguments), "pretrained": name}
    tasks = {
        task: {key: _public(entry[key]) for key in KEPT_OF_TASKS if entry.get(key) is not None}
        for task, entry in results.get("configs", {}).items()
    }
    return {key: results[key] for key in KEPT if key in results} | {"configs": tasks, "config": config}
