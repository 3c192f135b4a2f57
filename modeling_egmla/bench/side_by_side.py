"""Measure several caches side by side for `egmla demo`: bytes, perplexity, retrieval and decode speed in one table."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from egmla.utils.perplexity import cached_losses, token_windows
from egmla.utils.plotting import COLOURS, check_matplotlib
from egmla.utils.progress import Progress, stage_progress
from egmla.utils.retrieval import make_passages, measure_retrieval, summarise, token_counter

from .decode import CacheMaker, time_decode


@dataclass(frozen=True)
class Contestant:
    """A model with a cache.

    Attributes:
        model (`PreTrainedModel`): the model.
        make_cache (`Callable`): makes an empty cache of it.
        share (`float`): bytes of that cache, of those of the source's cache in bf16, at a long context.
        timed (`bool`): whether decoding is timed; not where a cache only imitates its numbers.
    """

    model: PreTrainedModel
    make_cache: Callable[[], Cache]
    share: float
    timed: bool = True


@dataclass
class ComparisonRow:
    """Results of one contestant.

    Attributes:
        name (`str`): its name in the table.
        cache_share (`float`): see `Contestant`.
        perplexity (`float`): on the windows of the text, read in chunks through the cache.
        retrieved, questions (`int`): facts found in a context, of those asked for.
        retrieval_interval (`list[float]`): 95 % interval of their share.
        decode_tokens_per_second (`float`, *optional*): from the median step at the context.
        decode_ms_median, decode_ms_p10, decode_ms_p90 (`float`, *optional*): milliseconds of a step.
    """

    name: str
    cache_share: float
    perplexity: float
    retrieved: int
    questions: int
    retrieval_interval: list[float]
    decode_tokens_per_second: float | None = None
    decode_ms_median: float | None = None
    decode_ms_p10: float | None = None
    decode_ms_p90: float | None = None

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        window, windows (`int`): tokens of a window of the perplexity's text, and windows; `None` for the whole text.
        passage, passages, questions (`int`): tokens of a passage of the retrieval, passages, and questions of each.
        context (`int`): tokens in the cache while decoding is timed; the past is synthetic.
        steps, rounds (`int`): see `time_decode`.
    """

    window: int = 1024
    windows: int | None = None
    passage: int = 512
    passages: int = 6
    questions: int = 8
    context: int = 8192
    steps: int = 4
    rounds: int = 4


def compare(
    contestants: Mapping[str, Contestant],
    tokenizer,
    text: str,
    sizes: Sizes,
    progress: Progress | None = None,
) -> list[ComparisonRow]:
    """Measure contestants that share a tokenizer.

    Args:
        contestants (`Mapping[str, Contestant]`): models with their caches, by name.
        tokenizer: their tokenizer.
        text (`str`): text for the perplexity, and to hide facts in.
        sizes (`Sizes`): how much is measured.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `list[ComparisonRow]`: a row per contestant, in the order given.
    """
    windows = token_windows(tokenizer, text, sizes.window, sizes.windows)
    count = token_counter(tokenizer)
    passages = make_passages(text, sizes.passage, sizes.passages, sizes.questions, count_tokens=count)
    rows = []
    for name, contestant in contestants.items():
        stage = stage_progress(f"Perplexity, {name}", progress)
        losses = cached_losses(contestant.model, windows, contestant.make_cache, progress=stage)
        stage = stage_progress(f"Retrieval, {name}", progress)
        hits = measure_retrieval(contestant.model, tokenizer, passages, contestant.make_cache, progress=stage)
        found = summarise(passages, hits)
        perplexity = math.exp(float(losses.mean()))
        counts = found["hits"], found["questions"], found["interval"]
        rows.append(ComparisonRow(name, contestant.share, perplexity, *counts))
    _time(contestants, rows, sizes, stage_progress("Decode speed, interleaved", progress))
    return rows


def _cache_maker(contestant: Contestant) -> CacheMaker:
    return lambda model, tokens: contestant.make_cache()


def _time(contestants: Mapping[str, Contestant], rows: Sequence[ComparisonRow], sizes: Sizes, progress) -> None:
    """Fill in the times of those contestants that are timed."""
    timed = {name: contestant for name, contestant in contestants.items() if contestant.timed}
    timings = time_decode(
        {name: contestant.model for name, contestant in timed.items()},
        sizes.context,
        caches={name: _cache_maker(contestant) for name, contestant in timed.items()},
        steps=sizes.steps,
        rounds=sizes.rounds,
        warmup=1,
        progress=progress,
    )
    for row in rows:
        if row.name in timings:
            timing = timings[row.name]
            row.decode_tokens_per_second = timing.tokens_per_second
            row.decode_ms_median, row.decode_ms_p10, row.decode_ms_p90 = (
                1e3 * seconds for seconds in (timing.median, timing.p10, timing.p90)
            )


def measurement_notes(contestants: Mapping[str, Contestant], sizes: Sizes) -> dict:
    """Describe the measurement for readers of its results: versions, threads, dtype, sizes."""
    import transformers

    models = [contestant.model for contestant in contestants.values()]
    return {
        "dtype": ", ".join(sorted({str(model.dtype).removeprefix("torch.") for model in models})),
        "device": ", ".join(sorted({model.device.type for model in models})),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sizes": asdict(sizes),
        "batch_size": 1,
    }


def plot_comparison(rows: Sequence[ComparisonRow], path: str | os.PathLike, title: str, note: str = "") -> None:
    """Draw a bar chart per result, with the rows side by side, and save it as PNG.

    Args:
        rows (`Sequence[ComparisonRow]`): the contestants, at most six.
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

    # A slow step is a low speed, so the tenth percentile of the times is the upper end.
    speeds = [row.decode_tokens_per_second or 0.0 for row in rows]
    spread: list[list[float]] = [[], []]
    for row, speed in zip(rows, speeds, strict=True):
        median = row.decode_ms_median or 1.0  # not timed: no bar, and no line
        spread[0].append(speed * (1 - median / (row.decode_ms_p90 or median)))
        spread[1].append(speed * (median / (row.decode_ms_p10 or median) - 1))
    found = [100 * row.retrieved / row.questions for row in rows]
    ends = [(100 * low, 100 * high) for low, high in (row.retrieval_interval for row in rows)]
    around = [
        [share - low for share, (low, _) in zip(found, ends, strict=True)],
        [high - share for share, (_, high) in zip(found, ends, strict=True)],
    ]
    panels: tuple[tuple[str, str, list[float], str, list[list[float]] | None], ...] = (
        ("Cache", "% of the source's bytes in bf16", [100 * row.cache_share for row in rows], "{:.1f}", None),
        ("Perplexity", "less is better", [row.perplexity for row in rows], "{:.2f}", None),
        ("Retrieved", "% of the facts asked for", found, "{:.0f}", around),
        ("Decode speed", "tokens/s, more is better", speeds, "{:.2f}", spread),
    )
    # Not pyplot: it would pick a display and keep the figure alive.
    figure = Figure(figsize=(13, 1.9 + 0.55 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True)
    names = [row.name for row in rows]
    for axis, (heading, unit, values, pattern, spread_of_values) in zip(axes, panels, strict=True):
        bars = axis.barh(
            names, values, xerr=spread_of_values, color=COLOURS[: len(rows)], height=0.62, ecolor="#333333"
        )
        axis.bar_label(
            bars, labels=[pattern.format(value) if value else "-" for value in values], padding=4, fontsize=11
        )
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
