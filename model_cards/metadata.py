"""The metadata block of a card, which the Hub shows and searches, and the checks that the Hub makes of it."""

import math
import re
from collections.abc import Mapping
from typing import Any

from egmla.evaluation.compare import metric_name
from egmla.evaluation.harness import task_leaves

from .tables import questions, shots, top_scores


TAGS = ("egmla", "eg-mla", "mla", "kv-cache", "custom_code")
# `namespace/name`, as the Hub accepts it; huggingface_hub checks the rest.
REPO_ID = re.compile(r"[^/\s]+/[^/\s]+")

# Fields of a card's metadata: pattern of their values, and the same in words.
CARD_FIELDS = {
    "license": (r"[a-z0-9][a-z0-9.+-]*", "a licence's short name on the Hub, such as apache-2.0"),
    "language": (r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", "a code of ISO 639, such as en"),
    "pipeline_tag": (r"[a-z0-9]+(-[a-z0-9]+)*", "a task's name on the Hub, such as text-generation"),
    "library_name": (r"[A-Za-z0-9._-]+", "a library's name, such as transformers"),
    "tags": (r"\S.*", "a text that is not empty"),
    "datasets": (r"[\w.-]+(/[\w.-]+)?", "a data set's id on the Hub"),
}


def check_repo_id(repo_id: str) -> None:
    """Raise `ValueError` when a repository cannot have this name on the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(
            f"{repo_id!r} is no repository id: it must be NAMESPACE/NAME, your user or organization and the model's "
            "name, such as my-name/my-model."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id: {error} Write it as my-name/my-model.") from error


def card_problems(text: str) -> list[str]:
    """List what the Hub would refuse in the metadata of a model card, without asking it.

    Source: fields and formats of huggingface.co/docs/hub/model-cards; huggingface_hub's parser for `model-index`.
    """
    import yaml
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        data = ModelCard(text).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"The metadata of README.md are no valid card ({' '.join(str(error).split())})."]
    problems = []
    for name, (pattern, form) in CARD_FIELDS.items():
        for value in _as_list(data.get(name)):
            if not (isinstance(value, str) and re.fullmatch(pattern, value)):
                problems.append(f"{name} in README.md is {value!r}: it must be {form}.")
    for result in _as_list(data.get("model-index")):
        for entry in result.get("results", ()):
            for metric in entry.get("metrics", ()):
                value = metric.get("value")
                if isinstance(value, float) and not math.isfinite(value):
                    problems.append(f"A figure of {metric.get('name')} in README.md is {value}; leave it out.")
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append("license in README.md is other, which needs a license_name beside it.")
    for value in _as_list(data.get("base_model")):
        try:
            validate_repo_id(str(value))
        except HFValidationError as error:
            problems.append(f"base_model in README.md is {value!r}, no repository id ({error}).")
    return problems


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def card_data(origin, license, license_name, base_model, model_index):
    from huggingface_hub import ModelCardData

    same_license = license == origin.get("license")
    data = ModelCardData(
        license=license,
        license_name=license_name,
        license_link=origin.get("license_link") if same_license else None,
        language=origin.get("languages"),
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
    )
    if model_index:
        data["model-index"] = model_index
    return data


def model_index(title: str, results: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The Hub's evaluation metadata, one entry per task.

    Not `EvalResult`s: huggingface_hub merges those of one data set, but two tasks may use a data set in two ways.
    """
    entries: dict[str, dict[str, Any]] = {}
    if results is None:
        return []
    for row in top_scores(results):
        task = row["task"]
        entry = entries.setdefault(
            task, {"task": {"type": "text-generation"}, "dataset": _dataset(results, task), "metrics": []}
        )
        entry["metrics"].append(
            {
                "name": metric_name(row["metric"], row["filter"]),
                "type": row["metric"],
                "value": row["value"],
                "args": {"filter": row["filter"], "standard_error": row["stderr"]},
            }
        )
    return [{"name": title, "results": list(entries.values())}] if entries else []


def _dataset(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    leaves = [results["configs"].get(leaf, {}) for leaf in task_leaves(results, task)]
    # A task on local files names a loader, which is no data set.
    paths = {leaf.get("dataset_path") for leaf in leaves} - {None, "json", "csv", "parquet", "text"}
    dataset: dict[str, Any] = {"name": task, "type": paths.pop() if len(paths) == 1 else task}
    if len(leaves) == 1:
        more = {"config": leaves[0].get("dataset_name"), "split": _split(leaves[0])}
        dataset |= {key: value for key, value in more.items() if value}
    asked, known = questions(results, task)
    dataset["args"] = {"num_few_shot": shots(results, task), "questions": asked, "of": known}
    return dataset


def _split(task: Mapping[str, Any]) -> str | None:
    return task.get("test_split") or task.get("validation_split")
