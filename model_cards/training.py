"""What a card says about training, after a conversion or from new weights, from `training_report.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egmla.utils.perplexity import recovered_share


LOSS_PLOT = "training_loss.png"
WANTED = {"command", "commit", "data", "dtype", "evaluation", "perplexity", "settings", "tokens", "versions"}


def check_training(report: Mapping[str, Any], path: Path) -> None:
    """Raise `ValueError` when a training report lacks something that a card states."""
    if missing := sorted(WANTED - set(report)):
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was written by another version; train again.")


def stages(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The reports of all training runs of a model, oldest first."""
    return [*report.get("earlier", ()), report]


def training_section(report: Mapping[str, Any] | None, folder: Path) -> str:
    """Render perplexity before and after training, commands and data as Markdown; empty without training.

    Args:
        report (`Mapping`, *optional*): the training report.
        folder (`Path`): the checkpoint, which may hold a plot.
    """
    if report is None:
        return ""
    evaluation = report["evaluation"]
    text = ", ".join(f"`{source['name']}`" for source in evaluation["text"])
    held = "held out of" if evaluation["held_out"] else "of"
    lines = ["| | tokens trained on | perplexity |", "| --- | ---: | ---: |"]
    perplexity = report["perplexity"]
    if perplexity["teacher"] is not None:
        lines.append(f"| teacher | | {perplexity['teacher']:.3f} |")
    before = sum(stage["tokens"] for stage in stages(report)[:-1])
    start = "before the last stage" if before else "new weights" if report.get("kind") == "train" else "converted"
    lines.append(f"| {start} | {before:,} | {perplexity['0 tokens']:.3f} |")
    lines.append(f"| this model | {before + report['tokens']:,} | {perplexity['trained']:.3f} |")
    lines.append("")
    lines.append(
        f"On {evaluation['tokens']:,} tokens {held} {text}, in sequences of {evaluation['sequence_length']:,}; these "
        f"are no figures of a benchmark.{_rounded(report['dtype'])}{_share(perplexity)}"
    )
    lines.append("")
    for stage in stages(report):
        lines += _stage(stage)
    lines += ["- versions: " + ", ".join(f"{name} {value}" for name, value in report["versions"].items())]
    commit = report["commit"]
    lines += [f"- commit of egmla: {f'`{commit}`' if commit else 'not known, an installed package made it'}"]
    if (folder / LOSS_PLOT).is_file():
        lines += ["", f"![Training loss and perplexity against tokens]({LOSS_PLOT})"]
    return "\n".join(lines)


def _rounded(dtype: str) -> str:
    return "" if dtype == "float32" else f" They were measured before the weights were rounded to {dtype}."


def _share(perplexity: Mapping[str, float | None]) -> str:
    share = recovered_share(*(perplexity[name] for name in ("teacher", "0 tokens", "trained")))
    if share is None:
        return ""
    if share < 0:
        return f" Healing lost another {-share:.1%} of what the start had lost in log-perplexity."
    return f" Healing won back {share:.1%} of what the start had lost in log-perplexity."


def _stage(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    loss = [f"{settings['kl_weight']:g} x KL divergence to the teacher"] if settings["kl_weight"] else []
    loss += [f"{settings['ce_weight']:g} x cross entropy"] if settings["ce_weight"] else []
    what = "new weights" if report.get("kind") == "train" else f"stage `{settings['stage']}`"
    what += f", LoRA of rank {settings['lora_rank']}, merged" if settings["lora_rank"] else ""
    data = ", ".join(
        f"`{source['name']}` (SHA-256 `{source['sha256']}`, {source['tokens']:,} tokens)" for source in report["data"]
    )
    return [
        f"```bash\n{report['command']}\n```\n",
        f"- trained: {what}, {report['tokens']:,} tokens, loss {' + '.join(loss)}",
        f"- text: {data}",
    ]
