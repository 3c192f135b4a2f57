"""Options that `egmla heal` and `egmla train` share, and how they print a plan and a result."""

from pathlib import Path
from typing import Annotated, Any

import typer


Data = Annotated[
    list[str],
    typer.Option(help="Text file, .jsonl file, or data set as NAME[:CONFIGURATION[:SPLIT]]; repeatable."),
]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens to train on: 500000, 50M, 1B.")]
EvalData = Annotated[
    list[str] | None, typer.Option(help="Text to evaluate on, as --data; by default a part of --data is held out.")
]
EvalShare = Annotated[float, typer.Option(help="Fraction of the data to hold out.")]
EvalTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens to evaluate on.")]
TextField = Annotated[str, typer.Option(metavar="NAME", help="Field of the text in .jsonl files and data sets.")]
SequenceLength = Annotated[int, typer.Option(metavar="TOKENS", help="Tokens in a sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences per optimiser step, over all processes.")]
MicroBatchSize = Annotated[
    int | None, typer.Option(help="Sequences per pass; fewer need less memory. By default all of a step.")
]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate of a cosine schedule.")]
GateLearningRate = Annotated[float | None, typer.Option(help="Peak learning rate of the gates.")]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay; gates, norms and biases have none.")]
WarmupShare = Annotated[float, typer.Option(help="Fraction of the steps in which the learning rate rises.")]
BFloat16 = Annotated[bool, typer.Option("--bf16", help="Compute in bf16; weights and optimiser stay in fp32.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory for activations, a third more time.")
]
Seed = Annotated[int, typer.Option(help="Random seed of the order of the data and of new weights.")]
SaveEvery = Annotated[
    int | None, typer.Option(min=1, metavar="STEPS", help="Steps between checkpoints; by default a twentieth of all.")
]
EvalEvery = Annotated[
    int | None, typer.Option(min=1, metavar="STEPS", help="Steps between evaluations; by default a tenth of all.")
]
Checkpoints = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="For checkpoints and tokens; TARGET.checkpoints by default.")
]
KeepCheckpoints = Annotated[bool, typer.Option("--keep-checkpoints", help="Keep that folder at the end.")]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="auto, cpu or cuda. CUDA_VISIBLE_DEVICES=1 chooses the second GPU.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print parameters, memory and time; write nothing.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any of Transformers' TrainingArguments; repeatable."),
]
Chunk = Annotated[int, typer.Option(min=1, help="Positions whose logits exist at one time.")]


def settings_values(options: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `TrainingSettings` that a command's options give.

    Args:
        options (`dict`): the command's parameters by name; names that are no setting are left out.
    """
    from dataclasses import fields

    from egmla.training import TrainingSettings
    from egmla.training.settings import parse_count, parse_training_arguments

    values = {item.name: options[item.name] for item in fields(TrainingSettings) if item.name in options}
    return {
        **values,
        "tokens": parse_count(options["tokens"]),
        "eval_data": options["eval_data"] or [],
        "device": None if options["device"] == "auto" else options["device"],
        "dtype": None if options["dtype"] == "auto" else options["dtype"].value,
        "arguments": parse_training_arguments(options["settings"] or ()),
    }


def run_shown(start, target: Path, **arguments: Any) -> None:
    """Run `start(target, ...)` of `egmla.training`; show its progress on stderr and its result as a table."""
    from rich.console import Console

    from .common import interruption_says, progress_bars

    stderr = Console(stderr=True, soft_wrap=True, highlight=False)

    def left_behind() -> str | None:
        from egmla.training.run_folders import RunFolders

        if arguments.get("dry_run") or not is_first():
            return None
        try:
            return RunFolders.of(target, arguments["checkpoints"], arguments["resume"]).left_behind()
        except (OSError, ValueError):  # the target is there, or never was possible
            return None

    with interruption_says(left_behind), progress_bars() as progress:
        report = start(
            target=target,
            progress=progress,
            say=lambda text: stderr.print(text, markup=False),
            show_plan=lambda plan: stderr.print(plan_line(plan), markup=False),
            **arguments,
        )
    if arguments.get("dry_run"):
        print_plan(report)
    elif is_first():
        print_report(report, target)


def is_first() -> bool:
    """Return whether this is the only process of a run, or the first of several."""
    from accelerate import PartialState

    return PartialState().is_main_process


def plan_line(plan: dict) -> str:
    """Describe a plan in one line."""
    from .common import in_bytes, in_units

    memory = in_bytes(sum(plan["memory_bytes"].values()))
    return (
        f"Training {in_units(plan['trained_parameters'])} of {in_units(plan['parameters'])} parameters on "
        f"{plan['tokens']:,} tokens in {plan['steps']:,} steps: {plan['flops']:.2g} operations, about {memory} of "
        f"memory, roughly {rough_time(plan['estimated_seconds'])} here"
    )


def rough_time(seconds: float) -> str:
    """Write an estimated time for people: under a minute, 12 minutes, 5 hours, 3 days."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size or (unit == "minute" and seconds >= size):
            count = round(seconds / size)
            return f"{count:,} {unit}{'s' if count > 1 else ''}"
    return "under a minute"


def print_plan(plan: dict) -> None:
    from rich.table import Table

    from .common import console, in_bytes, in_units

    table = Table("", "", title="Plan (nothing was written)", show_header=False)
    table.add_row("parameters", in_units(plan["parameters"]))
    table.add_row("parameters trained", in_units(plan["trained_parameters"]))
    if plan["teacher_parameters"]:
        table.add_row("parameters of the teacher", in_units(plan["teacher_parameters"]))
    table.add_row("optimiser steps", f"{plan['steps']:,}")
    table.add_row("tokens", f"{plan['tokens']:,}")
    table.add_row("floating point operations", f"{plan['flops']:.3g}")
    table.add_section()
    for name, size in plan["memory_bytes"].items():
        if size:
            table.add_row(f"memory: {name}", in_bytes(size))
    table.add_row("rough memory of a process", in_bytes(sum(plan["memory_bytes"].values())))
    table.add_section()
    table.add_row("rough time here", rough_time(plan["estimated_seconds"]))
    console().print(table)


def print_report(report: dict, target: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from egmla.training.report import outcome

    from .common import console, in_bytes

    text = ", ".join(source["name"] for source in report["evaluation"]["text"])
    kind = "held out of" if report["evaluation"]["held_out"] else "of"
    caption = f"{report['evaluation']['tokens']:,} tokens {kind} {text}"
    table = Table(title=Text(f"Written to {target}"), caption=Text(caption))
    table.add_column("")
    table.add_column("perplexity", justify="right")
    for name, label in (("teacher", "teacher"), ("0 tokens", "after 0 tokens")):
        if report["perplexity"][name] is not None:
            table.add_row(label, f"{report['perplexity'][name]:.3f}")
    table.add_row(f"after {report['tokens']:,} tokens", f"{report['perplexity']['trained']:.3f}")
    out = console()
    out.print(table)
    if sentence := outcome(report["perplexity"]):
        out.print(sentence, markup=False)
    out.print(f"{report['seconds']:,} s, peak of memory {in_bytes(report['peak_bytes'])}.", style="dim")
