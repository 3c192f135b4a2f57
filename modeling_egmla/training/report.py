"""What a run leaves beside its weights: `training_report.json`, which model cards read, and a plot of its losses."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from egmla.utils.provenance import TRAINING_REPORT, public_name, software_versions, source_commit

from .settings import TrainingSettings


PLOT_NAME = "training_loss.png"


def command_line(
    words: Sequence[str], settings: TrainingSettings, options: Mapping[str, Any], leave_out: Sequence[str] = ()
) -> str:
    """The command that does a run again, with names in place of paths; settings at their default are left out."""
    line = ["egmla", *words]
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                line += [f"--{name.replace('_', '-')}", str(item)]
    for item in fields(TrainingSettings):
        value = getattr(settings, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value == default or item.name in leave_out:
            continue
        option = f"--{item.name.replace('_', '-')}"
        if item.name == "arguments":
            line += [word for name, text in _public_arguments(value).items() for word in ("--set", f"{name}={text}")]
        elif isinstance(value, bool):
            line.append(option)
        elif isinstance(value, list):
            line += [word for name in value for word in (option, _public_data(name))]
        else:
            line += [option, str(value)]
    return shlex.join(line)


def _public_data(name: str) -> str:
    path, *rest = [name] if Path(name).exists() else name.split(":")
    return ":".join([public_name(path), *rest])


def _public_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: public_name(value) if isinstance(value, str) and Path(value).exists() else value
        for name, value in arguments.items()
    }


def public_settings(settings: TrainingSettings) -> dict[str, Any]:
    """Settings as a dictionary without paths."""
    found = {item.name: getattr(settings, item.name) for item in fields(settings)}
    for name in ("data", "eval_data"):
        found[name] = [_public_data(text) for text in found[name]]
    found["arguments"] = _public_arguments(found["arguments"])
    return found


def training_curve(history: Sequence[Mapping[str, Any]], tokens_per_step: int) -> dict[str, list[dict[str, Any]]]:
    """Losses and evaluations of Trainer's log, one row per optimiser step, with the tokens seen by then."""
    losses = {row["step"]: row for row in history if "loss" in row}
    evaluations = {row["step"]: row for row in history if "eval_loss" in row}
    return {
        "losses": [
            {
                "step": step,
                "tokens": step * tokens_per_step,
                "loss": row["loss"],
                "learning_rate": row["learning_rate"],
                "gradient_norm": row.get("grad_norm"),
            }
            for step, row in sorted(losses.items())
        ],
        "evaluations": [
            {
                "step": step,
                "tokens": step * tokens_per_step,
                "loss": row["eval_loss"],
                "perplexity": row["eval_perplexity"],
            }
            for step, row in sorted(evaluations.items())
        ],
    }


def provenance() -> dict[str, Any]:
    """Commit and versions, as reports state them."""
    return {"versions": software_versions("accelerate", "datasets", "peft", "tokenizers"), "commit": source_commit()}


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes a training report into a checkpoint folder."""
    text = json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"
    (folder / TRAINING_REPORT).write_text(text, encoding="utf-8")


def plot_training(report: Mapping[str, Any], path: Path) -> None:
    """Draws training loss and evaluation perplexity against tokens, a teacher's perplexity as a line, as PNG.

    Raises:
        ImportError: without matplotlib.
    """
    from egmla.utils.plotting import COLOURS, check_matplotlib

    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    losses, evaluations = report["losses"], report["evaluations"]
    left.plot([row["tokens"] for row in losses], [row["loss"] for row in losses], color=COLOURS[1], linewidth=1)
    left.set_title("Training loss", fontsize=12, fontweight="bold", loc="left")
    left.set_ylabel("nats per token", fontsize=10)
    right.plot(
        [row["tokens"] for row in evaluations],
        [row["perplexity"] for row in evaluations],
        color=COLOURS[2],
        marker="o",
        markersize=4,
    )
    right.set_title("Perplexity, evaluation text", fontsize=12, fontweight="bold", loc="left")
    teacher = report["perplexity"].get("teacher")
    if teacher is not None:
        right.axhline(teacher, color=COLOURS[0], linestyle="--")
        right.annotate("teacher", (1, teacher), xycoords=("axes fraction", "data"), va="bottom", ha="right")
    if len(evaluations) > 1 and evaluations[0]["perplexity"] > 20 * evaluations[-1]["perplexity"]:
        right.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("tokens", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
