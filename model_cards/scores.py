"""Scores in a checkpoint's folder: lm-eval's JSON, without private data and without what no reader needs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egmla import EGMLAConfig
from egmla.evaluation.compare import Comparison, ModelScores, Score


SCORES_FOLDER = "evaluation"
ROUTER_BIAS = ".e_score_correction_bias"  # the buffer of DeepSeek's routers
RESULTS, SOURCE_RESULTS, COMPARISON, PLOT = "results.json", "source_results.json", "comparison.json", "scores.png"
# Keys of lm-eval's results that are published. The others describe the machine and its folders.
KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "date",
    "transformers_version",
    "lm_eval_version",
    "max_length",
    "fewshot_as_multiturn",
    "chat_template_sha",
    "system_instruction_sha",
)
KEPT_OF_CONFIG = (
    "model",
    "model_num_parameters",
    "model_dtype",
    "batch_size",
    "limit",
    "bootstrap_iters",
    "random_seed",
    "numpy_seed",
    "torch_seed",
    "fewshot_seed",
)
KEPT_OF_TASKS = ("dataset_path", "dataset_name", "validation_split", "test_split", "num_fewshot")
# Arguments of lm-eval's `hf` model that change results and are not private. Others are named without their value.
MODEL_ARGS = (
    "dtype",
    "max_length",
    "add_bos_token",
    "prefix_token_id",
    "softmax_dtype",
    "mixed_precision_dtype",
    "revision",
    "use_fast_tokenizer",
    "trust_remote_code",
    "attn_implementation",
)
SETTINGS = ("limit", "num_fewshot", "batch_size", "apply_chat_template", "fewshot_as_multiturn", "bootstrap_iters")
VERSIONS = ("egmla", "lm_eval", "torch", "transformers")


def read_scores(folder: Path, path: Path) -> dict[str, dict[str, Any]]:
    """Read the scores of a checkpoint as they are published: file name to JSON content.

    Args:
        folder (`Path`): the checkpoint.
        path (`Path`): results of lm-eval (`egmla eval --output`, `lm_eval --output_path`), or the output of `egmla
            compare`, from which this checkpoint and the source are taken; a file or its folder.

    Raises:
        FileNotFoundError: when the file does not exist.
        ValueError: when it holds no scores, or scores of another model.
    """
    for file in _candidates(folder, path):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no valid JSON ({error}).") from error
        if not isinstance(content, dict) or not ({"results", "config"} <= set(content) or content.get("models")):
            raise ValueError(
                f"{file} holds no scores: give a JSON file of `egmla eval --output` or lm_eval, or the output folder "
                "of `egmla compare`."
            )
        if "models" in content:
            return _from_comparison(folder, content, file)
        if path.is_dir() and not _same(folder, _arguments(content).get("pretrained", "")):
            continue  # lm_eval keeps the results of several models below one folder
        _check_model(folder, _arguments(content).get("pretrained", ""), content, file)
        return {RESULTS: public_results(content, folder.resolve().name)}
    raise ValueError(f"No results below {path} are of {folder}.")


def _candidates(folder: Path, path: Path) -> list[Path]:
    """List the files to read, newest results first."""
    if path.resolve().is_relative_to((folder / SCORES_FOLDER).resolve()):
        raise ValueError(f"{path} is what an earlier card took along already; leave --scores out to use it again.")
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}; give the JSON of `egmla eval --output`, or a folder.")
        return [path]
    if (path / "comparison.json").is_file():
        return [path / "comparison.json"]
    found = sorted(path.rglob("results_*.json"), key=lambda file: file.name, reverse=True)
    if not found:
        raise FileNotFoundError(f"{path} holds no scores: neither comparison.json nor lm-eval's results_*.json.")
    return found


def _from_comparison(folder: Path, content: Mapping[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    source, *others = content["models"]
    own = [model for model in others if Path(model["path"]).resolve() == folder.resolve()]
    own = own or [model for model in others if _same(folder, model["path"])]
    if len(own) != 1:
        names = ", ".join(str(model["path"]) for model in others)
        what = "has no scores of" if not own else "has several models that could be"
        raise ValueError(f"{file} {what} {folder}; it compares {names} with {source['path']}.")
    (model,) = own
    _check_model(folder, model["path"], model["results"], file)
    elements = EGMLAConfig.from_pretrained(folder).cache_elements_per_token
    if model["cache_elements_per_token"] != elements:
        raise ValueError(
            f"{file} is of a model that cached {model['cache_elements_per_token']} elements per token, and {folder} "
            f"caches {elements}: compare them again."
        )
    labels = {source["name"]: "source", model["name"]: "this model"}
    return {
        RESULTS: public_results(model["results"], folder.resolve().name),
        SOURCE_RESULTS: public_results(source["results"], _public_name(source["path"])),
        COMPARISON: {
            "models": [
                {
                    "name": labels[entry["name"]],
                    "cache_elements_per_token": entry["cache_elements_per_token"],
                    "cache_bytes_per_token": entry["cache_bytes_per_token"],
                }
                for entry in (source, model)
            ],
            "scores": [
                {**score, "model": labels[score["model"]]} for score in content["scores"] if score["model"] in labels
            ],
            "settings": public_settings(content["settings"]),
        },
    }


def comparison_to_plot(content: Mapping[str, Any]) -> Comparison:
    """Convert a published comparison for `plot_scores`."""
    models = [ModelScores(path="", results={}, **model) for model in content["models"]]
    return Comparison(models, [Score(**score) for score in content["scores"]], {})


def _arguments(results: Mapping[str, Any]) -> dict[str, Any]:
    arguments = results["config"].get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(pair.split("=", 1) for pair in arguments.split(",") if "=" in pair)
    return dict(arguments)


def _check_model(folder: Path, model: str, results: Mapping[str, Any], file: Path) -> None:
    if not _same(folder, model):
        raise ValueError(f"{file} holds the scores of {model or 'a model without a name'}, not of {folder}.")
    scored, own = results["config"].get("model_num_parameters"), _count_parameters(folder)
    if scored is not None and own is not None and scored != own:
        raise ValueError(f"{file} holds the scores of a model with {scored:,} parameters, and {folder} has {own:,}.")


def _same(folder: Path, model: str) -> bool:
    """Whether scores of `model` are of this checkpoint: by path, or by name if they are from another machine."""
    if not model or Path(model).exists():
        return bool(model) and Path(model).resolve() == folder.resolve()
    return Path(model).name == folder.resolve().name


def _count_parameters(folder: Path) -> int | None:
    """Count the parameters in the weight files as lm-eval does, without buffers; None without weights."""
    from math import prod

    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(ROUTER_BIAS)]  # noqa: SIM118
            total += sum(prod(file.get_slice(name).get_shape()) for name in names)
    return total if files else None


def _public_name(model: str) -> str:
    """A Hub id unchanged; of a local path the last part."""
    is_id = model.count("/") <= 1 and not model.startswith((".", "/", "~")) and "\\" not in model
    return model if is_id and not Path(model).exists() else Path(model.replace("\\", "/")).resolve().name


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run that are published; `other` names the ones whose values are not."""
    arguments = settings.get("model_args") or {}
    known = {*SETTINGS, *VERSIONS, "model_args"}
    other = {key for key, value in settings.items() if key not in known and value is not None}
    other |= {f"model_args.{key}" for key in arguments if key not in (*MODEL_ARGS, "pretrained")}
    return {
        **{key: settings[key] for key in (*SETTINGS, *VERSIONS) if settings.get(key) is not None},
        "model_args": {key: arguments[key] for key in MODEL_ARGS if key in arguments},
        "other": sorted(other),
    }


def public_results(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """lm-eval's results with the model's public name, and file names in place of paths."""
    config = {key: results["config"][key] for key in KEPT_OF_CONFIG if key in results["config"]}
    arguments = _arguments(results)
    config["model_args"] = {"pretrained": name} | {key: arguments[key] for key in MODEL_ARGS if key in arguments}
    tasks = {}
    for task, entry in results.get("configs", {}).items():
        tasks[task] = {key: entry[key] for key in KEPT_OF_TASKS if entry.get(key) is not None}
        if local := (entry.get("metadata") or {}).get("local_files"):
            tasks[task]["local_files"] = {split: Path(file).name for split, file in local.items()}
    public = {key: results[key] for key in KEPT if results.get(key) is not None}
    if "settings" in results:
        public["settings"] = public_settings(results["settings"])
    return public | {"configs": tasks, "config": config}
