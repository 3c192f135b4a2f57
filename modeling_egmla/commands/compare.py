"""`egmla compare`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Resume
from .scoring import (
    BatchSize,
    DataDir,
    IncludePath,
    Limit,
    ModelArgs,
    NumFewshot,
    Settings,
    Tasks,
    Threads,
    read_batch_size,
    set_threads,
)


def compare(
    models: Annotated[list[str], typer.Argument(metavar="SOURCE MODEL...", help="Folders or Hub ids, source first.")],
    tasks: Tasks,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of comparison.json, scores.png and each model's results.")
    ] = Path("egmla-compare"),
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    batch_size: BatchSize = "1",
    model_args: ModelArgs = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    settings: Settings = None,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = True,
) -> None:
    """Score a source and its conversions side by side. The same command resumes an interrupted run."""
    from rich.console import Console

    from egmla.evaluation.compare import compare_scores
    from egmla.evaluation.harness import parse_model_args, parse_settings
    from egmla.evaluation.plots import plot_scores
    from egmla.utils.plotting import check_matplotlib

    from .common import chosen_device, console, quiet_lm_eval, quiet_transformers, read_limit, split_names

    # Without a choice lm-eval's own ways to name a device stay in force.
    on = {} if (where := chosen_device(device)) is None else {"device": where}
    more = parse_settings(settings or ())
    check_matplotlib()
    quiet_transformers()
    set_threads(threads)
    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    with quiet_lm_eval():
        result = compare_scores(
            models,
            split_names(tasks),
            output,
            num_fewshot=num_fewshot,
            batch_size=read_batch_size(batch_size),
            model_args=parse_model_args(model_args),
            data_dir=data_dir,
            include_path=include_path,
            resume=resume,
            say=lambda text: stderr.print(text, markup=False),
            **{"limit": read_limit(limit), **on, **more},
        )
    plot_scores(result, output / "scores.png")
    console().print(_table(result))
    console().print(
        f"Left in {output}: comparison.json, scores.png, and each model's results in lm-eval's format.",
        style="dim",
        soft_wrap=True,
    )


def _table(result):
    from rich.table import Table

    from egmla.evaluation.compare import metric_name, with_error

    source = result.models[0]
    table = Table(caption="± standard error; in brackets the difference from the source over the same questions")
    table.add_column("")
    for model in result.models:
        table.add_column(model.name, justify="right")
    sizes = [model.cache_bytes_per_token for model in result.models]
    table.add_row("cache bytes per token", *(f"{size:,} ({size / sizes[0]:.0%})" for size in sizes))
    table.add_section()
    cells: dict[str, dict[str, str]] = {}
    for score in result.scores:
        name = f"{score.task} {metric_name(score.metric, score.filter)}"
        text = with_error(score.value, score.stderr)
        if score.model != source.name and score.difference is not None:
            sign = "+" if score.difference >= 0 else ""
            text += f"\n({sign}{with_error(score.difference, score.difference_stderr)})"
        cells.setdefault(f"{name}, n = {score.questions:,}", {})[score.model] = text
    for name, values in cells.items():
        table.add_row(name, *(values.get(model.name, "") for model in result.models))
    return table
