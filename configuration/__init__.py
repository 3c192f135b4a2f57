"""Presets: configurations of published shapes, each in a folder that `AutoConfig.from_pretrained` loads."""

import difflib
import re
from importlib.resources import files
from pathlib import Path

from egmla import EGMLAConfig


def preset_names() -> list[str]:
    """Names of all presets, in the order of the numbers in them."""
    names = [entry.name for entry in files(__name__).iterdir() if (entry / "config.json").is_file()]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def preset_path(name: str) -> Path:
    """Folder of a preset.

    Raises:
        ValueError: when there is no preset of that name; the message gives the nearest ones.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(names)}."
        raise ValueError(f"{name!r} is no preset: {hint}")
    return Path(str(files(__name__) / name))


def load_preset(name: str) -> EGMLAConfig:
    """Configuration of a preset (see `preset_path`)."""
    return EGMLAConfig.from_pretrained(preset_path(name))


__all__ = ["load_preset", "preset_names", "preset_path"]
