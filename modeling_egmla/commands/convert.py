"""`egmla convert`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, DType, Resume


def convert(
    source: Annotated[str, typer.Argument(help="Folder of a checkpoint, a .gguf file or a Hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must be absent or empty.")],
    kv_lora_rank: Annotated[
        str | None, typer.Option(metavar="R", help="Latent width: a number, or one per layer separated by commas.")
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None, typer.Option(metavar="P", help="Width of the shared rotary key, even.")
    ] = None,
    cache: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", help="Share of the source's cache to keep, in bytes, such as 0.25."),
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option(metavar="bits|bf16", help="bf16: reach that share by rank alone; bits by default.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(metavar="R", help="With bits, most channels of a layer's latent: each costs time.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Full rank: the same function as the source, no smaller cache.")
    ] = False,
    calibration: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Plain text; repeatable.")] = None,
    shipped_text: Annotated[bool, typer.Option(help="With bits, calibrate on the package's own text too.")] = True,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of it to read at most; 65,536, or 196,608 with refinement.")
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Training steps of each layer's attention on that text, 0 for none; 250 by default."),
    ] = None,
    refine_gate: Annotated[
        bool, typer.Option("--refine-gate", help="Train the gate with the rest of each layer's attention.")
    ] = False,
    evaluate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Other plain text, to measure perplexity on before and after.")
    ] = None,
    evaluation_windows: Annotated[int, typer.Option(min=1, help="Windows of it, 2,048 tokens each, at most.")] = 9,
    heal: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Then train it towards its source on so many tokens: 300K.")
    ] = None,
    heal_data: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to heal on; the calibration texts by default.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME", help="Recipe: default, transmla-like or mha2mla-like."),
    ] = "default",
    choices: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A choice of the recipe, or as refine.KEY=VALUE of the refinement; repeatable.",
        ),
    ] = None,
    latent_norm: Annotated[
        bool, typer.Option("--latent-norm", help="Give the latent a norm, which --layout deepseek_v3 wants.")
    ] = False,
    layout: Annotated[
        str, typer.Option(metavar="LAYOUT", help="egmla, or deepseek_v3: a checkpoint of DeepSeek's own class.")
    ] = "egmla",
    dtype: Annotated[DType, typer.Option(help="dtype of the written weights; auto keeps the source's.")] = DType.auto,
    device: Device = "auto",
    resume: Resume = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.")] = False,
) -> None:
    """Convert a model with multi-head, grouped-query or latent attention to EG-MLA."""
    from egmla.conversion import ConversionSettings, find_recipe
    from egmla.conversion.recipes import find_refinement, split_choices

    from .common import chosen_device, quiet_transformers, read_settings

    quiet_transformers()
    of_recipe, of_refinement = split_choices(read_settings(choices or ()))
    settings = ConversionSettings(
        exact=exact,
        kv_lora_rank=_ranks(kv_lora_rank),
        qk_rope_head_dim=qk_rope_head_dim,
        cache=cache,
        cache_dtype=cache_dtype,
        max_rank=max_rank,
        calibration=calibration,
        shipped_text=shipped_text,
        calibration_tokens=calibration_tokens,
        refinement=find_refinement(refine_steps, refine_gate, of_refinement),
        evaluate=evaluate,
        evaluation_windows=evaluation_windows,
        recipe=find_recipe(recipe, of_recipe),
        latent_norm=latent_norm,
        layout=layout,
        dtype=None if dtype is DType.auto else dtype.value,
        device=chosen_device(device),
        resume=resume,
        dry_run=dry_run,
    )
    if heal is not None:
        _convert_and_heal(source, target, settings, heal, heal_data)
    else:
        _convert(source, target, settings, heal_data)


def _convert(source: str, target: Path, settings: Any, heal_data: list[str] | None) -> None:
    from egmla.conversion import convert_checkpoint

    from .common import console, interruption_says, progress_bars

    if heal_data:
        raise ValueError("--heal-data without --heal: nothing is healed; say on how many tokens (--heal 300K).")
    with interruption_says(lambda: _kept(target) if settings.resume else None), progress_bars() as progress:
        report = convert_checkpoint(source, target, settings, progress=progress)
    _print_report(report, "Plan (nothing was written)" if settings.dry_run else f"Converted to {target}")
    if not settings.dry_run and settings.layout == "egmla":
        command = f"egmla generate {shlex.quote(str(target))} --prompt 'What is the capital of France?'"
        console().print(f"Try it: {command}", style="dim", markup=False)


def _convert_and_heal(source: str, target: Path, conversion: Any, tokens: str, data: list[str] | None) -> None:
    """Convert, heal, measure, and write the card; each step shows what it found."""
    from rich.console import Console

    from egmla.conversion.settings import check_settings
    from egmla.model_cards import write_card
    from egmla.training import convert_and_heal
    from egmla.training.conversion_and_healing import MEASURED, healing_settings
    from egmla.training.settings import parse_count

    from .common import interruption_says, progress_bars
    from .training import print_plan as print_training_plan
    from .training import print_report as print_training

    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    texts = data or [str(path) for path in check_settings(conversion).calibration]
    healing = healing_settings(texts, parse_count(tokens), conversion)
    kept = "What is finished is kept, and the same command goes on from there." if conversion.resume else None
    with interruption_says(lambda: kept), progress_bars() as progress:
        report = convert_and_heal(
            source,
            target,
            conversion,
            healing,
            progress=progress,
            say=lambda text: stderr.print(text, markup=False),
        )
    if conversion.dry_run:
        _print_report(report["conversion"], "Plan (nothing was written)")
        print_training_plan(report["healing"])
        return
    _print_report(report["conversion"] | {"evaluation": report.get(MEASURED)}, f"Converted to {target}")
    print_training(report, target)
    for path in write_card(target):
        stderr.print(f"Wrote {path}", markup=False)


def _kept(target: Path) -> str | None:
    """Return what an interrupted conversion has left to resume from."""
    from egmla.utils.folders import JOURNAL, staging_path

    target = target.resolve()
    if (staging_path(target) / JOURNAL).is_file():
        return "The layers that are finished are kept, and the same command resumes from there."
    if (target / "config.json").is_file():
        return "The model is written, and the same command measures it."
    return None


def _ranks(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--kv-lora-rank {text}: must be a number such as 128, or one per layer separated by commas."
        ) from None
    return ranks if "," in text else ranks[0]


def _add_budget(table, budget: dict, first: bool) -> None:
    """Add rows on an allocation: shares of the source's bytes, and how many numbers have how many bits."""
    short, long = (f"{budget['shares'][tokens]:.2%}" for tokens in ("2048", "32768"))
    table.add_row("cache" if first else "or", f"{long} of the bytes at 32,768 tokens, {short} at 2,048")
    if first:
        counts = ", ".join(f"{count:,} of {bits}" for bits, count in budget["channels"].items())
        table.add_row("bits of its numbers, all layers (0: a group's mean)", counts)


