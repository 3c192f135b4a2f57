"""Colours of all plots, and a check that matplotlib (the `plot` extra) is installed."""

import importlib.util


# Okabe and Ito's palette: colour-blind readers can tell the colours apart, also in grey.
COLOURS = ("#999999", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#0072B2")


def check_matplotlib() -> None:
    """Raise `ImportError` with the command that installs matplotlib, when it is missing. Call it before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib, which is not installed; run: pip install 'egmla[plot]'")
