"""The model card of a checkpoint: every figure comes from a JSON file in the folder, and what is missing says so.

config.json               shapes and cache of this model
conversion_report.json    source, plan, calibration, command, versions; not of models trained from new weights
training_report.json      what was trained: after the conversion (`training.py`), or from new weights (`scratch.py`)
evaluation/*.json         scores (`scores.py`)
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egmla import EGMLAConfig
from egmla.evaluation.compare import metric_name, plot_scores, with_error
from egmla.evaluation.harness import scores as flat_scores
from egmla.evaluation.harness import task_leaves
from egmla.model_cards import from_scratch as scratch
from egmla.utils.files import read_json, write_json, write_text
from egmla.utils.provenance import CONVERSION_FIGURE, CONVERSION_REPORT, TRAINING_REPORT, weights_sha256

from .figure import FIGURE_NAME, draw_architecture
from .scores import COMPARISON, PLOT, RESULTS, SCORES_FOLDER, SOURCE_RESULTS, comparison_to_plot, read_scores
from .training import check_training, stages, training_section


CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("template.md")
MARK = "<!-- Made by `egmla card`"
PLACEHOLDER = "your-name/"
REPORTED_SHAPES = f"`config.json` and `{CONVERSION_REPORT}`"
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
LONG_CONTEXT = 32_768
# Below these a figure is an error of prediction, not a share of right answers.
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")
TAGS = ("egmla", "eg-mla", "mla", "kv-cache", "custom_code")


def write_card(
    folder: str | Path,
    *,
    scores: str | Path | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes `README.md` and the architecture figure of a checkpoint, from its reports.

    Args:
        folder (`str` or `Path`): a checkpoint with `conversion_report.json`, or the `training_report.json` of training
            from new weights.
        scores (*optional*): scores to take along, see `read_scores`; those of an earlier card are replaced.
        repo_id (`str`, *optional*): its name on the Hub, for the examples.
        license, license_name, base_model (`str`, *optional*): where the source does not state them; an earlier card's
            by default.
        overwrite (`bool`): replace a card that was written by hand.

    Returns:
        `list[Path]`: the files written.

    Raises:
        FileNotFoundError: without a model or its reports.
        FileExistsError: when there is a card that this function did not make.
        ValueError: for reports that cannot be read or do not belong to the model, or metadata the Hub refuses.
        ImportError: without matplotlib.
    """
    from egmla.publishing.preflight import card_problems, check_repo_id
    from egmla.utils.plotting import check_matplotlib

    folder = Path(folder)
    check_matplotlib()
    if repo_id is not None:
        check_repo_id(repo_id)
    conversion = _read_conversion(folder)  # what is missing shows first
    _read_training(folder)
    card = folder / CARD_NAME
    earlier = card.read_text(encoding="utf-8") if card.is_file() else ""
    if earlier and MARK not in earlier and not overwrite:
        raise FileExistsError(
            f"{card} was not made by this command; move it away, or replace it with overwrite=True (--overwrite)."
        )
    content = None if scores is None else read_scores(folder, Path(scores))
    if content is not None and conversion is None:
        content = {RESULTS: content[RESULTS]}  # what it was compared with is not its source
    stated = {"license": license, "license_name": license_name, "base_model": base_model, "repo_id": repo_id}
    before = _stated_before(earlier)
    if license is not None:
        before.pop("license_name", None)  # it was another licence's
    known: dict[str, Any] = before | {key: value for key, value in stated.items() if value}
    text = render_card(folder, scores=content, **known)
    if problems := card_problems(text):
        raise ValueError(f"The card of {folder} would be refused: {' '.join(problems)}")
    # All is known to be right: now the files.
    written = [] if content is None else _write_scores(folder / SCORES_FOLDER, content)
    draw_architecture(_config(folder), folder / FIGURE_NAME)
    write_text(card, text)
    return [*written, folder / FIGURE_NAME, card]


def _write_scores(target: Path, content: Mapping[str, Any]) -> list[Path]:
    target.mkdir(exist_ok=True)
    # What an earlier card took along would be read as belonging to this one.
    for name in (RESULTS, SOURCE_RESULTS, COMPARISON, PLOT):
        (target / name).unlink(missing_ok=True)
    for name, part in content.items():
        write_json(target / name, part)
    written = [target / name for name in content]
    if COMPARISON in content:
        plot_scores(comparison_to_plot(content[COMPARISON]), target / PLOT)
        written.append(target / PLOT)
    return written


