# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Codes of cache channels with a bit width each: quantisation of groups of tokens, and packing. Pure functions.

A group is `g` neighbouring tokens. Each of its channels has a centre and a half range, and `g` codes of the channel's
width, which divide the range evenly. Groups run along the tokens, as in KIVI (arXiv 2402.02750) for keys. Channels of
one width lie beside one another and are a run.

Half ranges and centres take a byte each. At 2 bits an element, more would be a fifth of everything:

    half range = 2 ** (byte / 6 - 18)            255 stands for what is not finite
    centre     = (byte - 128) * half range / 8
    element    = centre - half range + code * 2 * half range / (2 ** bits - 1)

A channel of 0 bits has no codes: the range alone says the group's mean, and all its codes are 0.

Packing goes along the tokens, so any number of channels fits without padding. Channels stay the innermost dimension:
packing and unpacking are few operations on long rows, whatever the width. Codes of 3 and of 6 bits are two planes,
since 3 bits do not divide a byte.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch


# Bits of the planes that codes of a width are packed in, lowest first. Each divides a byte.
PLANES = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,), 0: ()}
# Bytes of a channel's half range and centre in each group.
RANGE_BYTES = 2
# Half ranges are from 4e-6 to 2e7, in steps of 12 %. For four bits or fewer the nearest is taken, else the next.
RANGES_PER_OCTAVE, LOWEST_OCTAVE, NOT_FINITE = 6, -18, 255
# Centres are up to 127 eighths of a half range. Where the mean is farther from zero, the half range grows.
CENTRES_PER_RANGE, CENTRE_OFFSET = 8, 128
FARTHEST_CENTRE = 15.5
# Part of a group's range that codes of few bits cover before their scale is fitted. Codes over the whole range have
# 7.9, 1.9 and 1.2 times the squared error at 1, 2 and 3 bits, in groups of 64 Gaussian numbers. Wider codes gain
# nothing from it.
CLIPPED_RANGE = {1: 0.45, 2: 0.7, 3: 0.9, 4: 1.0}
# By how much the rounding of a centre may shift a range, in half ranges.
CENTRE_ROUNDING = 0.5 / CENTRES_PER_RANGE


