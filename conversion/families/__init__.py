"""Supported source architectures; `registry.py` has the table of all of them."""

from .base import KEPT_FIELDS, AttentionShape, AttentionWeights, Family
from .registry import FAMILIES, MISSING, find_family, refuse_architecture


__all__ = [
    "FAMILIES",
    "KEPT_FIELDS",
    "MISSING",
    "AttentionShape",
    "AttentionWeights",
    "Family",
    "find_family",
    "refuse_architecture",
]
