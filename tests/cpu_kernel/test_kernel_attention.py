"""Attention of the CPU kernel against its definition in fp64: shapes, masks, threads, quantised entries."""

import pytest
import torch
from cases import difference, exact_entries, needs_compiler, plain_attention
from kernel_cases import LAYERS, TOLERANCE, attend, check_codes


pytestmark = [pytest.mark.long, needs_compiler]


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("masked", [None, "one for all", "each its own"])
@pytest.mark.parametrize(
    "batch, heads, rank, rope, tokens",
    [
        (1, 12, 64, 64, 1),
        (1, 12, 64, 64, 1037),
        (2, 9, 64, 32, 700),
        (3, 17, 20, 4, 531),
        (5, 4, 7, 3, 33),
        (2, 40, 96, 0, 300),
        (1, 7, 64, 32, 300),
        (1, 31, 36, 16, 100),
        (1, 3, 512, 64, 600),
        (1, 16, 64, 32, 40),
        (1, 13, 32, 16, 13001),  # more splits than threads
        (2, 21, 48, 16, 333),  # a vector of sixteen elements after one of 32
        (1, 3, 80, 24, 100),
        (1, 12, 48, 24, 100),
        (1, 12, 48, 0, 100),
    ],
)
def test_attention_matches_its_definition(calls, batch, heads, rank, rope, tokens, masked, dtype, threads):
    """Any width and number of heads, a buffer with unused rows, and several numbers of threads and splits."""
    buffer = torch.randn(batch, 1, tokens + 9, rank + rope).to(dtype)
    buffer[:, :, tokens:] = torch.nan
    query = torch.randn(batch, heads, 1, rank + rope).to(dtype)
    seen = None if masked is None else torch.rand(1 if masked == "one for all" else batch, 1, 1, tokens) > 0.4
    if seen is not None:
        seen[..., -1] = True
        seen[-1, ..., : tokens // 2] = tokens < 2  # whole blocks and whole splits are masked
    torch.set_num_threads(threads)
    try:
        given = attend(query, buffer[:, :, :tokens], seen, 0.1, rank)
    finally:
        torch.set_num_threads(1)
    assert given.shape == (batch, heads, 1, rank) and given.dtype == dtype
    expected = plain_attention(query, buffer[:, :, :tokens], seen, 0.1)[..., :rank]
    assert difference(given, expected) <= TOLERANCE[dtype]
    assert calls["latent_attention"] == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rank, rope", [(64, 64), (64, 32), (80, 40), (20, 4), (6, 6), (7, 4), (48, 0)])
@pytest.mark.parametrize("tokens, heads", [(1, 9), (3, 12), (67, 40), (68, 9), (300, 17), (1111, 12)])
def test_attention_on_codes(calls, tokens, heads, rank, rope, masked, kind, dtype):
    """int4 has residual tokens before and after the groups, or no group. An odd width leaves half a byte unused.

    Groups of 64, 48 and 32 elements are multiplied as integers if the processor can; those of 40, 4 and 6 are not.
    """
    if kind == "int8" and rank == 7:
        pytest.skip("groups of one element")
    layer = LAYERS[kind](rank, rope)
    layer.append(torch.randn(2, 1, tokens, rank).to(dtype), torch.randn(2, 1, tokens, rope).to(dtype))
    entries, query = layer.entries, torch.randn(2, heads, 1, rank + rope).to(dtype)
    seen = torch.rand(2, 1, 1, tokens) > 0.3 if masked else None
    if masked:
        seen[..., -1] = True
    check_codes(entries.attend(query, seen, 0.1), query, layer, seen, 0.1, rank)
    assert calls["latent_attention_" + kind] == 1


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "kind, group, rank, rope",
    [
        ("int8", 24, 48, 24),
        ("int8", 8, 64, 64),
        ("int8", 16, 80, 48),
        ("int8", None, 512, 64),
        ("int8", 48, 48, 48),
        ("int4", 2, 64, 64),
        ("int4", 28, 48, 16),
        ("int4", 100, 64, 64),
        ("int4", 200, 80, 48),
        ("int4", 24, 48, 24),
        ("int4", 200, 80, 40),
        ("int4", None, 512, 64),
    ],
)
def test_other_group_sizes_and_splits_inside_a_group(calls, kind, group, rank, rope, threads):
    layer = LAYERS[kind](rank, rope, group_size=group)
    latent = torch.randn(2, 1, 1999, rank)
    latent[0, :, 700:800] += 5  # large zero points, in one sequence only
    layer.append(latent, torch.randn(2, 1, 1999, rope))
    query, seen = torch.randn(2, 21, 1, rank + rope), torch.rand(2, 1, 1, 1999) > 0.2
    seen[:, ..., 300:600] = False
    torch.set_num_threads(threads)
    try:
        given = layer.entries.attend(query, seen, 0.05)
    finally:
        torch.set_num_threads(1)
    check_codes(given, query, layer, seen, 0.05, rank, factor=5)  # entries are five times as large
    assert calls["latent_attention_" + kind] == 1


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("group, rank, rope", [(28, 48, 16), (64, 64, 64), (100, 80, 48), (200, 64, 0)])
def test_no_token_of_a_group_is_lost(calls, group, rank, rope, threads):
    """int4 with scales and queries of one magnitude, which int8 represents exactly."""
    layer = LAYERS["int4"](rank, rope, group_size=group)
    layer.append(torch.randn(2, 1, 1999, rank), torch.randn(2, 1, 1999, rope))
    layer.scales[..., : rank + rope] = 1 / 8
    query, seen = torch.randn(2, 21, 1, rank + rope).sign(), torch.rand(2, 1, 1, 1999) > 0.2
    torch.set_num_threads(threads)
    try:
        given = layer.entries.attend(query, seen, 0.1)
    finally:
        torch.set_num_threads(1)
    expected = plain_attention(query, exact_entries(layer), seen, 0.1)[..., :rank]
    assert difference(given, expected) <= 3e-4


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("threads", [1, 3])
def test_unused_rows_change_nothing(calls, threads, stride):
    """Sequences of several lengths in one fixed buffer, one of them empty; a mask with strides."""
    entries, query = torch.randn(4, 1, 1500, 96), torch.randn(4, 9, 1, 96)
    seen = torch.zeros(4, 1, 1, 1500 * stride, dtype=torch.bool)[..., ::stride]
    for sequence, length in enumerate((0, 1, 517, 1013)):
        seen[sequence, ..., :length] = True
        seen[sequence, ..., : length // 3] = False
    torch.set_num_threads(threads)
    try:
        given = attend(query, entries, seen, 0.1, 64)
        one_for_all = attend(query, entries, seen[2:3], 0.1, 64)
    finally:
        torch.set_num_threads(1)
    assert (given[0] == 0).all()
    assert difference(given[1:], plain_attention(query, entries, seen, 0.1)[1:, ..., :64]) <= 1e-5
    assert difference(one_for_all, plain_attention(query, entries, seen[2:3], 0.1)[..., :64]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_fully_masked_quantised_sequence_gives_zeros(calls, kind):
    layer = LAYERS[kind](64, 64)
    layer.append(torch.randn(2, 1, 300, 64), torch.randn(2, 1, 300, 64))
    seen = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    seen[0] = False
    given = layer.entries.attend(torch.randn(2, 12, 1, 128), seen, 0.1)
    assert (given[0] == 0).all() and (given[1] != 0).any()


@torch.no_grad()
def test_a_fully_masked_sequence_gives_zeros(calls):
    seen = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    seen[1] = False
    given = attend(torch.randn(2, 4, 1, 24), torch.randn(2, 1, 50, 24), seen, 0.3, 16)
    assert (given[1] == 0).all() and given[0].abs().min() > 0


@torch.no_grad()
@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_nothing_to_attend_to(calls, batch, tokens):
    given = attend(torch.randn(batch, 4, 1, 24), torch.randn(batch, 1, tokens, 24), None, 0.3, 16)
    assert given.shape == (batch, 4, 1, 16) and (given == 0).all()
