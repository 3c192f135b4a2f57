# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""What a user can do without converting anything: quantise the source's own cache, in the manner of KIVI.

A peer for comparisons. Entries go to integers and back at once, and stay in the model's dtype here. So a model answers
as with a quantised cache. Its bytes are counted by formula, and its speed says nothing.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


GROUP = 64  # tokens of a key channel, or channels of a value, that share a scale and a zero point
FIRST_TOKENS = 4  # kept as they are, as in our own quantised caches
RECENT_TOKENS = 64
SCALE_BYTES = 4  # scale and zero point, 16 bits each


def round_trip(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Quantise groups along `dim` to `bits` bits between their minimum and maximum, and return what is read back."""
    lowest, highest = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    step = (highest - lowest) / (2**bits - 1)
    codes = ((values - lowest) / torch.where(step == 0, 1.0, step)).round()
    return codes * step + lowest


class KiviStyleLayer(DynamicLayer):
    """Keys in groups of tokens of a channel, values in groups of channels of a token.

    Source: KIVI (arXiv 2402.02750), with the first tokens exact too, which ours keep.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.rounded = FIRST_TOKENS  # tokens before this one are final

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        while self.rounded + GROUP + RECENT_TOKENS <= keys.shape[2]:
            group = slice(self.rounded, self.rounded + GROUP)
            keys[:, :, group] = round_trip(keys[:, :, group], self.bits, dim=2)
            by_group = values[:, :, group].unflatten(-1, (-1, min(GROUP, values.shape[-1])))
            values[:, :, group] = round_trip(by_group, self.bits, dim=-1).flatten(-2)
            self.rounded += GROUP
        return keys, values


class KiviStyleCache(DynamicCache):
    """The source's cache, quantised to `bits` bits; for evaluation only.

    Args:
        config (`PreTrainedConfig`): of a model with keys and values per head.
        bits (`int`): bits of a code, 2 to 8.
    """

    def __init__(self, config: PreTrainedConfig, bits: int):
        super().__init__()
        self.layers = [KiviStyleLayer(bits) for _ in range(config.num_hidden_layers)]


def head_width(config: Any) -> int:
    """Return the width of a head's keys and values."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kivi_style_share(config: PreTrainedConfig, bits: int, tokens: int = 32768) -> float:
    """Return the bytes of a `KiviStyleCache` of one sequence as a share of the same cache in bf16.

    Codes, scales, zero points and exact tokens are counted.
    """
    groups = max(0, tokens - FIRST_TOKENS - RECENT_TOKENS) // GROUP
    width = head_width(config)
    scales_of_keys, scales_of_values = width, GROUP * -(-width // GROUP)  # of a group of tokens, a head
    held = groups * (2 * GROUP * width * bits / 8 + (scales_of_keys + scales_of_values) * SCALE_BYTES)
    exact = (tokens - groups * GROUP) * 2 * width * 2
    return (held + exact) / (tokens * 2 * width * 2)
