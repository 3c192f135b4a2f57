"""Conversion of existing checkpoints into EG-MLA."""

from .convert import convert_checkpoint
from .families import FAMILIES
from .recipes import RECIPES, Recipe, find_recipe
from .refinement import Refinement
from .settings import ConversionSettings
from .sources import load_source, smollm2_source


__all__ = [
    "FAMILIES",
    "RECIPES",
    "ConversionSettings",
    "Recipe",
    "Refinement",
    "convert_checkpoint",
    "find_recipe",
    "load_source",
    "smollm2_source",
]
