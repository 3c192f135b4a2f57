"""Plots of a comparison. Needs the `plot` extra (matplotlib)."""

import math
import os

from egmla.utils.plotting import COLOURS, check_matplotlib

from .compare import Comparison, Score, metric_name


def plot_scores(comparison: Comparison, path: str | os.PathLike) -> None:
    """Draw scores with standard errors against cache bytes per token, one panel per task and metric; save a PNG.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Score]] = {}
    for score in comparison.scores:
        panels.setdefault(f"{score.task}, {metric_name(score.metric, score.filter)}", []).append(score)
    if not panels:
        raise ValueError("None of the tasks has a figure, so there is nothing to draw.")
    cache = {model.name: model.cache_bytes_per_token / 1024 for model in comparison.models}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (heading, points) in zip(axes, panels.items(), strict=False):
        for index, model in enumerate(comparison.models):
            for score in (point for point in points if point.model == model.name):
                axis.errorbar(
                    cache[model.name],
                    score.value,
                    yerr=score.stderr,
                    fmt="s" if index == 0 else "o",
                    color=COLOURS[index % len(COLOURS)],
                    capsize=4,
                    markersize=8,
                    label=model.name,
                )
        axis.set_title(heading, fontsize=11, fontweight="bold", loc="left")
        axis.set_xlim(0, 1.1 * max(cache.values()))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False, fontsize=10)
    figure.supxlabel("cache, KiB per token (bars: standard error)", fontsize=10)
    figure.savefig(path, dpi=160)
