"""Bits of a cache: how many each channel gets, so that the model's error is least under a budget of bytes.

Pure functions. A channel is a number of the latent, or a pair of the rotary key, whose two numbers get the same bits.
Its importance is what noise of its variance would cost the model's output. Rounded to `b` bits it costs `ROUNDING[b]`
of that. The least cost under a budget gives every channel the bits beyond which another bit,
anywhere, would save less (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3). One
threshold therefore serves all layers, and the allocation of a smaller budget is a prefix of that of a larger one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from egmla import bit_allocation_egmla
from egmla.channel_codes_egmla import RANGE_BYTES


# Bits that a code may have, and the noise of rounding to them in groups of 64 numbers, in their variance within a
# group. With 0 bits a group's mean is stored. Errors that neighbouring tokens share cost more than their variance: no
# mean over tokens evens them out. The first three are fitted to perplexity (tests/benchmarks/LOG.md, 2026-11-30).
NOT_STORED = -1
ROUNDING = {
    NOT_STORED: 20.0,
    0: 2.5,
    1: 0.7,
    2: 0.115,
    3: 0.034,
    4: 0.0095,
    6: 0.0006,
    8: 0.00004,
}


@dataclass(frozen=True)
class Storage:
    """How a quantised cache lays out its tokens; what decides how many bytes an allocation takes.

    Attributes:
        group_tokens: tokens that share a scale and a zero point, channel by channel.
        first_tokens: tokens at the beginning that stay exact, with all their channels.
        recent_tokens: the newest tokens, which stay exact besides those of the group that is not full.
    """

    group_tokens: int = 64
    first_tokens: int = 4
    recent_tokens: int = 64

    def channel_bits(self, bits: int) -> float:
        """Bits that a number with codes of `bits` takes per token, its share of scales included."""
        return 0.0 if bits == NOT_STORED else bits + 8 * RANGE_BYTES / self.group_tokens


class LayerBits(NamedTuple):
    """Bits of a layer's channels, most important first.

    Attributes:
        latent: of each channel of the latent that is stored.
        rope: of each pair of the rotary key that is stored.
    """

    latent: list[int]
    rope: list[int]

    @property
    def numbers(self) -> list[int]:
        """Bits of each number of an entry."""
        return self.latent + 2 * self.rope

    def runs(self) -> dict[str, list[list[int]]]:
        """Return them as `EGMLAConfig.kv_cache_bits` has them: runs of bits and how many channels have them."""
        return {"latent": _runs(self.latent), "rope": _runs(self.rope)}


def cache_bytes(layers: Sequence[LayerBits], widths: Sequence[int], storage: Storage, tokens: int) -> int:
    """Bytes of a cache of one sequence in bf16.

    Args:
        layers (`Sequence[LayerBits]`): the bits of its layers.
        widths (`Sequence[int]`): numbers `R + P` of an entry of each, which the first tokens are kept with.
        storage (`Storage`): how it lays out its tokens.
        tokens (`int`): how many it holds.
    """
    held = []
    for layer, width in zip(layers, widths, strict=True):
        latent, rope = (tuple((bits, count) for bits, count in runs) for runs in layer.runs().values())
        pairs = 2 * len(layer.rope)  # how the width divides is no matter of bytes
        held.append(bit_allocation_egmla.LayerBits(latent, rope, width - pairs, pairs))
    allocation = bit_allocation_egmla.BitAllocation(
        storage.group_tokens, storage.first_tokens, storage.recent_tokens, tuple(held)
    )
    return allocation.nbytes(tokens)


def allocate_bits(
    latents: Sequence[torch.Tensor],
    pairs: Sequence[torch.Tensor],
    most_bytes: float,
    tokens: int,
    storage: Storage,
    max_rank: int | None = None,
) -> list[LayerBits]:
    """Allocate bits to the channels of all layers for the least cost under a budget of bytes.

    Args:
        latents (`Sequence[torch.Tensor]`): importance `[R]` of each layer's latent channels, largest first.
        pairs (`Sequence[torch.Tensor]`): importance `[P / 2]` of its rotary pairs, both numbers together, largest
            first.
        most_bytes (`float`): budget of a cache of `tokens`.
        tokens (`int`): tokens that the budget is for.
        storage (`Storage`): how the cache lays out its tokens.
        max_rank (`int`, *optional*): most channels of a layer's latent that are stored: each costs time in decoding.

    Returns:
        `list[LayerBits]`: the bits of each layer; of the same importances, a smaller budget gives no channel more.

    Raises:
        ValueError: for importances that are not in order, or a budget below the cheapest cache.
    """
    for values in (*latents, *pairs):
        if bool((values[1:] > values[:-1]).any()):
            raise ValueError("Importances must come largest first: sort the channels of each layer by them.")
    widths = [len(latent) + 2 * len(pair) for latent, pair in zip(latents, pairs, strict=True)]
    latents = [values[:max_rank] for values in latents]
    levels = _useful_levels(storage)
    thresholds = _thresholds([*latents, *(values / 2 for values in pairs)], levels, storage)

    def at(threshold: float) -> list[LayerBits]:
        return [
            LayerBits(
                # A latent is never empty: at least a mean of its first channel is stored.
                _bits(latent, levels, storage, threshold) or [levels[1]],
                _bits(pair / 2, levels, storage, threshold),
            )
            for latent, pair in zip(latents, pairs, strict=True)
        ]

    # Thresholds fall, so bytes rise: the last one within the budget.
    low, high = 0, len(thresholds)
    while low < high:
        middle = (low + high) // 2
        if cache_bytes(at(thresholds[middle]), widths, storage, tokens) <= most_bytes:
            low = middle + 1
        else:
            high = middle
    chosen = at(thresholds[low - 1] if low else math.inf)
    if (least := cache_bytes(chosen, widths, storage, tokens)) > most_bytes:
        raise ValueError(
            f"No cache of {tokens:,} tokens has at most {math.floor(most_bytes):,} bytes: the smallest, of one latent "
            f"channel a layer, has {math.ceil(least):,}. Give a larger share."
        )
    return chosen


def allocation_cost(
    layers: Sequence[LayerBits], latents: Sequence[torch.Tensor], pairs: Sequence[torch.Tensor]
) -> float:
    """Return what an allocation costs the model's output, in the unit of the importances."""
    cost = 0.0
    for layer, *kinds in zip(layers, latents, pairs, strict=True):
        for bits, values in zip(layer, kinds, strict=True):
            shares = torch.full_like(values, ROUNDING[NOT_STORED])
            shares[: len(bits)] = torch.tensor([ROUNDING[each] for each in bits], dtype=values.dtype)
            cost += float((shares * values).sum())
    return cost


