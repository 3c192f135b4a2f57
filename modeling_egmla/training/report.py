"""Files that a run writes beside its weights: `training_report.json`, which model cards read, and a plot of losses."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from egmla.utils.perplexity import recovered_share
from egmla.utils.provenance import public_name, software_versions, source_commit

from .settings import TrainingSettings


PLOT_NAME = "training_loss.png"


def command_line(
    words: Sequence[str], settings: TrainingSettings, options: Mapping[str, Any], leave_out: Sequence[str] = ()
) -> str:
    """Return the command that repeats a run, with names instead of paths, without settings at their default."""
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
        name = item.name.replace("_", "-")
        option = f"--no-{name}" if value is False else f"--{name}"
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
    """Return settings as a dictionary without paths."""
    found = {item.name: getattr(settings, item.name) for item in fields(settings)}
    for name in ("data", "eval_data"):
        found[name] = [_public_data(text) for text in found[name]]
    found["arguments"] = _public_arguments(found["arguments"])
    return found


def training_curve(history: Sequence[Mapping[str, Any]], tokens_per_step: int) -> dict[str, list[dict[str, Any]]]:
    """Return losses and evaluations of Trainer's log, one row per optimiser step, with the tokens seen by then."""
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
    """Return the commit and versions for a report."""
    return {"versions": software_versions("accelerate", "datasets", "peft", "tokenizers"), "commit": source_commit()}


def outcome(perplexity: Mapping[str, float | None]) -> str | None:
    """Say in one sentence what training did to the perplexity; `None` when there is nothing to add to the numbers.

    Args:
        perplexity (`Mapping`): of `teacher` (may be `None`), after `0 tokens`, and `trained`.
    """
    teacher, before, after = (perplexity[name] for name in ("teacher", "0 tokens", "trained"))
    if before is None or after is None:
        return None
    if after > before:
        return (
            f"Training made the model worse on this text: perplexity rose from {before:.3f} to {after:.3f}. "
            "A lower learning rate, more tokens or other data may help."
        )
    share = recovered_share(teacher, before, after)
    if share is None:
        return None
    if share > 1:
        return "Training won back all that the conversion had lost: perplexity is below the teacher's."
    return f"Training won back {share:.1%} of what the conversion had lost, in log-perplexity."


def plot_training(report: Mapping[str, Any], path: Path) -> None:
    """Plot training loss and evaluation perplexity against tokens as PNG; a teacher's perplexity is a line.

    Raises:
        ImportError: when matplotlib is missing.
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