@cache
@torch.inference_mode(False)
def _field_shifts(width: int, device: torch.device) -> torch.Tensor:
    """Places of a byte's fields of `width` bits, `[8 / width, 1, 1]`."""
    return torch.arange(0, 8, width, dtype=torch.uint8).to(device).view(-1, 1, 1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes of `bits` bits along the tokens.

    Args:
        codes (`torch.Tensor`): `[..., g, C]` in uint8, each below `2 ** bits`; `g` is a multiple of 8.
        bits (`int`): one of `PLANES`.

    Returns:
        `torch.Tensor`: `[..., g * bits / 8, C]` in uint8. In a plane of `w` bits, token `t` is field `t // (g w / 8)`
        of row `t % (g w / 8)`.
    """
    planes = []
    for width in PLANES[bits]:
        fields = (codes & (2**width - 1)).unflatten(-2, (8 // width, -1)) << _field_shifts(width, codes.device)
        planes.append(fields.sum(-3, dtype=torch.uint8))
        codes = codes >> width if width < 8 else codes
    return torch.cat(planes, dim=-2) if planes else codes[..., :0, :]


def unpack(packed: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Write the codes of `pack`'s `[..., g * bits / 8, C]` to `[..., g, C]` in uint8."""
    if bits == 0:
        out.zero_()
        return
    rows, place = packed.shape[-2] // bits, 0  # rows of a plane of one bit
    for width, plane in zip(PLANES[bits], packed.split([rows * width for width in PLANES[bits]], dim=-2), strict=True):
        if width == 8:
            out.copy_(plane)
            continue
        fields = plane.unsqueeze(-3) >> _field_shifts(width, plane.device)
        codes = out.unflatten(-2, (8 // width, -1))
        if place == 0:
            torch.bitwise_and(fields, 2**width - 1, out=codes)
        else:
            codes.add_(fields.bitwise_and_(2**width - 1), alpha=2**place)
        place += width


@cache
@torch.inference_mode(False)
def _half_ranges(device: torch.device) -> torch.Tensor:
    """Half range of each byte, `[256]` in fp32."""
    values = [2.0 ** (byte / RANGES_PER_OCTAVE + LOWEST_OCTAVE) for byte in range(NOT_FINITE)]
    return torch.tensor([*values, torch.inf], dtype=torch.float32).to(device)


def quantize_channels(entries: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups of tokens, each channel of a group by itself.

    Codes of few bits cover less than the whole range: the least-squares fit to the codes of a clipped range. Wider
    codes cover all of it, so their error is at most half a step.

    Args:
        entries (`torch.Tensor`): `[..., g, C]`.
        bits (`int`): one of `PLANES`.

    Returns:
        Codes `[..., g, C]` in uint8, and bytes of half ranges and centres `[..., 2, C]`.
    """
    entries = entries.float()
    if bits == 0:
        lowest = highest = entries.mean(-2, keepdim=True)
    else:
        lowest, highest = entries.amin(-2, keepdim=True), entries.amax(-2, keepdim=True)
    if bits in CLIPPED_RANGE:
        lowest, highest = _fit_range(entries, lowest, highest - lowest, bits)
    half, centre = (highest - lowest) / 2, lowest + (highest - lowest) / 2
    # Logarithms, in bytes; that of zero is the lowest byte.
    byte = half.log2() * RANGES_PER_OCTAVE - LOWEST_OCTAVE * RANGES_PER_OCTAVE
    if bits in CLIPPED_RANGE:
        byte = byte.round()
    else:
        byte = (byte - RANGES_PER_OCTAVE * math.log2(1 - CENTRE_ROUNDING)).ceil()
    farthest = FARTHEST_CENTRE - 1 if bits == 0 else FARTHEST_CENTRE
    least = (centre.abs() / farthest).log2() * RANGES_PER_OCTAVE - LOWEST_OCTAVE * RANGES_PER_OCTAVE
    byte = torch.maximum(byte, least.ceil()).clamp(0, NOT_FINITE)
    ranges = torch.where(torch.isfinite(centre), byte, NOT_FINITE)
    half = _half_ranges(entries.device)[ranges.int()]
    if bits == 0:
        centre = centre + half  # code 0 stands for the mean
    centres = (centre / half * CENTRES_PER_RANGE).round().clamp(-127, 127) + CENTRE_OFFSET
    stored = torch.cat((ranges, centres.nan_to_num(CENTRE_OFFSET)), dim=-2).to(torch.uint8)
    steps, starts = steps_and_starts(stored, highest_code(bits))
    codes = ((entries - starts) / steps).round_().nan_to_num_(0).clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, stored


def highest_code(bits: int) -> int:
    """Return the code that would stand for the upper end of a range; codes of 0 bits are all 0, below it."""
    return max(1, 2**bits - 1)


def steps_and_starts(stored: torch.Tensor, top: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a code counts in and what code 0 stands for, `[..., 1, C]` each in fp32.

    Args:
        stored (`torch.Tensor`): bytes of half ranges and centres `[..., 2, C]`.
        top: the highest code of each channel `[C]`, or of all.
    """
    half = _half_ranges(stored.device)[stored[..., :1, :].int()]
    centre = (stored[..., 1:, :].float() - CENTRE_OFFSET) * (half / CENTRES_PER_RANGE)
    return half * 2 / top, centre - half


def _fit_range(
    entries: torch.Tensor, lowest: torch.Tensor, extent: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what codes 0 and `2 ** bits - 1` should stand for, `[..., 1, C]` each, for the least squared error."""
    top, part = 2**bits - 1, CLIPPED_RANGE[bits]
    offsets = entries - lowest  # sums of small numbers, wherever the channel's mean is
    steps = torch.where(extent == 0, 1.0, extent * (part / top))
    codes = ((offsets - extent * ((1 - part) / 2)) / steps).round_().clamp_(0, top)
    mean_code, mean = codes.mean(-2, keepdim=True), offsets.mean(-2, keepdim=True)
    deviations = codes.sub_(mean_code)
    variance = deviations.square().sum(-2, keepdim=True)
    covariance = deviations.mul_(offsets).sum(-2, keepdim=True)
    steps = torch.where(variance == 0, 0.0, covariance / variance)
    start = lowest + (mean - steps * mean_code)
    return start, start + steps * top


def encode(entries: torch.Tensor, runs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise and pack groups of tokens whose channels come in runs.

    Args:
        entries (`torch.Tensor`): `[..., g, C]`.
        runs: bits and channels of each run, `C` channels together.

    Returns:
        Bytes of codes `[..., g * (sum of bits) / 8]`, run after run, and of half ranges before centres `[..., 2 C]`.
    """
    packed, ranges = [], []
    for (bits, _), run in zip(runs, entries.split([count for _, count in runs], dim=-1), strict=True):
        codes, stored = quantize_channels(run, bits)
        packed.append(pack(codes, bits).flatten(-2))
        ranges.append(stored)
    if not packed:
        empty = entries.new_empty((*entries.shape[:-2], 0), dtype=torch.uint8)
        return empty, empty
    return torch.cat(packed, dim=-1), torch.cat(ranges, dim=-1).flatten(-2)


def unpack_runs(packed: torch.Tensor, runs: Sequence[tuple[int, int]], group_tokens: int) -> torch.Tensor:
    """Return the codes `[..., g, C]` in uint8 of `encode`'s bytes `[..., g * (sum of bits) / 8]`."""
    shape = (*packed.shape[:-1], group_tokens, sum(count for _, count in runs))
    codes = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    start, first = 0, 0
    for bits, count in runs:
        rows = group_tokens * bits // 8
        end = start + rows * count
        unpack(packed[..., start:end].unflatten(-1, (rows, count)), bits, codes[..., first : first + count])
        start, first = end, first + count
    return codes


@cache
@torch.inference_mode(False)
def _highest_codes(runs: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """Highest code of each channel, `[C]` in fp32."""
    highest = [float(highest_code(bits)) for bits, count in runs for _ in range(count)]
    return torch.tensor(highest).to(device, torch.float32)


def unpack_ranges(ranges: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return steps and starts `[..., 1, C]` in fp32 of `encode`'s ranges `[..., 2 C]`."""
    return steps_and_starts(ranges.unflatten(-1, (2, ranges.shape[-1] // 2)), _highest_codes(runs, ranges.device))


def dequantize_channels(
    codes: torch.Tensor, steps: torch.Tensor, starts: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Write the entries of codes `[..., g, C]` to `out` `[..., g, C]` in fp32, and return it."""
    return torch.addcmul(starts, out.copy_(codes), steps, out=out)
