"""Options that `egmla heal` and `egmla train` share, and how both show a plan and a result."""

from pathlib import Path
from typing import Annotated, Any

import typer


Data = Annotated[
    list[str],
    typer.Option(
        help="Text file, .jsonl file, or data set as NAME[:CONFIGURATION[:SPLIT]]; repeatable, read in turn."
    ),
]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens to train on: 500000, 50M, 1B.")]
EvalData = Annotated[
    list[str] | None, typer.Option(help="Text to evaluate on, as --data; otherwise a share of that is held out.")
]
EvalShare = Annotated[float, typer.Option(help="Share of the data to hold out.")]
EvalTokens = Annotated[int, typer.Option(min=1, help="Tokens to evaluate on at most.")]
TextField = Annotated[str, typer.Option(metavar="NAME", help="Field of the text in .jsonl files and data sets.")]
SequenceLength = Annotated[int, typer.Option(metavar="TOKENS", help="Tokens in a sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences of an optimiser step, over all processes.")]
MicroBatchSize = Annotated[
    int | None, typer.Option(help="Sequences in one pass; less memory. All of a step's by default.")
]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate; then it falls along a cosine.")]
GateLearningRate = Annotated[float | None, typer.Option(help="Peak learning rate of the gates.")]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay; gates, norms and biases have none.")]
WarmupShare = Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")]
BFloat16 = Annotated[bool, typer.Option("--bf16", help="Compute in bf16; weights and optimiser stay in fp32.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory for activations, a third more time.")
]
Seed = Annotated[int, typer.Option(help="Of the order of the data, and of new weights.")]
SaveEvery = Annotated[int | None, typer.Option(min=1, metavar="STEPS", help="Steps between checkpoints; a twentieth.")]
EvalEvery = Annotated[int | None, typer.Option(min=1, metavar="STEPS", help="Steps between evaluations; a tenth.")]
Checkpoints = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="For checkpoints and tokens; TARGET.checkpoints by default.")
]
KeepCheckpoints = Annotated[bool, typer.Option("--keep-checkpoints", help="Leave that folder there at the end.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the same command was interrupted.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print parameters, operations and memory; write nothing.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any of Transformers' TrainingArguments; repeatable."),
]
Chunk = Annotated[int, typer.Option(min=1, help="Positions whose logits exist at one time.")]


def run_shown(start, target: Path, **arguments: Any) -> None:
    """Runs `start(target, ...)` of `egmla.training` with progress on stderr and its result as a table."""
    from rich.console import Console

    from .common import progress_bars

    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with progress_bars() as progress:
            report = start(
                target=target,
                progress=progress,
                say=lambda text: stderr.print(text, markup=False),
                show_plan=lambda plan: stderr.print(plan_line(plan), markup=False),
                **arguments,
            )
    except KeyboardInterrupt:
        stderr.print("Checkpoints stay where they are; the same command with --resume goes on from the newest.")
        raise
    if arguments.get("dry_run"):
        _print_plan(report)
    elif is_first():
        _print_report(report, target)


def is_first() -> bool:
    """Whether this is the only process of a run, or the first of several."""
    from accelerate import PartialState

    return PartialState().is_main_process


def plan_line(plan: dict) -> str:
    """A plan in one line."""
    from .common import in_bytes, in_units

    return (
        f"{in_units(plan['trained_parameters'])} of {in_units(plan['parameters'])} parameters, {plan['tokens']:,} "
        f"tokens in {plan['steps']:,} steps, {plan['flops']:.2g} operations, about "
        f"{in_bytes(sum(plan['memory_bytes'].values()))} of memory"
    )


def _print_plan(plan: dict) -> None:
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
    table.add_row("memory of a process, about", in_bytes(sum(plan["memory_bytes"].values())))
    console().print(table)


def _print_report(report: dict, target: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from egmla.utils.perplexity import recovered_share

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
    share = recovered_share(*(report["perplexity"][name] for name in ("teacher", "0 tokens", "trained")))
    if share is not None:
        out.print(f"{share:.1%} of the loss in log-perplexity won back.")
    out.print(f"{report['seconds']:,} s, {in_bytes(report['peak_bytes'])} of memory at most.", style="dim")
