# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Compare the compiled kernel with PyTorch's attention on this machine, before anything uses it."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from egmla.allocated_cache_egmla import AllocatedLatentLayer
from egmla.bit_allocation_egmla import BitAllocation, LayerBits
from egmla.quantization_egmla import rotation
from egmla.quantized_entries_egmla import ElementGroups, TokenGroups

from .build import WITHOUT


# Sums have another order than PyTorch's. With bf16 entries, weights are rounded to bf16. With codes, queries are
# rounded to int8. With either, exponentials have a relative error of 1e-4.
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 2e-3
# Tokens, width, rank and elements of an int8 group: a remainder beside whole vectors; vectors in pairs; a single
# vector, with groups of more tokens than a block.
SHAPES = ((41 * 76, 228, 152, 76), (20 * 48, 144, 96, 48), (12 * 80, 160, 80, 80))
HEADS = (3, 6, 12, 29)  # one to four tiles


def check_results() -> None:
    """Compare the kernel with PyTorch's attention, several times: a race between threads may not show at once.

    Raises:
        ImportError: if they differ.
    """
    generator = torch.Generator().manual_seed(0)
    for (tokens, width, rank, group), heads in itertools.product(SHAPES, HEADS):
        for found, expected, tolerance in _comparisons(generator, tokens, width, rank, group, heads):
            difference = (found - expected).abs().max().item()
            if not difference < tolerance:
                raise ImportError(
                    f"The CPU kernel is wrong on this machine: its results differ by {difference:.1e} from PyTorch's, "
                    f"by more than {tolerance}, so it is not used. Please report processor and compiler. {WITHOUT}"
                )


def _comparisons(
    generator: torch.Generator, S: int, W: int, R: int, group: int, H: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield results of each operator, the expected results, and the tolerance."""
    B, scaling = 2, 0.02
    operators = torch.ops.egmla
    numbers = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    query = numbers(B, H, 1, W)
    mask = torch.rand(B, 1, 1, S, generator=generator) > 0.3
    entries = numbers(B, 1, S, W)
    matrix = rotation(R, W - R, entries.device)

    codes = torch.randint(-128, 128, (B, 1, S, W), dtype=torch.int8, generator=generator)
    scales = numbers(B, 1, S, W // group).bfloat16() / 128
    from_int8 = ElementGroups(codes, scales, S, matrix, R, torch.float32).to_tensor()
    new_codes, new_scales = torch.empty_like(codes), torch.empty_like(scales)
    operators.write_int8(*entries.split([R, W - R], dim=-1), new_codes, new_scales, 0)
    # Errors in quantisation steps. Rounding loses half a step. It loses up to 1.5 where the two largest elements have
    # different signs.
    steps = new_scales.float().repeat_interleave(group, dim=-1)
    written = ElementGroups(new_codes, new_scales, S, matrix, R, torch.float32).to_tensor()
    errors = (written - entries) @ matrix / steps

    packed = torch.randint(0, 256, (B, 1, S // group, group * W // 2), dtype=torch.uint8, generator=generator)
    factors = numbers(B, 1, S // group, 2 * W).bfloat16() / 16
    groups = entries[:, :, :0], 0, packed, factors, S // group
    from_int4 = TokenGroups(*groups, group, R).to_tensor()

    bits = LayerBits(tuple((bits, bits + R // 16) for bits in (8, 6, 4, 3, 2, 1)), ((6, 3), (2, 9)), R, W - R)
    layer = AllocatedLatentLayer(BitAllocation(64, 4, 0, (bits,)), 0)
    allocated = layer.append(*entries.split([R, W - R], dim=-1))

    rest = mask, scaling, R
    rounded, pairs = query.bfloat16(), entries.bfloat16()
    yield operators.latent_attention(query, entries, *rest), _attention(query, entries, *rest), TOLERANCE
    yield operators.latent_attention(rounded, pairs, *rest), _attention(rounded, pairs, *rest), ROUNDED_TOLERANCE
    found = operators.latent_attention_int8(query, codes, scales, S, *rest)
    yield found, _attention(query, from_int8, *rest), ROUNDED_TOLERANCE
    found = operators.latent_attention_int4(query, *groups, *rest)
    yield found, _attention(query, from_int4, *rest), ROUNDED_TOLERANCE
    found = operators.latent_attention_allocated(query, *allocated.operator_arguments(), *rest)
    yield found, _attention(query, allocated.to_tensor(), *rest), TOLERANCE
    yield errors, torch.zeros(()), 1.6
    yield errors.abs().mean(), torch.tensor(0.25), 0.05  # the mean error of the nearest codes


def _attention(
    query: torch.Tensor, entries: torch.Tensor, mask: torch.Tensor, scaling: float, rank: int
) -> torch.Tensor:
    """Compute attention in fp32 by its definition. Every sequence sees something."""
    scores = (query.float() @ entries.float().mT * scaling).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ entries[..., :rank].float()
