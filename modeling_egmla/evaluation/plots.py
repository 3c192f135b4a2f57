"""The comparison as a picture. Needs the `plot` extra (matplotlib)."""

import importlib.util
import os
from collections.abc import Sequence

from .comparison import ComparisonRow


# Okabe and Ito's palette: told apart by colour-blind readers, and by lightness in grey.
COLOURS = ("#999999", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#0072B2")


def check_matplotlib() -> None:
    """Raises `ImportError` saying how to install matplotlib when it is missing; ask before measuring for minutes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib, which is not installed; run: pip install 'egmla[plot]'")


def plot_comparison(rows: Sequence[ComparisonRow], path: str | os.PathLike, title: str, note: str = "") -> None:
    """Draws a bar chart per figure of merit, the models side by side in each, and saves it as PNG.

    Args:
        rows (`Sequence[ComparisonRow]`): the models, at most six.
        path (`str`): the file to write.
        title (`str`): heading.
        note (`str`): small print: where and how it was measured.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
        ValueError: for no rows, or more than there are colours.
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
