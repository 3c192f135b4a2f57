"""Plots of a benchmark. Needs the `plot` extra (matplotlib)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from egmla.utils.plotting import COLOURS, check_matplotlib


# File name: key of a row, heading, scale.
BENCH_FIGURES = {
    "ms_per_token.png": ("ms_median", "ms per decode step (bars: 10 to 90 %)", 1.0),
    "cache_bytes.png": ("cache_used_bytes", "cache in use, MiB", 2.0**-20),
}
LINE_STYLES = ("-", "--", ":", "-.")


def plot_bench(report: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Draw the time of a decode step and cache bytes against the context, one panel per subject, dtype and batch.

    A model has a colour, a kind of cache a line style. Both axes are logarithmic.

    Args:
        report (`Mapping`): as `run_bench` returns it.
        folder (`str`): where to save `ms_per_token.png` and `cache_bytes.png`.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    check_matplotlib()
    from .contestants import CONTESTANTS

    rows = report["decode"]
    styles: dict[str, tuple[str, str]] = {}
    roles: dict[str, int] = {}  # number of contestants of each role
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
