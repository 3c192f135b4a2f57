"""Measure several models side by side for `egmla demo`: cache bytes, perplexity and decode speed in one table."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from egmla.utils.accounting import cache_id_bytes
from egmla.utils.perplexity import perplexity, token_windows
from egmla.utils.plotting import COLOURS, check_matplotlib

from .decode import time_decode


@dataclass
class ComparisonRow:
    """Results of one model.

    Attributes:
        model (`str`): its name in the table.
        cache_elements_per_token (`int`): elements in use per cached token, all layers.
        cache_bytes_per_token (`float`): bytes in use per cached token, all layers, counted in the filled cache.
        perplexity (`float`): on the windows of the text.
        decode_tokens_per_second (`float`): from the median step at the context.
        decode_ms_median, decode_ms_p10, decode_ms_p90 (`float`): milliseconds of a step.
        cache_used_bytes, cache_allocated_bytes (`int`): of the cache filled to the context.
    """

    model: str
    cache_elements_per_token: int
    cache_bytes_per_token: int
    perplexity: float
    decode_tokens_per_second: float
    decode_ms_median: float
    decode_ms_p10: float
    decode_ms_p90: float
    cache_used_bytes: int
    cache_allocated_bytes: int

    def to_dict(self) -> dict:
        return asdict(self)


def compare(
    models: Mapping[str, PreTrainedModel],
    tokenizer,
    text: str,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    context: int = 8192,
    steps: int = 4,
    rounds: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[ComparisonRow]:
    """Measure models that share a tokenizer.

    Args:
        models (`Mapping[str, PreTrainedModel]`): the models by name.
        tokenizer: their tokenizer.
        text (`str`): text for the perplexity.
        window, max_windows (`int`): see `token_windows`.
        context (`int`): tokens in the cache while decoding is timed; the past is synthetic.
        steps, rounds (`int`): see `time_decode`.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `list[ComparisonRow]`: a row per model, in the order given.
    """
    windows = token_windows(tokenizer, text, window, max_windows)
    perplexities = {}
    for name, model in models.items():
        stage = f"Perplexity of {name}"
        perplexities[name] = perplexity(model, windows, _of_stage(progress, stage))
    stage = "Decode speed, interleaved"
    timings = time_decode(models, context, steps=steps, rounds=rounds, warmup=1, progress=_of_stage(progress, stage))
    rows = []
    for name, model in models.items():
        timing = timings[name]
        bytes_per_token = timing.cache_used_bytes // (timing.context * timing.batch_size)
        rows.append(
            ComparisonRow(
                model=name,
                cache_elements_per_token=(bytes_per_token - cache_id_bytes(model.config)) // model.dtype.itemsize,
                cache_bytes_per_token=bytes_per_token,
                perplexity=perplexities[name],
                decode_tokens_per_second=timing.tokens_per_second,
                decode_ms_median=1e3 * timing.median,
                decode_ms_p10=1e3 * timing.p10,
                decode_ms_p90=1e3 * timing.p90,
                cache_used_bytes=timing.cache_used_bytes,
                cache_allocated_bytes=timing.cache_allocated_bytes,
            )
        )
    return rows


def _of_stage(progress: Callable[[str, int, int], None] | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def measurement_notes(
    models: Mapping[str, PreTrainedModel], window: int, max_windows: int | None, context: int
) -> dict:
    """Describe the measurement for readers of its results: versions, threads, dtype, sizes."""
    import transformers

    dtypes = {str(model.dtype).removeprefix("torch.") for model in models.values()}
    return {
        "dtype": ", ".join(sorted(dtypes)),
        "device": ", ".join(sorted({model.device.type for model in models.values()})),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "perplexity_window": window,
        "perplexity_windows": max_windows,
        "decode_context": context,
        "batch_size": 1,
    }


def plot_comparison(rows: Sequence[ComparisonRow], path: str | os.PathLike, title: str, note: str = "") -> None:
    """Draw a bar chart per result, with the models side by side, and save it as PNG.

    Args:
        rows (`Sequence[ComparisonRow]`): the models, at most six.
        path (`str`): the file to write.
        title (`str`): heading.
        note (`str`): small print: where and how it was measured.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
        ValueError: for no rows, or more rows than colours.
    """
    if not 1 <= len(rows) <= len(COLOURS):
        raise ValueError(f"{len(rows)} models: from 1 to {len(COLOURS)} can be drawn.")
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    speeds = [row.decode_tokens_per_second for row in rows]
    # A slow step is a low speed, so the tenth percentile of the times is the upper end.
    slower = [row.decode_ms_median / row.decode_ms_p90 for row in rows]
    faster = [row.decode_ms_median / row.decode_ms_p10 for row in rows]
    spread = [
        [speed * (1 - ratio) for speed, ratio in zip(speeds, slower, strict=True)],
        [speed * (ratio - 1) for speed, ratio in zip(speeds, faster, strict=True)],
    ]
    panels: tuple[tuple[str, str, list[float], str, list[list[float]] | None], ...] = (
        ("Cache per token", "KiB, less is better", [row.cache_bytes_per_token / 1024 for row in rows], "{:.1f}", None),
        ("Perplexity", "less is better", [row.perplexity for row in rows], "{:.2f}", None),
        ("Decode speed", "tokens/s, more is better", speeds, "{:.2f}", spread),
    )
    # Not pyplot: it would pick a display and keep the figure alive.
    figure = Figure(figsize=(10, 1.9 + 0.55 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    names = [row.model for row in rows]
    for axis, (heading, unit, values, pattern, spread_of_values) in zip(axes, panels, strict=True):
        bars = axis.barh(
            names, values, xerr=spread_of_values, color=COLOURS[: len(rows)], height=0.62, ecolor="#333333"
        )
        axis.bar_label(bars, labels=[pattern.format(value) for value in values], padding=4, fontsize=11)
        axis.set_title(heading, fontsize=12, fontweight="bold", loc="left")
        axis.set_xlabel(unit, fontsize=10)
        axis.set_xlim(0, 1.25 * max(values) + (max(spread_of_values[1]) if spread_of_values else 0))
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0, labelsize=11)
        axis.tick_params(axis="x", labelsize=9)
        axis.xaxis.set_major_locator(_few_ticks())
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    if note:
        figure.supxlabel(note, fontsize=8.5, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=160)


def _few_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, min_n_ticks=2)
