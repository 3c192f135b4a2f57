"""`egmla sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, DType, Resume


def sweep(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, a .gguf file or a Hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder for the models, sweep.json and sweep.png.")],
    cache: Annotated[str, typer.Option(metavar="FRACTIONS", help="Fractions of the source's cache: 0.5,0.3125.")],
    calibration: Annotated[Path, typer.Option(metavar="FILE", help="Plain text to calibrate with.")],
    evaluate: Annotated[Path, typer.Option(metavar="FILE", help="Other plain text, to measure perplexity on.")],
    recipe: Annotated[
        str, typer.Option(metavar="NAMES", help="Recipes: default,transmla-like,mha2mla-like.")
    ] = "default",
    choices: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A choice of each recipe, or as refine.KEY=VALUE of the refinement; repeatable.",
        ),
    ] = None,
    latent_norm: Annotated[
        bool, typer.Option("--latent-norm", help="Give the latents a norm, which --layout deepseek_v3 wants.")
    ] = False,
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="egmla or deepseek_v3, as in convert.")] = "egmla",
    qk_rope_head_dim: Annotated[
        int | None, typer.Option(metavar="P", help="Width of the shared rotary key, the same in all.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to calibrate with at most; as in convert by default.")
    ] = None,
    refine_steps: Annotated[
        int | None, typer.Option(min=0, help="Training steps of each layer's attention; as in convert by default.")
    ] = None,
    refine_gate: Annotated[
        bool, typer.Option("--refine-gate", help="Train the gates with the rest of each layer's attention.")
    ] = False,
    evaluation_windows: Annotated[int, typer.Option(min=1, help="Windows to measure, 2,048 tokens each.")] = 9,
    dtype: Annotated[DType, typer.Option(help="dtype of the written weights; auto keeps the source's.")] = DType.auto,
    device: Device = "auto",
    resume: Resume = True,
) -> None:
    """Convert a model at several cache sizes and measure each. The same command resumes an interrupted run."""
    from egmla.conversion.recipes import find_refinement, split_choices
    from egmla.conversion.sweep import sweep as run_sweep

    from .common import (
        chosen_device,
        console,
        interruption_says,
        progress_bars,
        quiet_transformers,
        read_settings,
        split_names,
    )

    quiet_transformers()
    of_recipes, of_refinement = split_choices(read_settings(choices or ()))
    if latent_norm:
        of_recipes["latent_norm"] = True
    options = {} if layout == "egmla" else {"layout": layout}
    with interruption_says(lambda: _kept(target) if resume else None), progress_bars() as progress:
        report = run_sweep(
            source,
            target,
            _fractions(cache),
            calibration=calibration,
            evaluate=evaluate,
            recipes=split_names(recipe),
            choices=of_recipes,
            qk_rope_head_dim=qk_rope_head_dim,
            calibration_tokens=calibration_tokens,
            refinement=find_refinement(refine_steps, refine_gate, of_refinement),
            evaluation_windows=evaluation_windows,
            dtype=None if dtype is DType.auto else dtype.value,
            device=chosen_device(device),
            resume=resume,
            progress=progress,
            **options,
        )
    _print_report(report)
    console().print(f"Wrote sweep.json and sweep.png in {target}", style="dim", markup=False, soft_wrap=True)


def _kept(target: Path) -> str | None:
    """Return what an interrupted sweep has left to resume from."""
    from egmla.conversion.sweep import SWEEP_REPORT

    if not (target / SWEEP_REPORT).is_file():
        return None
    return "The models and layers that are finished are kept, and the same command resumes from there."


def _fractions(text: str) -> list[float]:
    from .common import split_names

    try:
        return [float(part) for part in split_names(text)]
    except ValueError:
        raise ValueError(
            f"--cache {text}: must be fractions of the source's cache separated by commas: 0.5,0.25."
        ) from None


def _print_report(report: dict) -> None:
    from rich.table import Table
    from rich.text import Text

    from .common import console

    source, evaluation = report["source"], report["settings"]["evaluation"]
    caption = (
        f"{evaluation['windows']} windows of {evaluation['window']:,} tokens of {evaluation['file']}; "
        "* no other one is smaller and better at once"
    )
    table = Table("recipe", title=Text(source["name"]), caption=Text(caption))
    for heading in ("cache kept", "P + R", "elements per token", "perplexity", "of source", ""):
        table.add_column(heading, justify="right")
    table.add_row("source", "100.0%", "", f"{source['elements']:,}", f"{source['perplexity']:.3f}", "1.000", "")
    for row in report["rows"]:
        ranks = sorted(set(row["ranks"]))
        table.add_row(
            row["recipe"],
            f"{row['cache_kept']:.1%}",
            f"{row['rope_dim']} + {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}",
            f"{row['elements']:,}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / source['perplexity']:.3f}",
            "*" if row["best"] else "",
        )
    console().print(table)