def _print_report(report: dict, title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from .common import console

    source, plan, calibration = report["source"], report["plan"], report["calibration"]
    cache = report.get("cache")
    ranks = sorted(set(plan["ranks"]))
    table = Table("", "", title=Text(title), show_header=False)
    table.add_row("source", f"{source['label']} ({source['model_type']}, {len(plan['ranks'])} layers)")
    table.add_row("kv_lora_rank", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}, one per layer")
    table.add_row("qk_rope_head_dim", str(plan["rope_dim"]))
    if "bits" not in report:
        elements = plan["source_elements"], plan["target_elements"]
        table.add_row("cache elements per token", f"{elements[0]:,} -> {elements[1]:,}")
        table.add_row("cache bytes per token, bf16", f"{2 * elements[0]:,} -> {2 * elements[1]:,}")
        table.add_row("cache kept", f"{plan['cache_kept']:.1%}")
    elif cache is None:
        table.add_row("share of the cache's bytes", f"{report['bits']['share']:.1%}")
    for number, budget in enumerate(cache["budgets"] if cache else ()):
        _add_budget(table, budget, first=number == 0)
    if calibration:
        tokens = calibration["sequences"] * calibration["sequence_length"]
        table.add_row("calibration", f"{tokens:,} tokens of {calibration['file']}")
    if evaluation := report.get("evaluation"):
        change = f"{evaluation['source']:.3f} -> {evaluation['converted']:.3f}"
        table.add_row(f"perplexity, {evaluation['windows']} windows of {evaluation['file']}", change)
    if disk := report.get("disk"):
        table.add_row("weights to be written", f"{disk['weights_bytes'] / 1e9:,.2f} GB")
        table.add_row("disk needed meanwhile", f"{disk['needed_bytes'] / 1e9:,.2f} GB")
    if estimate := report.get("estimate"):
        table.add_row("rough time here", f"{estimate['seconds'] / 60:,.0f} minutes")
        table.add_row("rough peak of memory", f"{estimate['memory_bytes'] / 1e9:,.1f} GB")
    if "seconds" in report:
        table.add_row("weights", report["dtype"])
        table.add_row("seconds", f"{report['seconds']:,}")
        table.add_row("peak of memory", f"{report['peak_bytes'] / 1e9:,.1f} GB")
    console().print(table)
    for name in ("rank", "serving"):
        if name in report:
            console().print(report[name], style="yellow", markup=False)
