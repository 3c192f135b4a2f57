"""Write the model card of a checkpoint. Every number comes from a JSON file in the folder; a missing one is named.

- `config.json`: shapes and cache of this model (`tables.py`)
- `conversion_report.json`: source, plan, calibration, command, versions (`converted.py`); absent after `egmla train`
- `training_report.json`: training after the conversion (`training.py`), or from new weights (`from_scratch.py`)
- `evaluation/*.json`: scores (`scores.py`, `tables.py`)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egmla import EGMLAConfig
from egmla.evaluation.plots import plot_scores
from egmla.utils.files import read_json, write_json, write_text
from egmla.utils.plotting import check_matplotlib
from egmla.utils.provenance import CONVERSION_REPORT, TRAINING_REPORT, weights_sha256

from . import converted, from_scratch
from .figure import FIGURE_NAME, draw_architecture
from .metadata import card_data, card_problems, check_repo_id, model_index
from .scores import COMPARISON, PLOT, RESULTS, SCORES_FOLDER, SOURCE_RESULTS, comparison_to_plot, read_scores
from .tables import cache_note, cache_rows, score_note, score_table
from .training import check_training, stages, training_section


CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("template.md")
MARK = "<!-- Made by `egmla card`"
PLACEHOLDER = "your-name/"
REPORTED_SHAPES = f"`config.json` and `{CONVERSION_REPORT}`"


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
    """Write `README.md` and the architecture figure of a checkpoint, from its reports.

    Args:
        folder (`str` or `Path`): a checkpoint with a `conversion_report.json`, or with the `training_report.json` of
            `egmla train`.
        scores (*optional*): scores to copy into the folder, see `read_scores`. They replace those of an earlier card.
        repo_id (`str`, *optional*): the model's name on the Hub, for the examples.
        license, license_name, base_model (`str`, *optional*): needed where the source does not state them; by default
            those of an earlier card.
        overwrite (`bool`): replace a card that was written by hand.

    Returns:
        `list[Path]`: the files written.

    Raises:
        FileNotFoundError: without a model or its reports.
        FileExistsError: when there is a card that was written by hand.
        ValueError: for reports that are broken or of another model, or metadata that the Hub refuses.
        ImportError: without matplotlib.
    """
    folder = Path(folder)
    check_matplotlib()
    if repo_id is not None:
        check_repo_id(repo_id)
    conversion = _read_conversion(folder)  # missing reports are named first
    _read_training(folder)
    card = folder / CARD_NAME
    earlier = card.read_text(encoding="utf-8") if card.is_file() else ""
    if earlier and MARK not in earlier and not overwrite:
        raise FileExistsError(
            f"{card} was not made by this command; move it away, or replace it with overwrite=True (--overwrite)."
        )
    content = None if scores is None else read_scores(folder, Path(scores))
    if content is not None and conversion is None:
        content = {RESULTS: content[RESULTS]}  # the model it was compared with is not its source
    stated = {"license": license, "license_name": license_name, "base_model": base_model, "repo_id": repo_id}
    before = _stated_before(earlier)
    if license is not None:
        before.pop("license_name", None)  # it named another licence
    known: dict[str, Any] = before | {key: value for key, value in stated.items() if value}
    text = render_card(folder, scores=content, **known)
    if problems := card_problems(text):
        raise ValueError(f"The card of {folder} would be refused: {' '.join(problems)}")
    # All input is checked: write the files.
    written = [] if content is None else _write_scores(folder / SCORES_FOLDER, content)
    draw_architecture(_config(folder), folder / FIGURE_NAME)
    write_text(card, text)
    return [*written, folder / FIGURE_NAME, card]


def _write_scores(target: Path, content: Mapping[str, Any]) -> list[Path]:
    target.mkdir(exist_ok=True)
    # Scores that an earlier card copied would be taken for this card's.
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
    """Render the text of a checkpoint's card.

    Args:
        folder, license, license_name, base_model, repo_id: see `write_card`.
        scores (*optional*): what `read_scores` returns; by default the scores that an earlier card copied.
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
            "summary": from_scratch.summary(config, latest),
            "cache": cache_rows(config, *from_scratch.counterpart(config), latest["dtype"]),
            "made": from_scratch.made(latest),
            "limits": from_scratch.limits(results, changed),
            "licence": from_scratch.licence(license, license_name),
            "trained": "Training",
        }
        origin, perplexity = {}, ""
    else:
        origin = conversion["source"]
        if license is None:
            license, license_name = origin.get("license"), license_name or origin.get("license_name")
        base_model = base_model or origin.get("base_model")
        parts = {
            "summary": converted.summary(config, conversion, base_model, training is not None),
            "cache": cache_rows(config, "source", origin["cache_elements_per_token"], latest["dtype"]),
            "made": converted.made(conversion, folder),
            "limits": converted.limits(conversion, results, training, changed),
            "licence": converted.licence(license, license_name, base_model or origin["label"]),
            "trained": "Healing",
        }
        perplexity = converted.perplexity(conversion, training)
    perplexities = [score_table(results, source_results, comparison, perplexity=True), perplexity]
    if training is not None and not any(perplexities):
        perplexities = [
            f"Measured on text of the training: see [{parts['trained']}](#{str(parts['trained']).lower()})."
        ]
    data = card_data(origin, license, license_name, base_model, model_index(title, results))
    # Not `ModelCard.from_template`: it would parse the metadata again and merge tasks of one data set.
    return Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        card_data=data.to_yaml(),
        title=title,
        dtype=latest["dtype"],
        cache_note=cache_note(comparison, "`config.json`" if conversion is None else REPORTED_SHAPES),
        perplexity="\n\n".join(filter(None, perplexities)),
        scores=score_table(results, source_results, comparison, perplexity=False),
        score_note=score_note(results, comparison),
        plot=comparison is not None,
        training=training_section(training, folder),
        repo_id=repo_id or f"{PLACEHOLDER}{title}",
        transformers=(conversion or latest)["versions"]["transformers"],
        **parts,
    )


def _stated_before(card: str) -> dict[str, str]:
    """Read licence, base model and Hub name from an earlier card that `write_card` made."""
    from huggingface_hub import ModelCard

    if MARK not in card:
        return {}
    data = ModelCard(card, ignore_metadata_errors=True).data
    name = card.partition('AutoTokenizer.from_pretrained("')[2].partition('"')[0]
    found = {key: data.get(key) for key in ("license", "license_name", "base_model")}
    found["repo_id"] = None if name.startswith(PLACEHOLDER) else name
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def _changed(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether the weights are known to differ from those that the report is about."""
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
    """Read the conversion report; `None` for a model trained from new weights."""
    config = _config(folder)
    report = folder / CONVERSION_REPORT
    if not report.is_file():
        if from_scratch.is_from_scratch(folder):
            return None
        raise FileNotFoundError(
            f"{folder} has no {CONVERSION_REPORT}, which `egmla convert` writes, and no {TRAINING_REPORT} of `egmla "
            "train`. A card states only what a report says: make the model with these commands, or write its card by "
            "hand."
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
