"""Plots of `egmla sweep --peers`: perplexity and retrieval against bytes, a panel per text or length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from egmla.utils.plotting import COLOURS, check_matplotlib

from .peers import SERIES, SOURCE


FIGURES = {"perplexity": "perplexity.png", "retrieval": "retrieval.png"}
BYTES_AT = "32768"  # tokens that the axis of bytes is at
MARKERS = ("s", "o", "v", "^", "D", "X", "P")
PALETTE = (*COLOURS[:2], COLOURS[3], COLOURS[5], COLOURS[2], "#CC79A7", COLOURS[4])  # a colour per series
STANDARD_ERRORS = 2  # length of a bar, either way


def plot_peers(report: Mapping[str, Any], folder: str | Path) -> None:
    """Draw what a sweep has measured, a line per kind of cache, with intervals.

    Args:
        report (`Mapping`): as `sweep_peers` returns it.
        folder (`str` or `Path`): where to save `perplexity.png` and, where it was measured, `retrieval.png`.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    check_matplotlib()
    rows = [row for row in report["rows"] if "shares" in row]
    for kind, file in FIGURES.items():
        keys = list(dict.fromkeys(key for row in rows for key in row[kind]))
        if keys:
            _draw(report, rows, kind, keys, Path(folder) / file)


def _draw(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], kind: str, keys: list[str], path: Path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(2.6 + 5.2 * len(keys), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    shares = [row["shares"][BYTES_AT] for row in rows]
    for axis, key in zip(axes, keys, strict=True):
        for number, series in enumerate(SERIES):
            own = [row for row in rows if row["series"] == series and key in row[kind]]
            if not own:
                continue
            own.sort(key=lambda row: row["shares"][BYTES_AT])
            points = [(row["shares"][BYTES_AT], *_point(kind, row[kind][key])) for row in own]
            places, values, low, high = zip(*points, strict=True)
            look = {"color": PALETTE[number], "marker": MARKERS[number], "markersize": 6, "capsize": 3}
            ours = {"linewidth": 2.5, "zorder": 4} if series == "EG-MLA" else {"linewidth": 1.2, "zorder": 3}
            # A length of 0 where there is no interval draws nothing.
            drawn = axis.errorbar(places, values, yerr=(low, high), elinewidth=1, **look, **ours)
            handles.setdefault(series, drawn)
        of_source = next(row for row in rows if row["series"] == SOURCE)[kind][key]
        axis.axhline(_point(kind, of_source)[0], color=PALETTE[0], linestyle="--", linewidth=1, zorder=1)
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(shares) / 1.15, 1.15)
        ticks = [2.0**-power for power in range(8) if 2.0**-power >= min(shares) / 1.15]
        axis.set_xticks(ticks)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.set_title(_heading(report, kind, key, of_source), fontsize=10, loc="left")
    if kind == "perplexity":
        ends = [_point(kind, row[kind][key]) for row in rows for key in row[kind]]
        lowest, highest = min(value - down for value, down, _ in ends), max(value + up for value, _, up in ends)
        axes[0].set_yscale("symlog", linthresh=1, linscale=0.6)
        axes[0].set_ylim(min(1.3 * lowest, -0.3), max(1.3 * highest, 1))
        steps = [step * 10.0**power for power in range(-1, 5) for step in (1, 2, 5)][2:]
        axes[0].set_yticks(
            [0, *(step for step in steps if step <= highest), *(-step for step in steps if -step >= lowest)]
        )
        axes[0].yaxis.set_minor_locator(NullLocator())
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+,g}" if value else "0"))
        axes[0].set_ylabel("perplexity, % above the source's", fontsize=10)
        note = f"bars: {STANDARD_ERRORS} standard errors of the paired difference over windows"
    else:
        axes[0].set_ylim(-3, 103)
        axes[0].set_ylabel("facts retrieved, %", fontsize=10)
        note = "bars: 95 % intervals (Wilson)"
    figure.supxlabel(
        f"cache, % of the source's bytes in bf16 at 32,768 tokens, everything counted\n{note}", fontsize=9
    )
    figure.suptitle(report["source"]["name"], fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.legend(
        list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.8
    )
    figure.savefig(path, dpi=140)


def _point(kind: str, found: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return a value in % and the lengths of its bar down and up."""
    if kind == "retrieval":
        low, high = found["interval"]
        # Rounding can put an end beyond the value.
        down, up = max(0.0, found["share"] - low), max(0.0, high - found["share"])
        return 100 * found["share"], 100 * down, 100 * up
    ratio, error = found["ratio"], STANDARD_ERRORS * (found["ratio_error"] or 0.0)
    return 100 * (ratio - 1), 100 * ratio * error, 100 * ratio * error


def _heading(report: Mapping[str, Any], kind: str, key: str, of_source: Mapping[str, Any]) -> str:
    if kind == "retrieval":
        return f"passages of {int(key):,} tokens, {of_source['questions']} questions"
    text = report["texts"][key]
    return f"{key}\n{text['windows']} x {text['window']:,} tokens; source {of_source['perplexity']:.2f}"