def render_card(
    folder: str | Path,
    license: str | None = None,
    license_name: str | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
    scores: Mapping[str, Any] | None = None,
) -> str:
    """The text of a checkpoint's card; arguments as of `write_card`, which writes it.

    `scores` are those of `read_scores`, by default what an earlier card took along.
    """
    from jinja2 import Template

    folder = Path(folder)
    config, conversion, training = _config(folder), _read_conversion(folder), _read_training(folder)
    if scores is None:
        paths = [folder / SCORES_FOLDER / name for name in (RESULTS, SOURCE_RESULTS, COMPARISON)]
        scores = {path.name: read_json(path) for path in paths if path.is_file()}
    results, source_results, comparison = (scores.get(name) for name in (RESULTS, SOURCE_RESULTS, COMPARISON))
    title = folder.resolve().name
    latest = training or conversion or {}  # one of the two is there
    changed = _changed(folder, latest)
    if conversion is None:
        parts = {
            "summary": scratch.summary(config, latest),
            "cache": _cache_rows(config, *scratch.counterpart(config), latest["dtype"]),
            "made": scratch.made(latest),
            "limits": scratch.limits(results, changed),
            "licence": scratch.licence(license, license_name),
            "trained": "Training",
        }
        origin, perplexity = {}, ""
    else:
        origin = conversion["source"]
        if license is None:
            license, license_name = origin.get("license"), license_name or origin.get("license_name")
        base_model = base_model or origin.get("base_model")
        parts = {
            "summary": _summary(config, conversion, base_model, training is not None),
            "cache": _cache_rows(config, "source", origin["cache_elements_per_token"], latest["dtype"]),
            "made": _made(conversion, folder),
            "limits": _limits(conversion, results, training, changed),
            "licence": _licence(license, license_name, base_model or origin["label"]),
            "trained": "Healing",
        }
        perplexity = _conversion_perplexity(conversion, training is not None)
    perplexities = (_score_table(results, source_results, comparison, perplexity=True), perplexity)
    data = _card_data(origin, license, license_name, base_model, _model_index(title, results))
    # As `ModelCard.from_template`, which would parse the metadata again and merge tasks on one data set.
    return Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        card_data=data.to_yaml(),
        title=title,
        dtype=latest["dtype"],
        cache_note=_cache_note(comparison, "`config.json`" if conversion is None else REPORTED_SHAPES),
        perplexity="\n\n".join(filter(None, perplexities)),
        scores=_score_table(results, source_results, comparison, perplexity=False),
        score_note=_score_note(results, comparison),
        plot=comparison is not None,
        training=training_section(training, folder),
        repo_id=repo_id or f"{PLACEHOLDER}{title}",
        transformers=(conversion or latest)["versions"]["transformers"],
        **parts,
    )


