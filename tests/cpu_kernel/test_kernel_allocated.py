"""Attention of the CPU kernel to entries with allocated bits, against its definition in fp64."""

import pytest
import torch
from cases import difference, exact_entries, needs_compiler, plain_attention
from kernel_cases import TOLERANCE, allocated_layer

from egmla.channel_codes_egmla import PLANES


pytestmark = needs_compiler

MIXED = {"latent": ((8, 1), (6, 7), (4, 19), (3, 33), (2, 16), (1, 5)), "pairs": ((6, 2), (3, 9), (1, 1))}


def fill(layer, tokens, batch=1, dtype=torch.float32):
    """Append entries whose channels have magnitudes and means of their own. Return the layer."""
    sizes = torch.logspace(1, -1, layer.width)
    entries = (torch.randn(batch, 1, tokens, layer.width) + torch.randn(layer.width)) * sizes
    layer.append(*entries.to(dtype).split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1))
    return layer


def check(calls, layer, query, seen=None, threads=1, tolerance=5e-5):
    """Compare with attention in fp64; the tolerance is that of others for entries of magnitude 1, here it is 10."""
    torch.set_num_threads(threads)
    try:
        given = layer.entries.attend(query, seen, 0.02)
    finally:
        torch.set_num_threads(1)
    expected = plain_attention(query, exact_entries(layer), seen, 0.02)[..., : layer.kv_lora_rank]
    assert given.dtype == query.dtype
    assert difference(given, expected) <= tolerance
    assert calls.pop("latent_attention_allocated") == 1 and not calls
    return given


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", list(PLANES))
@pytest.mark.parametrize("channels, pairs", [(3, 1), (16, 8), (37, 11)])
def test_every_width_of_codes(calls, bits, channels, pairs, threads):
    """Runs shorter than a vector, of whole vectors, and with a rest."""
    layer = allocated_layer(40, 24, latent=((bits, channels),), pairs=((bits, pairs),))
    # Without codes a group's tokens are alike, so what is attended to is several times larger.
    tolerance = 2e-4 if bits == 0 else 5e-5
    check(calls, fill(layer, 700), torch.randn(1, 9, 1, 64), threads=threads, tolerance=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("recent", [0, 20])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 67, 68, 69, 88, 131, 132, 133, 4227])
def test_lengths_around_groups(calls, tokens, recent):
    layer = allocated_layer(100, 28, recent=recent, **MIXED)
    check(calls, fill(layer, tokens), torch.randn(1, 12, 1, 128), threads=2)


@torch.no_grad()
@pytest.mark.parametrize("group_size, first", [(8, 0), (8, 3), (24, 4), (64, 70), (200, 1)])
def test_other_groups_and_first_tokens(calls, group_size, first):
    layer = allocated_layer(100, 28, group_size=group_size, first=first, **MIXED)
    check(calls, fill(layer, 1111), torch.randn(1, 3, 1, 128), threads=2)


@torch.no_grad()
@pytest.mark.parametrize(
    "rank, rope, latent, pairs",
    [
        (64, 32, ((4, 30),), ()),  # no rotary key
        (64, 0, ((4, 30),), ()),
        (64, 32, (), ((2, 9),)),  # no latent: only the first tokens are values
        (64, 32, (), ()),
        (64, 32, ((4, 64),), ((4, 16),)),  # every channel
        (7, 4, ((6, 2), (2, 4)), ((4, 1),)),
        (256, 128, ((6, 26), (4, 108), (3, 51), (2, 51)), ((6, 5), (4, 32), (3, 16), (2, 6))),
    ],
)
@pytest.mark.parametrize("heads", [1, 9, 40])
def test_which_channels_are_stored(calls, rank, rope, latent, pairs, heads):
    layer = fill(allocated_layer(rank, rope, latent=latent, pairs=pairs), 300)
    given = check(calls, layer, torch.randn(1, heads, 1, rank + rope))
    assert given.abs().amax() > 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("masked", ["one for all", "each its own"])
def test_batches_with_padding(calls, masked, dtype):
    """Left padding of different lengths, into the groups; a sequence that sees nothing gives zeros."""
    layer = fill(allocated_layer(100, 28, **MIXED), 333, batch=4, dtype=dtype)
    query = torch.randn(4, 9, 1, 128).to(dtype)
    seen = torch.arange(333) >= torch.tensor([0, 2, 90, 333]).view(4, 1, 1, 1)
    seen = seen[2:3] if masked == "one for all" else seen
    tolerance = 10 * TOLERANCE[dtype]
    if masked == "one for all":
        check(calls, layer, query, seen, threads=2, tolerance=tolerance)
        return
    found = layer.entries.attend(query, seen, 0.02)
    expected = plain_attention(query, exact_entries(layer), seen, 0.02)[..., :100]
    assert difference(found[:3], expected[:3]) <= tolerance
    assert (found[3] == 0).all() and calls["latent_attention_allocated"] == 1


@torch.no_grad()
@pytest.mark.parametrize("left", [2, 40, 100, 132])
def test_after_cropping(calls, left):
    """Parts of groups go on as tokens in no group, and room for more groups stays."""
    layer = fill(allocated_layer(100, 28, **MIXED), 500, batch=3)
    layer.crop(left - 500)
    check(calls, layer, torch.randn(3, 9, 1, 128))


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "token, channel", [(100, 3), (100, 101), (0, 3), (2, 95)], ids=["latent", "rotary", "first", "first, not stored"]
)
def test_nan_and_infinity_reach_their_sequence_only(calls, token, channel, value):
    entries = torch.randn(2, 1, 300, 128)
    entries[0, 0, token, channel] = value
    layer = allocated_layer(100, 28, **MIXED)
    layer.append(entries[..., :100], entries[..., 100:])
    found = layer.entries.attend(torch.randn(2, 9, 1, 128), None, 0.1)
    if value != value or token == 100:
        assert found[0].isnan().any(-1).all()
    assert found[1].isfinite().all() and calls["latent_attention_allocated"] == 1


@torch.no_grad()
def test_nan_in_a_query_stays_in_its_head(calls):
    layer, query = fill(allocated_layer(100, 28, **MIXED), 300), torch.randn(1, 9, 1, 128)
    query[0, 4, 0, 99] = torch.nan  # a channel that only the first tokens have
    found = layer.entries.attend(query, None, 0.1)[0]
    assert found[4].isnan().all() and found[[*range(4), *range(5, 9)]].isfinite().all()
    assert calls["latent_attention_allocated"] == 1
