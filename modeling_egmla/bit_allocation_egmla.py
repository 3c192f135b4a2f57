# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Allocated bits: how many bits each channel of the cached latent and rotary key has, as `kv_cache_bits` says.

A conversion sorts the latent's channels and the rotary pairs by importance. A layer's allocation is then runs
`[bits, count]`, bits descending. Of channels in a run of 0 bits each group's mean is stored. What comes after the last
run is not stored, and read as 0.

Example of a configuration with one layer:

    {"group_tokens": 64, "first_tokens": 4, "recent_tokens": 64, "share": 0.25,
     "layers": [{"latent": [[8, 12], [4, 130], [2, 40]], "rope": [[4, 20], [2, 10]]}],
     "budgets": {"0.125": [{"latent": [[4, 60], [2, 80]], "rope": [[3, 12]]}]}}

Latent runs count channels, rotary runs pairs. A pair is channels `i` and `P / 2 + i` of a cached rotary key: rotation
leaves first members in the first half. The first tokens are held as they are. So are the last `recent_tokens` (0 by
default) and those after the last whole group. The field `share` says which part of the source's bf16 bytes `layers`
takes. Smaller allocations, by that share, are `budgets`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from .channel_codes_egmla import PLANES, RANGE_BYTES


FIELDS = ("group_tokens", "first_tokens", "recent_tokens", "layers", "share", "budgets")
# What `bits` says for entries as they are.
UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's channels.

    Args:
        latent: runs `(bits, count)` of latent channels.
        rope: runs `(bits, count)` of rotary pairs.
        rank (`int`): `R`.
        rope_dim (`int`): `P`.
    """

    latent: tuple[tuple[int, int], ...]
    rope: tuple[tuple[int, int], ...]
    rank: int
    rope_dim: int

    @property
    def latent_channels(self) -> int:
        """Latent channels that are stored."""
        return sum(count for _, count in self.latent)

    @property
    def stored_channels(self) -> int:
        """Channels of an entry that are stored, the two of each rotary pair included."""
        return self.latent_channels + 2 * sum(count for _, count in self.rope)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Bits and number of channels of each run, in the order in which channels are stored."""
        return (*self.latent, *((bits, 2 * count) for bits, count in self.rope))

    @property
    def channels(self) -> list[int]:
        """Channels of an entry `[R + P]` in the order in which they are stored; others come last."""
        found, start = list(range(self.latent_channels)), self.rank
        for _, count in self.rope:  # both members of a run's pairs are beside one another: they share their bits
            found += range(start, start + count)
            found += range(start + self.rope_dim // 2, start + self.rope_dim // 2 + count)
            start += count
        stored = set(found)
        return found + [channel for channel in range(self.rank + self.rope_dim) if channel not in stored]

    def group_bytes(self, group_tokens: int) -> int:
        """Bytes of a full group: codes, half ranges and centres."""
        return sum(count * (group_tokens * bits // 8 + RANGE_BYTES) for bits, count in self.runs)


@dataclass(frozen=True)
class BitAllocation:
    """Bits of all layers.

    Args:
        group_tokens (`int`): tokens of a group, a multiple of 8.
        first_tokens (`int`): tokens kept as they are before all groups.
        recent_tokens (`int`): tokens kept as they are at the end, at least.
        layers: bits of each layer.
        budgets: smaller allocations, the layers of each, by their share of the source's bytes.
    """

    group_tokens: int
    first_tokens: int
    recent_tokens: int
    layers: tuple[LayerBits, ...]
    share: float | None = None
    budgets: dict[float, tuple[LayerBits, ...]] = field(default_factory=dict)

    def at_most(self, share: float) -> "BitAllocation":
        """Return the allocation of the largest budget that takes at most this share of the source's bytes.

        Raises:
            ValueError: where no budget is that small.
        """
        known = dict(self.budgets) if self.share is None else {**self.budgets, self.share: self.layers}
        fitting = [budget for budget in known if budget <= share]
        if not fitting:
            there = ", ".join(f"{budget:g}" for budget in sorted(known)) or "only the stored one"
            raise ValueError(
                f"bits={share:g}: must be one of the budgets of kv_cache_bits ({there}) or more, "
                f"{UNQUANTIZED_BITS} for entries as they are, or None for the stored allocation."
            )
        best = max(fitting)
        return replace(self, layers=known[best], share=best, budgets={})

    def grouped_tokens(self, tokens: int) -> int:
        """Return how many of a sequence's tokens are in whole groups once `tokens` are cached, one at a time."""
        past = max(0, tokens - self.first_tokens - self.recent_tokens)
        return past // self.group_tokens * self.group_tokens

    def nbytes(self, tokens: int, bytes_per_element: int = 2) -> int:
        """Bytes in use for a sequence of `tokens`, all layers together; token ids of expanded gates not included.

        Args:
            tokens (`int`): tokens cached.
            bytes_per_element (`int`): of a token that is in no group; 2 for bf16.
        """
        grouped, first = self.grouped_tokens(tokens), min(tokens, self.first_tokens)
        groups, rest = grouped // self.group_tokens, tokens - first - grouped
        return sum(
            groups * bits.group_bytes(self.group_tokens)
            + bytes_per_element * (first * (bits.rank + bits.rope_dim) + rest * bits.stored_channels)
            for bits in self.layers
        )


def read_allocation(value: Any, ranks: Sequence[int], rope_dim: int) -> BitAllocation:
    """Read what `kv_cache_bits` has.

    Args:
        value: the dictionary, as it is in JSON.
        ranks: `R` of each layer of the model.
        rope_dim (`int`): `P`.

    Raises:
        ValueError: for anything that this model cannot store; it says what was given and what is required.
    """
    if not isinstance(value, dict) or not {"group_tokens", "first_tokens", "layers"} <= value.keys():
        raise ValueError(
            f"kv_cache_bits={str(value)[:100]}: must be a dictionary with group_tokens, first_tokens and layers, or "
            "None."
        )
    unknown = sorted(value.keys() - set(FIELDS))
    if unknown:
        raise ValueError(f"kv_cache_bits has {', '.join(map(repr, unknown))}: known are {', '.join(FIELDS)}.")
    group, share = value["group_tokens"], value.get("share")
    if type(group) is not int or group < 8 or group % 8:
        raise ValueError(
            f"kv_cache_bits has group_tokens={group!r}: must be a multiple of 8 tokens, whose codes fill whole bytes; "
            "use 64."
        )
    for name in ("first_tokens", "recent_tokens"):
        tokens = value.get(name, 0)
        if type(tokens) is not int or tokens < 0:
            raise ValueError(f"kv_cache_bits has {name}={tokens!r}: must be a number of tokens, 0 or more.")
    layers = _read_layers(value["layers"], "layers", ranks, rope_dim)
    budgets = value.get("budgets") or {}
    if not isinstance(budgets, dict):
        raise ValueError(f"kv_cache_bits has budgets={str(budgets)[:100]}: must be layers by their share of bytes.")
    return BitAllocation(
        group,
        value["first_tokens"],
        value.get("recent_tokens", 0),
        layers,
        None if share is None else _read_share(share, "share"),
        {
            _read_share(name, "budgets"): _read_layers(smaller, f"budgets[{name!r}]", ranks, rope_dim)
            for name, smaller in budgets.items()
        },
    )


def find_allocation(config: Any, bits: Any) -> BitAllocation | None:
    """Return the allocation that a cache of a model is asked for by `bits`; `None` for entries as they are.

    Args:
        config (`EGMLAConfig`): the model's configuration.
        bits: `None` for what the configuration says, or 16 for entries as they are. A share of the source's bytes, up
            to 1, is for a budget of the configuration. A dictionary has the form of `kv_cache_bits`.

    Raises:
        ValueError: for anything else, and where the configuration has no such budget.
    """
    if isinstance(bits, dict):
        return read_allocation(bits, config.layer_kv_lora_ranks, config.qk_rope_head_dim)
    stored = config.bit_allocation()
    if bits is None or (bits == UNQUANTIZED_BITS and type(bits) is int):
        return stored if bits is None else None
    if type(bits) not in (int, float) or not 0 < bits <= 1:
        raise ValueError(
            f"bits={bits!r}: must be a share of the source's bytes, above 0 and at most 1, {UNQUANTIZED_BITS} for "
            "entries as they are, an allocation of the form of kv_cache_bits, or None for what the config says."
        )
    if stored is None:
        raise ValueError(
            f"bits={bits:g}, and the config has no kv_cache_bits: nothing says which channels matter; use a "
            "conversion with allocated bits, or quantization='int8' or 'int4'."
        )
    return stored.at_most(bits)


def _read_share(value: Any, where: str) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(
            f"kv_cache_bits has {value!r} in {where}: must be a share of the source's bytes, above 0 and at most 1."
        )
    return share


def _read_layers(value: Any, where: str, ranks: Sequence[int], rope_dim: int) -> tuple[LayerBits, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != len(ranks):
        given = f"{len(value)} layers" if isinstance(value, (list, tuple)) else repr(value)
        raise ValueError(
            f"kv_cache_bits has {given} in {where}, and the model has {len(ranks)}: this allocation is of another "
            "model; use the one that was made with these weights, or None."
        )
    found = []
    for layer_idx, (layer, rank) in enumerate(zip(value, ranks, strict=True)):
        place = f"{where}[{layer_idx}]"
        if not isinstance(layer, dict) or layer.keys() != {"latent", "rope"}:
            raise ValueError(f"kv_cache_bits has {str(layer)[:100]} in {place}: must have latent and rope, no more.")
        latent = _read_runs(layer["latent"], f"{place}['latent']", rank, "latent channels")
        rope = _read_runs(layer["rope"], f"{place}['rope']", rope_dim // 2, "rotary pairs")
        found.append(LayerBits(latent, rope, rank, rope_dim))
    return tuple(found)


def _read_runs(value: Any, where: str, most: int, what: str) -> tuple[tuple[int, int], ...]:
    """Runs `(bits, count)` as read from JSON, of at most so many channels or pairs."""
    runs = value if isinstance(value, (list, tuple)) else [value]
    for run in runs:
        if not isinstance(run, (list, tuple)) or len(run) != 2 or any(type(number) is not int for number in run):
            raise ValueError(f"kv_cache_bits has {run!r} in {where}: must be two numbers, bits and a count.")
        if run[0] not in PLANES or run[1] < 1:
            raise ValueError(
                f"kv_cache_bits has {run!r} in {where}: bits must be one of {', '.join(map(str, PLANES))}, for 1 or "
                f"more {what}; leave those that are not stored out."
            )
    if any(after[0] >= before[0] for before, after in pairwise(runs)):
        raise ValueError(
            f"kv_cache_bits has {runs} in {where}: bits must fall from run to run, since {what} are sorted by "
            "importance."
        )
    count = sum(count for _, count in runs)
    if count > most:
        raise ValueError(
            f"kv_cache_bits has {count} {what} in {where}, and the layer has {most}: this allocation is of another "
            "model; use the one that was made with these weights, or None."
        )
    return tuple((bits, count) for bits, count in runs)
