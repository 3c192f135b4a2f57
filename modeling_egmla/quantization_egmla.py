# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Quantisation of cache entries: integer codes in groups that share a scale, in two layouts. Pure functions.

int8: groups of neighbouring elements of a token, after a Hadamard rotation of latent and rotary key, each by itself,
that spreads outliers over all elements. It is orthogonal, so queries are rotated instead of what is cached.

int4: groups of neighbouring tokens of an element, each with a scale and a zero point (as KIVI, arXiv 2402.02750, has
it for keys). An element of a rotary key is large or small for all tokens and rotates slowly. In a group along a token,
one scale would serve elements of many sizes, and the small ones would get nothing at 4 bits.

No group holds elements of the latent and of the rotary key.
"""

import math
from functools import cache

import torch

from .cpu_egmla import CPU_KERNEL_DTYPES, cpu_operators, is_traced


# Elements (int8) or tokens (int4) per group by default. A group takes 2 and 4 bytes beside its codes, 3.1 and 12.5 %.
GROUP_SIZE = 64
# Scales have the range of fp32, so that no latent overflows; codes are chosen for the rounded scale, so that its
# rounding costs nothing.
SCALE_DTYPE = torch.bfloat16


def element_group_size(group_size: int | None, rank: int, rope_dim: int) -> int:
    """Elements per group, those given or by default the most, up to `GROUP_SIZE`, that fit `R` and `P`.

    Raises:
        ValueError: when the size given does not divide both `R` and `P`.
    """
    fitting = [size for size in range(1, max(rank, rope_dim) + 1) if rank % size == 0 and rope_dim % size == 0]
    if group_size is None:
        return max(size for size in fitting if size <= GROUP_SIZE)
    if group_size not in fitting:
        raise ValueError(
            f"quantization_group_size={group_size!r}: must divide both the latent of {rank} and the rotary key of "
            f"{rope_dim} elements per token, since no int8 group holds both; use one of "
            f"{', '.join(map(str, fitting))}, or leave it out."
        )
    return group_size


def token_group_size(group_size: int | None) -> int:
    """Tokens per group, those given or by default `GROUP_SIZE`.

    Raises:
        ValueError: for anything but a number of 2 or more.
    """
    if group_size is None:
        return GROUP_SIZE
    if type(group_size) is not int or group_size < 2:
        raise ValueError(
            f"quantization_group_size={group_size!r}: int4 groups are of neighbouring tokens; give their number, 2 or "
            f"more, or leave it out for {GROUP_SIZE}."
        )
    return group_size


@cache
@torch.inference_mode(False)
def rotation(rank: int, rope_dim: int, device: torch.device) -> torch.Tensor:
    """Symmetric orthogonal matrix `[R + P, R + P]` in fp32, Hadamard matrices for the latent and for the rotary key.

    A width that is no power of two is rotated in parts as wide as the largest power of two that divides it.
    """
    blocks = []
    for width in (rank, rope_dim):
        size = width & -width
        matrix = torch.ones(1, 1, dtype=torch.float32)  # whatever the default is
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        blocks += [matrix / math.sqrt(size)] * (width // size if size else 0)
    return torch.block_diag(*blocks).to(device)


def quantize_elements(
    entries: torch.Tensor, matrix: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes `[..., W]` and bf16 scales `[..., W / group_size]` of entries `[..., W]` times a matrix `[W, W]`.

    An element is scale x code. The one of largest magnitude gets the code -128, which has no positive counterpart, and
    the scale its opposite sign: all codes are used. Errors are up to half a scale, or 1.5 where both signs occur at
    full magnitude.
    """
    with torch.autocast(entries.device.type, enabled=False):  # the product is as exact as the codes are to be
        groups = (entries.float() @ matrix).unflatten(-1, (-1, group_size))
    extremes = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (extremes / -128).to(SCALE_DTYPE)
    # All-zero groups have the scale 0, and codes 0.
    divisors = torch.where(scales == 0, 1.0, scales.float())
    codes = (groups / divisors).round().clamp(-128, 127).to(torch.int8)
    return codes.flatten(-2), scales.squeeze(-1)


def write_int8(
    latent: torch.Tensor, rope_key: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, start: int
) -> None:
    """Rotates `n` tokens `[B, 1, n, R]` and `[B, 1, n, P]` and writes them into a cache's storages from `start` on.

    Storages are codes `[B, 1, capacity, R + P]` and scales `[B, 1, capacity, groups]`. By the compiled kernel where it
    is loaded.
    """
    operators = cpu_operators()
    known = latent.dtype in CPU_KERNEL_DTYPES and rope_key.dtype in CPU_KERNEL_DTYPES
    if operators is not None and codes.device.type == "cpu" and known and not is_traced():
        operators.write_int8(latent, rope_key, codes, scales, start)
        return
    matrix = rotation(latent.shape[-1], rope_key.shape[-1], codes.device)
    entries = torch.cat((latent, rope_key), dim=-1)
    end = start + entries.shape[2]
    codes[:, :, start:end], scales[:, :, start:end] = quantize_elements(
        entries, matrix, entries.shape[-1] // scales.shape[-1]
    )


def quantize_tokens(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed int4 codes and bf16 scales of groups of tokens `[..., g, W]`; an element is scale x code + zero point.

    Returns:
        Codes from 0 to 15, two per byte, `[..., g, W / 2]` (rounded up) in uint8, the first half of the elements in
        the low bits, and `[..., 2, W]`, scales before zero points. Errors are up to half a scale, plus the rounding of
        the zero point at the ends.
    """
    entries = entries.float()
    lowest, highest = entries.amin(-2, keepdim=True), entries.amax(-2, keepdim=True)
    zeros = lowest.to(SCALE_DTYPE)
    scales = ((highest - zeros.float()) / 15).to(SCALE_DTYPE)
    divisors = torch.where(scales == 0, 1.0, scales.float())
    codes = ((entries - zeros.float()) / divisors).round().clamp(0, 15).to(torch.uint8)
    half = (codes.shape[-1] + 1) // 2
    low, high = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).split(half, dim=-1)
    return low | (high << 4), torch.cat((scales, zeros), dim=-2)


def dequantize_tokens(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Write the entries of `quantize_tokens`, codes `[..., g * W / 2]` and scales `[..., 2 W]`, to `[..., g, W]`."""
    width = out.shape[-1]
    codes = codes.unflatten(-1, (out.shape[-2], -1))
    scales = scales.unflatten(-1, (2, width)).float()
    low, high = out.split([codes.shape[-1], width - codes.shape[-1]], dim=-1)
    low.copy_(codes & 15)
    high.copy_((codes >> 4)[..., : high.shape[-1]])
    torch.addcmul(scales[..., 1:, :], out, scales[..., :1, :], out=out)
