"""Comparisons and benchmarks as pictures. Needs the `plot` extra (matplotlib)."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


# Of a benchmark: figure of a row, heading, file.
BENCH_FIGURES = {
    "ms_per_token.png": ("ms_median", "ms per decode step (bars: 10 to 90 %)", 1.0),
    "cache_bytes.png": ("cache_used_bytes", "cache in use, MiB", 2.0**-20),
}
LINE_STYLES = ("-", "--", ":", "-.")


def plot_bench(report: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Draws time of a decode step and cache bytes against the context, a panel per subject, format and batch.

    Models have colours, their kinds of cache line styles; both axes are logarithmic.

    Args:
        report (`Mapping`): as of `run_bench`.
        folder (`str`): where to save `ms_per_token.png` and `cache_bytes.png`.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    check_matplotlib()
    from .contestants import CONTESTANTS

    rows = report["decode"]
    styles: dict[str, tuple[str, str]] = {}
    roles: dict[str, int] = {}  # of each, how many contestants there are
    for name in CONTESTANTS:
        if any(row["contestant"] == name for row in rows):
            role = CONTESTANTS[name].role
            number = roles.setdefault(role, 0)
            roles[role] += 1
            colour = COLOURS[(2 + list(roles).index(role)) % len(COLOURS)]
            styles[name] = colour, LINE_STYLES[number % len(LINE_STYLES)]
    machine = report["machine"]
    note = f"{machine['processor']}, {machine['threads']} threads, torch {report['settings']['versions']['torch']}"
    for file, (key, heading, scale) in BENCH_FIGURES.items():
        _plot_rows(rows, styles, Path(folder) / file, key, heading, scale, note)


def _plot_rows(
    rows: Sequence[Mapping[str, Any]],
    styles: Mapping[str, tuple[str, str]],
    path: Path,
    key: str,
    heading: str,
    scale: float,
    note: str,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    across = ("subject", "dtype")
    columns = list(dict.fromkeys(row["batch"] for row in rows))
    lines = list(dict.fromkeys(tuple(row[name] for name in across) for row in rows))
    figure = Figure(figsize=(4.4 * len(columns) + 0.6, 3.2 * len(lines) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for line, (subject, dtype) in enumerate(lines):
        for column, batch in enumerate(columns):
            axis = axes[line][column]
            here = [row for row in rows if (row["subject"], row["dtype"], row["batch"]) == (subject, dtype, batch)]
            for name, (colour, style) in styles.items():
                points = sorted((row for row in here if row["contestant"] == name), key=lambda row: row["context"])
                if not points:
                    continue
                values = [scale * point[key] for point in points]
                spread = None
                if key == "ms_median":
                    spread = [
                        [max(0.0, point["ms_median"] - point["ms_p10"]) for point in points],
                        [max(0.0, point["ms_p90"] - point["ms_median"]) for point in points],
                    ]
                contexts = [point["context"] for point in points]
                look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 4}
                drawn = axis.errorbar(contexts, values, yerr=spread, capsize=2, elinewidth=0.8, **look)
                handles.setdefault(points[0]["label"], drawn)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.yaxis.set_major_formatter(plain)
            low, high = axis.get_ylim()
            axis.yaxis.set_minor_formatter(plain if high < 8 * low else NullFormatter())
            axis.set_title(f"{subject}, {dtype}, batch {batch}", fontsize=9, loc="left")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper left", ncols=min(4, len(handles)), frameon=False
    )
    figure.supylabel(heading, fontsize=10)
    figure.supxlabel(f"tokens in the cache\n{note}", fontsize=9)
    figure.savefig(path, dpi=160)