def _stated_before(card: str) -> dict[str, str]:
    """Licence, base model and name on the Hub of an earlier card of ours."""
    from huggingface_hub import ModelCard

    if MARK not in card:
        return {}
    data = ModelCard(card, ignore_metadata_errors=True).data
    name = card.partition('AutoTokenizer.from_pretrained("')[2].partition('"')[0]
    found = {key: data.get(key) for key in ("license", "license_name", "base_model")}
    found["repo_id"] = None if name.startswith(PLACEHOLDER) else name
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def _changed(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether the weights are known to be others than those reported on."""
    written, found = report.get("weights_sha256"), weights_sha256(folder)
    return written is not None and found is not None and written != found


def _config(folder: Path) -> EGMLAConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it holds no model; check the path.")
    content = read_json(folder / "config.json")
    if content.get("model_type") != "egmla":
        raise ValueError(f"{folder} holds a {content.get('model_type')} model: cards are made for EG-MLA models only.")
    return EGMLAConfig.from_pretrained(folder)


def _read_conversion(folder: Path) -> dict[str, Any] | None:
    """The conversion report; `None` for a model trained from new weights."""
    config = _config(folder)
    report = folder / CONVERSION_REPORT
    if not report.is_file():
        if scratch.is_from_scratch(folder):
            return None
        raise FileNotFoundError(
            f"{folder} has no {CONVERSION_REPORT}, which `egmla convert` writes, and no {TRAINING_REPORT} of `egmla "
            "train`: a card states nothing that no report says; make the model with these, or write its card by hand."
        )
    conversion = read_json(report)
    wanted = {"source", "plan", "recipe", "calibration", "command", "commit", "dtype", "versions"}
    if missing := sorted(wanted - set(conversion)):
        raise ValueError(
            f"{report} lacks {', '.join(missing)}: it was written by another version; convert the model again."
        )
    if conversion["plan"]["target_elements"] != config.cache_elements_per_token:
        raise ValueError(
            f"{report} is of a model with {conversion['plan']['target_elements']} cache elements per token, and "
            f"config.json has {config.cache_elements_per_token}; they do not belong together."
        )
    return conversion


def _read_training(folder: Path) -> dict[str, Any] | None:
    path = folder / TRAINING_REPORT
    if not path.is_file():
        return None
    report = read_json(path)
    for stage in stages(report):
        check_training(stage, path)
    return report


def _card_data(origin, license, license_name, base_model, model_index):
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


def _model_index(title: str, results: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The Hub's evaluation metadata, an entry per task.

    Not `EvalResult`s: huggingface_hub merges those of one data set, and two tasks may ask it in two ways.
    """
    entries: dict[str, dict[str, Any]] = {}
    if results is None:
        return []
    for row in _top_scores(results):
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
    # Files of one's own are read by a loader's name, which is no data set.
    paths = {leaf.get("dataset_path") for leaf in leaves} - {None, "json", "csv", "parquet", "text"}
    dataset: dict[str, Any] = {"name": task, "type": paths.pop() if len(paths) == 1 else task}
    if len(leaves) == 1:
        more = {"config": leaves[0].get("dataset_name"), "split": _split(leaves[0])}
        dataset |= {key: value for key, value in more.items() if value}
    asked, known = _questions(results, task)
    dataset["args"] = {"num_few_shot": _shots(results, task), "questions": asked, "of": known}
    return dataset


def _split(task: Mapping[str, Any]) -> str | None:
    return task.get("test_split") or task.get("validation_split")


def _shots(results: Mapping[str, Any], task: str) -> int:
    shots = results.get("n-shot", {})
    return shots.get(task, max((shots.get(leaf, 0) for leaf in task_leaves(results, task)), default=0))


def _questions(results: Mapping[str, Any], task: str) -> tuple[int, int]:
    """Questions asked, and how many the task has."""
    counts = results.get("n-samples", {})
    leaves = [counts[leaf] for leaf in task_leaves(results, task) if leaf in counts]
    return sum(leaf["effective"] for leaf in leaves), sum(leaf["original"] for leaf in leaves)


def _top_scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores of tasks and groups, without the members of a group that has a figure of its own."""
    rows = flat_scores(results)
    with_figures = {row["task"] for row in rows}
    hidden: set[str] = set()
    for group, members in results.get("group_subtasks", {}).items():
        if group in with_figures:
            hidden |= set(members)
    return [row for row in rows if row["task"] not in hidden]


def _summary(config: EGMLAConfig, conversion: dict, base_model: str | None, trained: bool) -> str:
    plan, origin = conversion["plan"], conversion["source"]
    name = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{origin['label']}`"
    then = " and then trained further" if trained else ""
    text = (
        f"{name}, converted to EG-MLA (embedding-gated multi-head latent attention){then}: each layer caches one "
        "latent and one rotary key per token for all heads, and decoding reads them as they are."
    )
    if plan["exact"] and trained:
        return f"{text} The conversion was exact, so the cache is of the source's size."
    if plan["exact"]:
        return f"{text} This is the exact conversion: the source's function, and a cache of the source's size."
    return (
        f"{text} The cache holds {config.cache_elements_per_token:,} elements per token, "
        f"{plan['cache_kept']:.1%} of the source's {plan['source_elements']:,}."
    )


def _cache_rows(config: EGMLAConfig, other: str, elements: int, dtype: str) -> list[dict[str, str]]:
    """Rows of the cache's table: this model, and another's elements per token."""
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


def _cache_note(comparison: dict | None, files: str) -> str:
    text = f"Counted from {files}, all layers."
    if comparison is None:
        return text
    source, model = comparison["models"]
    return (
        f"{text} In the caches of forward passes when the scores were taken: {model['cache_elements_per_token']:,} "
        f"and {source['cache_elements_per_token']:,} elements per token."
    )


def _score_table(results, source_results, comparison, perplexity: bool) -> str:
    """A table of the tasks whose figures are perplexities, or of the others; empty when there is none."""
    if results is None:
        return ""
    rows = [row for row in _top_scores(results) if (row["metric"] in PERPLEXITIES) == perplexity]
    if not rows:
        return ""
    source = {_key(row): row for row in flat_scores(source_results)} if source_results else {}
    paired = {_key(row): row for row in comparison["scores"] if row["model"] == "this model"} if comparison else {}
    heads = ["task", "metric", "questions", "shots", "this model"]
    heads += ["source", "difference, paired"] if source else []
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for row in rows:
        asked, known = _questions(results, row["task"])
        count = f"{asked:,}" if asked == known else f"{asked:,} of {known:,}"
        cells = [row["task"], metric_name(row["metric"], row["filter"]), count, str(_shots(results, row["task"]))]
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


def _score_note(results: dict | None, comparison: dict | None) -> str:
    """How scores were taken, and the command that takes them again where all it needs is known."""
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
    if any(asked < known for asked, known in (_questions(results, row["task"]) for row in _top_scores(results))):
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
    tasks = ",".join(dict.fromkeys(row["task"] for row in _top_scores(results)))
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


def _conversion_perplexity(conversion: dict, trained: bool) -> str:
    """What `egmla convert --evaluate` measured; empty where it did not."""
    evaluation = conversion.get("evaluation")
    if evaluation is None:
        return ""
    name = "converted, not yet trained" if trained else "this model"
    lines = ["| | perplexity |", "| --- | ---: |", f"| source | {evaluation['source']:.3f} |"]
    lines += [f"| {name} | {evaluation['converted']:.3f} |", ""]
    lines.append(
        f"Measured when it was converted, in float32, on {evaluation['windows']:,} windows of "
        f"{evaluation['window']:,} tokens of `{evaluation['file']}` (SHA-256 of the text read "
        f"`{evaluation['sha256']}`)."
    )
    return "\n".join(lines)


def _made(conversion: dict, folder: Path) -> str:
    origin, calibration, recipe = conversion["source"], conversion["calibration"], conversion["recipe"]
    lines = [f"```bash\n{conversion['command']}\n```\n"]
    lines.append(f"- source: `{origin['label']}` ({origin['model_type']})")
    if calibration:
        lines.append(
            f"- calibration: {calibration['sequences']} sequences of {calibration['sequence_length']:,} tokens from "
            f"`{calibration['file']}`, SHA-256 of the text read `{calibration['sha256']}`"
        )
        lines += _refinement(conversion)
    else:
        lines.append("- calibration: none, an exact conversion needs none")
    if recipe:
        lines.append("- recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))
    lines.append("- versions: " + ", ".join(f"{name} {value}" for name, value in conversion["versions"].items()))
    commit = conversion["commit"]
    lines.append(f"- commit of egmla: {f'`{commit}`' if commit else 'not known, an installed package made it'}")
    if (folder / CONVERSION_FIGURE).is_file():
        lines.append(f"\n![How each layer fared in the conversion]({CONVERSION_FIGURE})")
    return "\n".join(lines)


def _refinement(conversion: dict) -> list[str]:
    """The line about the refinement; none for reports from before there was one."""
    if "refinement" not in conversion:
        return []
    refinement = conversion["refinement"]
    if refinement is None:
        return ["- refinement: none, the closed form as it is"]
    batch, length = refinement["batch_size"], conversion["calibration"]["sequence_length"]
    gate = "the gate trained with the rest" if refinement["gate"] else "the gate not trained"
    return [
        f"- refinement: each layer's attention by itself, {refinement['steps']} steps of {batch} of those sequences "
        f"({refinement['steps'] * batch * length:,} tokens), {gate}; learning rate {refinement['learning_rate']:g}, "
        f"matrix products in {refinement['dtype']}"
    ]


def _limits(conversion: dict, results: dict | None, training: dict | None, changed: bool) -> list[str]:
    limits = []
    refinement = conversion.get("refinement")
    if conversion["plan"]["exact"]:
        limits.append("The cache is as large as the source's: a starting point for training, not a saving.")
    elif training is None and not changed:
        what = (
            "Each layer's attention was refined by itself on the calibration text and nothing was trained end to end"
            if refinement
            else "Nothing was trained after the conversion"
        )
        limits.append(f"{what}, so quality below the source's is to be expected.")
    if changed:
        limits.append("The weights have changed since they were last reported on, and nothing here says how.")
    elif training is None and refinement and refinement["gate"]:
        limits.append("The gate was trained in that refinement only.")
    elif training is None:
        limits.append("The gate is at identity: it changes nothing until the model is trained.")
    if training is not None:
        limits.append("The text it was healed on is all it was trained on since: other domains may have gained less.")
    if conversion["source"]["label"].endswith(".gguf"):
        limits.append("The source was read from a quantised GGUF file: these are the weights of the rounded model.")
    if results is None:
        limits.append("No task was measured.")
    limits.append("What the source does wrong, this model does too.")
    return limits


def _licence(license: str | None, name: str | None, source: str) -> str:
    if license is None:
        return f"The source, {source}, states none that this card could carry over: look it up before use."
    stated = f"{license} ({name})" if name else license
    return f"That of the source, {source}: {stated}. The code in this repository is Apache-2.0."