def as_config(allocations: Mapping[float, Sequence[LayerBits]], storage: Storage) -> dict[str, Any]:
    """Return allocations by their share of the source's bytes, as `EGMLAConfig.kv_cache_bits` has them."""
    largest, *smaller = sorted(allocations, reverse=True)
    found: dict[str, Any] = {
        "group_tokens": storage.group_tokens,
        "first_tokens": storage.first_tokens,
        "recent_tokens": storage.recent_tokens,
        "share": largest,
        "layers": [layer.runs() for layer in allocations[largest]],
    }
    if smaller:
        found["budgets"] = {f"{share:g}": [layer.runs() for layer in allocations[share]] for share in smaller}
    return found


def _useful_levels(storage: Storage) -> list[int]:
    """The levels of `ROUNDING` that some budget takes: each saves less per bit than the one before it."""
    levels = [NOT_STORED]
    while levels[-1] != max(ROUNDING):
        last = levels[-1]
        levels.append(
            max((level for level in ROUNDING if level > last), key=lambda level: _gain(last, level, storage))
        )
    return levels


def _gain(low: int, high: int, storage: Storage) -> float:
    """Share of a channel's importance that each further bit saves from one level to another."""
    return (ROUNDING[low] - ROUNDING[high]) / (storage.channel_bits(high) - storage.channel_bits(low))


def _thresholds(kinds: Sequence[torch.Tensor], levels: list[int], storage: Storage) -> list[float]:
    """All thresholds at which a channel gets another level, highest first."""
    values = torch.cat([values.double() for values in kinds])
    gains = torch.tensor([_gain(low, high, storage) for low, high in pairwise(levels)], dtype=torch.float64)
    found = torch.outer(values, gains).flatten().unique().flip(0)
    return [value for value in found.tolist() if value > 0]


def _bits(values: torch.Tensor, levels: list[int], storage: Storage, threshold: float) -> list[int]:
    """Bits of channels, each with all levels that save at least `threshold` a bit; those not stored are left out."""
    found = torch.full((len(values),), NOT_STORED)
    for low, high in pairwise(levels):
        found[values.double() * _gain(low, high, storage) >= threshold] = high
    return found[found != NOT_STORED].tolist()


def _runs(bits: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for each in bits:
        if found and found[-1][0] == each:
            found[-1][1] += 1
        else:
            found.append([each, 1])
    return found
