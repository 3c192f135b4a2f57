"""Tolerances and comparisons that tests of the CPU kernel share."""

import torch
from cases import difference, exact_entries, plain_attention

from egmla.allocated_cache_egmla import AllocatedLatentLayer
from egmla.bit_allocation_egmla import BitAllocation, LayerBits
from egmla.cache_layers_egmla import GrowingLatentLayer
from egmla.entries_egmla import DenseEntries
from egmla.quantized_cache_egmla import Int4LatentLayer, Int8LatentLayer


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# If codes are multiplied as integers, weights are rounded to 16 bits and queries to int8. For int8 codes that is
# `rounded_queries`; for int4 codes queries are multiplied with the scales of each group before.
INT8_TOLERANCE = TOLERANCE | {torch.float32: 2e-4}
INT4_TOLERANCE = dict.fromkeys(TOLERANCE, 4e-2)


def allocated_layer(rank, rope, *, latent=None, pairs=None, group_size=64, first=4, recent=0):
    """Make a layer with allocated bits: runs of latent channels and of rotary pairs, by default a part of them."""
    if latent is None:
        latent = ((6, 1), (3, rank // 2)) if rank > 1 else ((4, 1),)
    if pairs is None:
        pairs = ((4, rope // 4),) if rope > 3 else ()
    bits = LayerBits(latent, pairs, rank, rope)
    return AllocatedLatentLayer(BitAllocation(group_size, first, recent, (bits,)), 0)


LAYERS = {
    "full": GrowingLatentLayer,
    "int8": Int8LatentLayer,
    "int4": Int4LatentLayer,
    "allocated": allocated_layer,
}


def attend(query, entries, mask, scaling, rank):
    """Attend with queries `[B, H, T, W]` to a tensor of entries `[B, 1, S, W]`."""
    return DenseEntries(entries, rank).attend(query, mask, scaling)


def rounded_queries(query, layer):
    """Rotate queries, round them to int8 with a scale per group, and rotate them back."""
    groups = (query.float() @ layer.matrix).unflatten(-1, (-1, layer.group_size))
    steps = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups * (1 / steps)).round() * steps).flatten(-2) @ layer.matrix


def check_codes(given, query, layer, seen, scaling, rank, factor=1):
    """Check attention on codes. Queries of int8 codes are rounded, or exact where int8 is not multiplied."""
    entries = exact_entries(layer)
    exact = difference(given, plain_attention(query, entries, seen, scaling)[..., :rank])
    if isinstance(layer, Int4LatentLayer):
        assert exact <= factor * INT4_TOLERANCE[query.dtype]
        return
    expected = plain_attention(rounded_queries(query, layer), entries, seen, scaling)[..., :rank]
    assert min(exact, difference(given, expected)) <= factor * INT8_TOLERANCE[query.dtype]
