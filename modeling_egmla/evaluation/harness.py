"""Score causal language models with lm-eval's own `simple_evaluate`. lm-eval is imported when it is first needed."""

import ast
import difflib
import importlib.util
import inspect
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoTokenizer

from egmla.utils.files import check_writable, write_json
from egmla.utils.models import local_folder

from .quiet import quiet_git


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
# Arguments of `simple_evaluate` that have a parameter of their own here, or that no text can express.
RESERVED = ("model", "model_args", "tasks", "task_manager", "evaluation_tracker", "limit", "num_fewshot", "batch_size")


def check_lm_eval() -> None:
    """Raise `ImportError` with the command that installs lm-eval, when it is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("Evaluation needs lm-eval, which is not installed; run: pip install 'egmla[eval]'")


def check_model(model: str, tokenizer: str | None = None) -> None:
    """Check a model's folder and tokenizer, without loading weights.

    Args:
        model (`str`): a folder or a Hub id.
        tokenizer (`str`, *optional*): folder or Hub id of the tokenizer; the model's own by default.

    Raises:
        FileNotFoundError: when the folder holds no model or no tokenizer.
        ValueError: for a GGUF file, or a tokenizer without any token that can pad a batch.
    """
    if Path(model).suffix == ".gguf":
        _refuse_gguf(Path(model))
    folder = local_folder(model)
    if folder is not None and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model} is a folder without a config.json, so it holds no model; check the path.")
    name = tokenizer or model
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{name} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...); save the source's with "
            f"AutoTokenizer.from_pretrained(SOURCE).save_pretrained({name!r}), or name one: tokenizer=FOLDER among "
            "the model arguments."
        )
    loaded = AutoTokenizer.from_pretrained(name)
    if all(getattr(loaded, token) is None for token in ("pad_token", "unk_token", "eos_token")):
        raise ValueError(
            f"The tokenizer of {name} has no pad token and no unk or eos token to stand in for it, so batches cannot "
            "be padded; set one with tokenizer.pad_token = ... and save it again."
        )


def _refuse_gguf(file: Path) -> NoReturn:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}; check the path.")
    raise ValueError(
        f"{file} is a GGUF file, and scores are taken of Transformers checkpoints. Convert it first, which keeps its "
        f"logits: egmla convert {shlex.quote(str(file))} FOLDER --exact"
    )


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Read arguments of `simple_evaluate` from texts like `bootstrap_iters=100`.

    Values are Python literals or plain text.

    Raises:
        ValueError: for a text that is no pair, or an argument that `simple_evaluate` does not have or that has an
            option of its own.
    """
    check_lm_eval()
    from lm_eval import simple_evaluate

    known = [name for name in inspect.signature(simple_evaluate).parameters if name not in RESERVED]
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"{pair!r}: a setting is written key=value, such as bootstrap_iters=1000.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise ValueError(
                f"{name!r} is no argument of simple_evaluate that can be set; there is {', '.join(near)}."
            )
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return settings


def parse_model_args(text: str | None) -> dict[str, Any]:
    """Read model arguments from lm-eval's form `key=value,key=value`.

    Raises:
        ValueError: when a part is no pair.
    """
    if not text:
        return {}
    if any("=" not in part for part in text.split(",")):
        raise ValueError(f"Model arguments {text!r}: write them as key=value,key=value, such as dtype=float32.")
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(text)


