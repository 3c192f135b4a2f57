"""`egmla eval`."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal model, EG-MLA or not.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups, separated by commas; egmla_paper and egmla_quick too.")],
    limit: Annotated[float | None, typer.Option(help="Questions of each task; below 1 a share of them.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", "--num_fewshot", min=0, help="Solved examples before each question.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", "--batch_size", help="Rows at once, or auto: what fits into memory.")
    ] = "1",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Results as JSON in lm-eval's format.")] = None,
    model_args: Annotated[
        str | None,
        typer.Option(
            "--model-args", "--model_args", metavar="KEY=VALUE,...", help="For lm-eval's hf model: dtype=..."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of JSON-lines files that replace the official data sets.")
    ] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="Folder of further task files; repeatable.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any argument of lm-eval's simple_evaluate; repeatable."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Score a model with lm-eval: the official prompts, a table with standard errors, results as JSON."""
    from egmla.evaluation.harness import evaluate as score
    from egmla.evaluation.harness import parse_model_args, parse_settings, scores, write_json

    from .common import console, quiet_lm_eval, quiet_transformers, read_limit, split_names

    more = parse_settings(settings or ())
    quiet_transformers()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with quiet_lm_eval():
        results = score(
            model,
            split_names(tasks),
            num_fewshot=num_fewshot,
            batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
            model_args=parse_model_args(model_args),
            data_dir=data_dir,
            include_path=include_path,
            **{"limit": read_limit(limit), **more},
        )
    if output is not None:
        write_json(output, results)
    console().print(_table(model, scores(results)))
    if output is not None:
        console().print(f"Written to {output}", style="dim", soft_wrap=True)


def _table(model: str, rows: list[dict]):
    from rich.table import Table

    table = Table(title=model)
    table.add_column("task", no_wrap=True)
    table.add_column("metric")
    for heading in ("value", "standard error", "questions"):
        table.add_column(heading, justify="right")
    for row in rows:
        name = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        error = "none" if row["stderr"] is None else f"{row['stderr']:.4f}"
        table.add_row(row["task"], name, f"{row['value']:.4f}", error, f"{row['questions']:,}")
    return table
