"""Colours of all plots, and the check that matplotlib is installed (the `plot` extra)."""

import importlib.util


# Okabe and Ito's palette: told apart by colour-blind readers, and by lightness in grey.
COLOURS = ("#999999", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#0072B2")


def check_matplotlib() -> None:
    """Raises `ImportError` saying how to install matplotlib when it is missing; ask before measuring for minutes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib, which is not installed; run: pip install 'egmla[plot]'")
