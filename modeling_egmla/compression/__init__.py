# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Fewer tokens in the cache: presses that drop the entries of unimportant tokens, and free their bytes."""

from .gate import EvictionGate, GatePress, fit_gate
from .press import Press, Reading, layer_shares
from .reconstruction import INSTRUCTION, GivenScoresPress, reconstruction_scores
from .scores import (
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    RandomPress,
    RecentPress,
    SnapKVPress,
    TOVAPress,
)


# Presses that need nothing but a model, by name: what tests and comparisons walk.
PRESSES: dict[str, type[Press]] = {
    "recent": RecentPress,
    "random": RandomPress,
    "knorm": KnormPress,
    "keydiff": KeyDiffPress,
    "observed attention": ObservedAttentionPress,
    "snapkv": SnapKVPress,
    "tova": TOVAPress,
}

__all__ = [
    "EvictionGate",
    "GatePress",
    "GivenScoresPress",
    "INSTRUCTION",
    "KeyDiffPress",
    "KnormPress",
    "ObservedAttentionPress",
    "PRESSES",
    "Press",
    "RandomPress",
    "Reading",
    "RecentPress",
    "SnapKVPress",
    "TOVAPress",
    "fit_gate",
    "layer_shares",
    "reconstruction_scores",
]
