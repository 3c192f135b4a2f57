"""`egmla eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Device
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


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal model, EG-MLA or not.")],
    tasks: Tasks,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    batch_size: BatchSize = "1",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Results as JSON in lm-eval's format.")] = None,
    model_args: ModelArgs = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    settings: Settings = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Score a model with lm-eval: a table with standard errors, results as JSON."""
    from egmla.evaluation.harness import check_output, parse_model_args, parse_settings, scores, write_results
    from egmla.evaluation.harness import evaluate as score

    from .common import chosen_device, console, quiet_lm_eval, quiet_transformers, read_limit, split_names

    # Without a choice lm-eval's own ways to name a device stay in force.
    on = {} if (where := chosen_device(device)) is None else {"device": where}
    more = parse_settings(settings or ())
    if output is not None:
        check_output(output)
    quiet_transformers()
    set_threads(threads)
    with quiet_lm_eval():
        results = score(
            model,
            split_names(tasks),
            num_fewshot=num_fewshot,
            batch_size=read_batch_size(batch_size),
            model_args=parse_model_args(model_args),
            data_dir=data_dir,
            include_path=include_path,
            **{"limit": read_limit(limit), **on, **more},
        )
    console().print(_table(model, scores(results)))
    if output is not None:
        write_results(output, results)
        console().print(f"Written to {output}", style="dim", soft_wrap=True)


def _table(model: str, rows: list[dict]):
    from rich.table import Table
    from rich.text import Text

    from egmla.evaluation.compare import metric_name

    table = Table(title=Text(model))
    table.add_column("task", no_wrap=True)
    table.add_column("metric")
    for heading in ("value", "standard error", "questions"):
        table.add_column(heading, justify="right")
    for row in rows:
        name = metric_name(row["metric"], row["filter"])
        error = "none" if row["stderr"] is None else f"{row['stderr']:.4f}"
        table.add_row(row["task"], name, f"{row['value']:.4f}", error, f"{row['questions']:,}")
    return table