def check_model_args(arguments: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` when model arguments name a model, or a dtype that PyTorch does not have."""
    if "pretrained" in (arguments or {}):
        raise ValueError("pretrained among the model arguments: the model is given separately; leave it out there.")
    dtype = (arguments or {}).get("dtype", "auto")
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(
            f"dtype={dtype} among the model arguments: PyTorch has no such dtype; use auto, float32, bfloat16 or "
            "float16."
        )


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    model_args: Mapping[str, Any] | None = None,
    data_dir: str | os.PathLike | None = None,
    include_path: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score a model on tasks. Bad input is reported before the weights are loaded.

    Args:
        model (`str`): folder or Hub id of a causal language model, EG-MLA or not.
        tasks (`Sequence[str]`): tasks, groups or tags of lm-eval, `egmla_paper`, `egmla_quick`, or task files.
        limit (`float`, *optional*): questions of each task; below 1, the fraction of them.
        num_fewshot (`int`, *optional*): solved examples before each question; the task's own number by default.
        batch_size (`int` or `str`): rows of a batch, or `"auto"`.
        model_args (`Mapping`, *optional*): arguments of lm-eval's `hf` model, such as `dtype`.
        data_dir (`str`, *optional*): folder of files that replace the official data sets.
        include_path (*optional*): more folders of task files.
        **settings: more arguments of `simple_evaluate`.

    Returns:
        `dict`: lm-eval's results.

    Raises:
        ValueError: for unknown tasks and settings, or a tokenizer without a token to pad with.
        FileNotFoundError: for a missing model, tokenizer or data file.
        ImportError: without lm-eval.
    """
    check_lm_eval()
    check_model_args(model_args)
    arguments = {"pretrained": model, **(model_args or {})}
    check_batch_size(batch_size)
    check_model(model, arguments.get("tokenizer"))
    from lm_eval import simple_evaluate

    from egmla.evaluation import lm_eval as _  # noqa: F401  registers the name "egmla"

    from .local_tasks import EGMLATaskManager

    manager = EGMLATaskManager(data_dir, include_path, settings.get("metadata"))
    names = manager.match(tasks)
    manager.prepare(names, num_fewshot)
    with quiet_git():
        results = simple_evaluate(
            model="egmla",
            model_args=arguments,
            tasks=names,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            task_manager=manager,
            **{"log_samples": False, **settings},
        )
    if not results:  # in a distributed run, only the first process has results
        return {}
    # lm-eval does not record everything that its results depend on.
    results["settings"] = run_settings(limit, num_fewshot, batch_size, model_args, include_path, settings)
    return results


def run_settings(limit, num_fewshot, batch_size, model_args, include_path, settings) -> dict[str, Any]:
    """Settings and versions that results depend on, besides the model, the tasks and their data."""
    return {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "model_args": dict(model_args or {}),
        "include_path": None if include_path is None else True,
        **{name: version(name) for name in ("egmla", "lm_eval", "torch", "transformers")},
        **settings,
    }


def check_batch_size(batch_size: int | str) -> None:
    """Raise `ValueError` unless the batch size is a positive number, `"auto"` or `"auto:N"`."""
    text = str(batch_size)
    if not (text == "auto" or (text.removeprefix("auto:").isdecimal() and int(text.removeprefix("auto:")) > 0)):
        raise ValueError(f"batch_size={batch_size}: must be a positive number of rows, auto, or auto:N.")


def check_output(path: Path) -> None:
    """Raise `OSError` when a file cannot be written at a path. Called before hours of scoring."""
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; give the name of a file to write, such as {path / 'scores.json'}."
        )
    check_writable(path)


def write_results(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Write lm-eval's results as JSON, atomically, with lm-eval's rule for values that JSON lacks."""
    check_lm_eval()
    from lm_eval.utils import handle_non_serializable

    write_json(path, results, default=handle_non_serializable)


def scores(results: Mapping[str, Any], names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Flatten lm-eval's results to one row per task, metric and filter.

    Args:
        results (`Mapping`): lm-eval's results.
        names (`Sequence[str]`, *optional*): tasks to report; all by default.

    Returns:
        `list[dict]`: `task`, `metric`, `filter`, `value`, `stderr` (None where lm-eval gives none), `questions`.
    """
    figures = {**results["results"], **results.get("groups", {})}
    counts = results.get("n-samples", {})
    rows: list[dict[str, Any]] = []
    for task in names if names is not None else figures:
        for key, value in figures.get(task, {}).items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                continue
            stderr = figures[task].get(f"{metric}_stderr,{kind}")
            leaves = [leaf for leaf in task_leaves(results, task) if leaf in counts]
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": value,
                    "stderr": stderr if isinstance(stderr, Real) and math.isfinite(stderr) else None,
                    "questions": sum(counts[leaf]["effective"] for leaf in leaves),
                }
            )
    return rows


def task_leaves(results: Mapping[str, Any], task: str) -> list[str]:
    """List the tasks with questions of their own that a task or group stands for."""
    members = results.get("group_subtasks", {}).get(task)
    return [leaf for member in members for leaf in task_leaves(results, member)] if members else [task]
