"""Tables of a card: cache sizes and scores, and how the scores were taken."""

import shlex
from collections.abc import Mapping
from typing import Any

from egmla import EGMLAConfig
from egmla.evaluation.compare import metric_name, with_error
from egmla.evaluation.harness import scores as flat_scores
from egmla.evaluation.harness import task_leaves


ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
LONG_CONTEXT = 32_768
# Metrics that measure the error of prediction, not a fraction of right answers.
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")


def shots(results: Mapping[str, Any], task: str) -> int:
    shots = results.get("n-shot", {})
    return shots.get(task, max((shots.get(leaf, 0) for leaf in task_leaves(results, task)), default=0))


def questions(results: Mapping[str, Any], task: str) -> tuple[int, int]:
    """Number of questions asked, and of questions that the task has."""
    counts = results.get("n-samples", {})
    leaves = [counts[leaf] for leaf in task_leaves(results, task) if leaf in counts]
    return sum(leaf["effective"] for leaf in leaves), sum(leaf["original"] for leaf in leaves)


def top_scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores of tasks and groups, without the members of a group that has its own score."""
    rows = flat_scores(results)
    with_figures = {row["task"] for row in rows}
    hidden: set[str] = set()
    for group, members in results.get("group_subtasks", {}).items():
        if group in with_figures:
            hidden |= set(members)
    return [row for row in rows if row["task"] not in hidden]


def cache_rows(config: EGMLAConfig, other: str, elements: int, dtype: str) -> list[dict[str, str]]:
    """Rows of the cache table: this model, and another model with `elements` elements per token."""
    size = ITEM_SIZES[dtype]
    counts = (
        ("this model", config.cache_elements_per_token, config.cache_bytes_per_token(size)),
        (other, elements, elements * size),
    )
    return [
        {
            "name": name,
            "elements": f"{count:,}",
            "bytes": f"{nbytes:,}",
            "long": f"{nbytes * LONG_CONTEXT / 2**20:,.1f} MiB",
        }
        for name, count, nbytes in counts
    ]


def cache_note(comparison: dict | None, files: str) -> str:
    text = f"Counted from {files}, all layers."
    if comparison is None:
        return text
    source, model = comparison["models"]
    return (
        f"{text} In the caches of forward passes when the scores were taken: {model['cache_elements_per_token']:,} "
        f"and {source['cache_elements_per_token']:,} elements per token."
    )


def score_table(results, source_results, comparison, perplexity: bool) -> str:
    """A table of the tasks that measure perplexity, or of the others; empty without such tasks."""
    if results is None:
        return ""
    rows = [row for row in top_scores(results) if (row["metric"] in PERPLEXITIES) == perplexity]
    if not rows:
        return ""
    source = {_key(row): row for row in flat_scores(source_results)} if source_results else {}
    paired = {_key(row): row for row in comparison["scores"] if row["model"] == "this model"} if comparison else {}
    heads = ["task", "metric", "questions", "shots", "this model"]
    heads += ["source", "difference, paired"] if source else []
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for row in rows:
        asked, known = questions(results, row["task"])
        count = f"{asked:,}" if asked == known else f"{asked:,} of {known:,}"
        cells = [row["task"], metric_name(row["metric"], row["filter"]), count, str(shots(results, row["task"]))]
        cells.append(_figure(row["value"], row["stderr"]))
        if source:
            other, pair = source.get(_key(row)), paired.get(_key(row))
            cells.append(_figure(other["value"], other["stderr"]) if other else "not measured")
            if pair is not None and pair["difference"] is not None:
                cells.append(_figure(pair["difference"], pair["difference_stderr"], "+"))
            else:
                cells.append("not measured")
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["metric"], row["filter"]


def _figure(value: float, stderr: float | None, sign: str = "") -> str:
    text = with_error(value, stderr)
    return sign + text if sign and value >= 0 else text


def score_note(results: dict | None, comparison: dict | None) -> str:
    """How scores were taken, and the command that repeats it if everything it needs is known."""
    if results is None:
        return ""
    config = results["config"]
    settings = comparison["settings"] if comparison else results.get("settings")
    harness = "[lm-eval](https://github.com/EleutherAI/lm-evaluation-harness)"
    text = (
        f"By {harness} {results.get('lm_eval_version', '')}, "
        f"Transformers {results.get('transformers_version', '')}, "
        f"weights in {str(config.get('model_dtype', '')).removeprefix('torch.')}; ± standard error."
    )
    if any(asked < known for asked, known in (questions(results, row["task"]) for row in top_scores(results))):
        text += " Where fewer questions were asked than a task has, they are its first ones."
    files = {name for task in results["configs"].values() for name in task.get("local_files", {}).values()}
    if files:
        text += f" The questions came from local files ({', '.join(f'`{name}`' for name in sorted(files))})."
    if settings is None:
        arguments = {key: value for key, value in config["model_args"].items() if key != "pretrained"}
        shown = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "none"
        chat = " A chat template was used." if results.get("chat_template_sha") else ""
        return f"{text}{chat} Batch size {config.get('batch_size')}, model arguments: {shown}."
    if settings["other"]:
        text += f" Also set, and not shown here: {', '.join(settings['other'])}."
    return f"{text} Again:\n\n```bash\n{_score_command(results, settings, bool(files))}\n```"


def _score_command(results: Mapping[str, Any], settings: Mapping[str, Any], local: bool) -> str:
    tasks = ",".join(dict.fromkeys(row["task"] for row in top_scores(results)))
    words = ["egmla", "eval", results["config"]["model_args"]["pretrained"], "--tasks", tasks]
    for option in ("limit", "num_fewshot", "batch_size"):
        if settings.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", f"{settings[option]}"]
    if settings["model_args"]:
        words += ["--model-args", ",".join(f"{key}={value}" for key, value in settings["model_args"].items())]
    for option in ("apply_chat_template", "fewshot_as_multiturn", "bootstrap_iters"):
        if settings.get(option) is not None:
            words += ["--set", f"{option}={settings[option]}"]
    return shlex.join([*words, *(["--data-dir", "FOLDER"] if local else [])])
