"""Conversion of existing checkpoints into EG-MLA."""

from .closed_form import Recipe
from .convert import convert_checkpoint, load_source
from .families import FAMILIES
from .sources import smollm2_source


__all__ = ["FAMILIES", "Recipe", "convert_checkpoint", "load_source", "smollm2_source"]
