"""The compiled CPU kernel: compiled here, compared with attention in fp64 and with models that run without it."""

import importlib.util
import subprocess
import sys
from collections import Counter

import pytest
import torch
from cases import (
    EXPANDED_CASES,
    difference,
    exact_entries,
    needs_compiler,
    plain_attention,
    tiny_model,
    token_ids,
)
from torch._inductor.compile_fx import compile_fx

from egmla import EGMLACache, cpu_kernel, cpu_kernel_egmla, load_cpu_kernel
from egmla.cache_egmla import GrowingLatentLayer, Int4LatentLayer, Int8LatentLayer
from egmla.latent_attention_egmla import latent_attention
from egmla.quantization_egmla import quantize_elements, rotation, write_int8


pytestmark = needs_compiler
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Where codes are multiplied as integers, weights are rounded to sixteen bits and queries to bytes: int8's as in
# `in_bytes`, int4's times the scales of each group.
OF_INT8 = TOLERANCE | {torch.float32: 2e-4}
OF_INT4 = dict.fromkeys(TOLERANCE, 4e-2)
LAYERS = {"full": GrowingLatentLayer, "int8": Int8LatentLayer, "int4": Int4LatentLayer}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the kernel is compiled to, once for this module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("extensions")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setattr(cpu_kernel_egmla, "OPERATORS", None)
        cpu_kernel._compiled_library()
        load_cpu_kernel()
        yield folder / "egmla"
    torch.ops.egmla.interface = None  # code that other tests load from checkpoints is to run without it


@pytest.fixture
def calls(folder, monkeypatch):
    """Switches the kernel on for one test; counts calls by operator."""
    counts = Counter()

    class Counting:
        def __getattr__(self, name):
            counts[name] += 1
            return getattr(torch.ops.egmla, name)

    monkeypatch.setattr(cpu_kernel_egmla, "OPERATORS", Counting())
    return counts


def in_bytes(query, layer):
    """Rotated queries of int8 codes as signed bytes, each group with a scale; turned back."""
    groups = (query.float() @ layer.matrix).unflatten(-1, (-1, layer.group_size))
    steps = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups * (1 / steps)).round() * steps).flatten(-2) @ layer.matrix


def check_codes(given, query, layer, seen, scaling, rank, factor=1):
    """That attention is that of the codes, with the queries' rounding or, where bytes are not multiplied, without."""
    entries = exact_entries(layer)
    exact = difference(given, plain_attention(query, entries, seen, scaling)[..., :rank])
    if isinstance(layer, Int4LatentLayer):
        assert exact <= factor * OF_INT4[query.dtype]
        return
    rounded = difference(given, plain_attention(in_bytes(query, layer), entries, seen, scaling)[..., :rank])
    assert min(exact, rounded) <= factor * OF_INT8[query.dtype]


# --- operators ---


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
        (1, 13, 32, 16, 13001),  # more parts than threads
        (2, 21, 48, 16, 333),  # a vector of sixteen elements beside one of 32
        (1, 3, 80, 24, 100),
        (1, 12, 48, 24, 100),
        (1, 12, 48, 0, 100),
    ],
)
def test_attention_is_that_of_its_definition(calls, batch, heads, rank, rope, tokens, masked, dtype, threads):
    """Any width and number of heads; a buffer with room behind its tokens; other threads, other parts."""
    buffer = torch.randn(batch, 1, tokens + 9, rank + rope).to(dtype)
    buffer[:, :, tokens:] = torch.nan
    query = torch.randn(batch, heads, 1, rank + rope).to(dtype)
    seen = None if masked is None else torch.rand(1 if masked == "one for all" else batch, 1, 1, tokens) > 0.4
    if seen is not None:
        seen[..., -1] = True
        seen[-1, ..., : tokens // 2] = tokens < 2  # whole blocks, and whole parts, are hidden
    torch.set_num_threads(threads)
    try:
        given = latent_attention(query, buffer[:, :, :tokens], seen, 0.1, rank)
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
def test_quantised_entries_are_read_as_they_are(calls, tokens, heads, rank, rope, masked, kind, dtype):
    """int4: kept tokens before and behind the groups, no group at all; an odd width has half a byte to spare.

    Groups of 64, 48 and 32 elements are multiplied as integers where the processor can, those of 40, 4 and 6 are not.
    """
    if kind == "int8" and rank == 7:
        pytest.skip("groups of one element")
    layer = LAYERS[kind](rank, rope)
    layer.append(torch.randn(2, 1, tokens, rank).to(dtype), torch.randn(2, 1, tokens, rope).to(dtype))
    entries, query = layer.entries, torch.randn(2, heads, 1, rank + rope).to(dtype)
    seen = torch.rand(2, 1, 1, tokens) > 0.3 if masked else None
    if masked:
        seen[..., -1] = True
    check_codes(latent_attention(query, entries, seen, 0.1, rank), query, layer, seen, 0.1, rank)
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
def test_other_groups_and_parts_that_begin_inside_one(calls, kind, group, rank, rope, threads):
    layer = LAYERS[kind](rank, rope, group_size=group)
    latent = torch.randn(2, 1, 1999, rank)
    latent[0, :, 700:800] += 5  # large zero points, and one sequence's own
    layer.append(latent, torch.randn(2, 1, 1999, rope))
    query, seen = torch.randn(2, 21, 1, rank + rope), torch.rand(2, 1, 1, 1999) > 0.2
    seen[:, ..., 300:600] = False
    torch.set_num_threads(threads)
    try:
        given = latent_attention(query, layer.entries, seen, 0.05, rank)
    finally:
        torch.set_num_threads(1)
    check_codes(given, query, layer, seen, 0.05, rank, factor=5)  # entries are five times as large
    assert calls["latent_attention_" + kind] == 1


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("group, rank, rope", [(28, 48, 16), (64, 64, 64), (100, 80, 48), (200, 64, 0)])
def test_no_token_of_a_group_is_lost(calls, group, rank, rope, threads):
    """int4 with scales and queries of one size each, which bytes hold without rounding."""
    layer = LAYERS["int4"](rank, rope, group_size=group)
    layer.append(torch.randn(2, 1, 1999, rank), torch.randn(2, 1, 1999, rope))
    layer.scales[..., : rank + rope] = 1 / 8
    query, seen = torch.randn(2, 21, 1, rank + rope).sign(), torch.rand(2, 1, 1, 1999) > 0.2
    torch.set_num_threads(threads)
    try:
        given = latent_attention(query, layer.entries, seen, 0.1, rank)
    finally:
        torch.set_num_threads(1)
    expected = plain_attention(query, exact_entries(layer), seen, 0.1)[..., :rank]
    assert difference(given, expected) <= 3e-4


@torch.no_grad()
@pytest.mark.parametrize("scaling", [0.02, 0.5])
def test_in_bf16_it_is_as_exact_as_pytorchs_kernel(calls, scaling):
    query, entries = torch.randn(2, 12, 1, 128).bfloat16(), torch.randn(2, 1, 4001, 128).bfloat16()
    expected = plain_attention(query, entries, None, scaling)[..., :64]
    packed = query.transpose(1, 2)
    theirs = torch.nn.functional.scaled_dot_product_attention(packed, entries, entries, scale=scaling)
    error, their_error = (
        (found.double() - expected).pow(2).mean().sqrt()
        for found in (latent_attention(query, entries, None, scaling, 64), theirs.transpose(1, 2)[..., :64])
    )
    assert calls["latent_attention"] == 1 and error <= 1.1 * their_error


@torch.no_grad()
def test_a_large_token_that_gets_no_attention_costs_others_no_precision(calls):
    """int8: weights are rounded relative to what they are multiplied with, not to the largest scale."""
    latent, rope_key = torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    latent[:, :, 100] *= 1000
    query = torch.cat((torch.zeros(1, 12, 1, 64), torch.ones(1, 12, 1, 64)), dim=-1)
    rope_key[:, :, 100] = -10
    layer = LAYERS["int8"](64, 64)
    layer.append(latent, rope_key)
    check_codes(latent_attention(query, layer.entries, None, 0.1, 64), query, layer, None, 0.1, 64)


@torch.no_grad()
def test_elements_of_many_sizes(calls):
    """int4: scales of elements are rounded relative to what they usually are, not to the largest."""
    sizes = torch.logspace(-1.5, 1.5, 64)
    layer = LAYERS["int4"](64, 64)
    latent, rope_key = torch.randn(1, 1, 400, 64) * sizes, torch.randn(1, 1, 400, 64) * sizes.flip(0)
    layer.append(latent, rope_key)
    query = torch.randn(1, 12, 1, 128) / torch.cat((sizes, sizes.flip(0)))
    expected = plain_attention(query, exact_entries(layer), None, 0.1)[..., :64]
    unrounded = plain_attention(query, torch.cat((latent, rope_key), dim=-1), None, 0.1)[..., :64]
    error = difference(latent_attention(query, layer.entries, None, 0.1, 64) / sizes, expected / sizes)
    assert error <= 0.25 * difference(expected / sizes, unrounded / sizes)


@torch.no_grad()
def test_zero_points_are_not_multiplied_by_the_rounding_of_weights(calls):
    """That of 68 weights to sixteen bits, times zero points, would come to 3; that of queries comes to 0.06."""
    layer = LAYERS["int4"](64, 64)
    layer.append(1e5 + torch.randn(1, 1, 68, 64), torch.randn(1, 1, 68, 64))
    query = torch.cat((torch.zeros(1, 12, 1, 64), 5 * torch.randn(1, 12, 1, 64)), dim=-1)
    expected = plain_attention(query, exact_entries(layer), None, 0.1)[..., :64]
    assert difference(latent_attention(query, layer.entries, None, 0.1, 64), expected) <= 0.3


NUMBERS = {
    "nan": torch.tensor(torch.nan),
    "other nan": torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32),
    "inf": torch.tensor(torch.inf),
    "-inf": torch.tensor(-torch.inf),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["full", "int8", "int4"])
@pytest.mark.parametrize("number", list(NUMBERS))
@pytest.mark.parametrize("place", ["latent", "rotary key", "query"])
def test_what_is_no_number_shows_in_its_sequence_alone(calls, place, number, kind, dtype):
    if kind == "full" and "inf" in number:
        pytest.skip("a weight may be zero")
    latent, rope_key, query = torch.randn(2, 1, 300, 64), torch.randn(2, 1, 300, 64), torch.randn(2, 12, 1, 128)
    # The token is in a group of int4, not among those kept as they are.
    given_to, token = {"latent": (latent, 99), "rotary key": (rope_key, 99), "query": (query, 0)}[place]
    given_to[0, 0, token, 5] = NUMBERS[number]
    layer = LAYERS[kind](64, 64)
    layer.append(latent.to(dtype), rope_key.to(dtype))
    given = latent_attention(query.to(dtype), layer.entries, None, 0.1, 64)
    heads = [0] if place == "query" else list(range(12))
    assert not given[0, heads].isfinite().any()
    assert given[1].isfinite().all() and (place != "query" or given[0, 1:].isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [12, 14, 20])
@pytest.mark.parametrize("number", ["inf", "-inf"])
def test_a_query_without_end_shows_in_its_head_alone(calls, number, heads, dtype):
    query = torch.randn(1, heads, 1, 128).to(dtype)
    query[0, heads - 2, 0, 7] = NUMBERS[number]
    given = latent_attention(query, torch.randn(1, 1, 300, 128).to(dtype), None, 0.1, 64)
    others = [head for head in range(heads) if head != heads - 2]
    assert not given[0, heads - 2].isfinite().any() and given[0, others].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("scaling", [0.0, -0.1])
def test_scores_that_are_not_scaled_upwards_are_pytorchs(calls, scaling):
    query, entries = torch.randn(1, 12, 1, 128), torch.randn(1, 1, 300, 128)
    expected = plain_attention(query, entries, None, scaling)[..., :64]
    assert difference(latent_attention(query, entries, None, scaling, 64), expected) <= 1e-5
    assert not calls
    with pytest.raises(RuntimeError, match="scaling must be positive"):
        torch.ops.egmla.latent_attention(query, entries, None, scaling, 64)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("threads", [1, 3])
def test_room_behind_the_last_token_seen_changes_nothing(calls, threads, stride):
    """Sequences of other lengths in one fixed buffer, one without any token; a mask that is a part of another."""
    entries, query = torch.randn(4, 1, 1500, 96), torch.randn(4, 9, 1, 96)
    seen = torch.zeros(4, 1, 1, 1500 * stride, dtype=torch.bool)[..., ::stride]
    for sequence, length in enumerate((0, 1, 517, 1013)):
        seen[sequence, ..., :length] = True
        seen[sequence, ..., : length // 3] = False
    torch.set_num_threads(threads)
    try:
        given = latent_attention(query, entries, seen, 0.1, 64)
        one_for_all = latent_attention(query, entries, seen[2:3], 0.1, 64)
    finally:
        torch.set_num_threads(1)
    assert (given[0] == 0).all()
    assert difference(given[1:], plain_attention(query, entries, seen, 0.1)[1:, ..., :64]) <= 1e-5
    assert difference(one_for_all, plain_attention(query, entries, seen[2:3], 0.1)[..., :64]) <= 1e-5


@torch.no_grad()
def test_an_infinite_scale_of_codes_that_are_zero_shows(folder):
    codes = torch.randint(-128, 128, (1, 1, 100, 128), dtype=torch.int8)
    scales = torch.full((1, 1, 100, 2), 1 / 64, dtype=torch.bfloat16)
    codes[0, 0, 40, 64:], scales[0, 0, 40, 1] = 0, -torch.inf
    query = torch.randn(1, 16, 1, 128)
    given = torch.ops.egmla.latent_attention_int8(query, codes, scales, 100, None, 0.1, 64)
    assert not given.isfinite().any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_sequence_that_sees_nothing_is_no_nan(calls, kind):
    layer = LAYERS[kind](64, 64)
    layer.append(torch.randn(2, 1, 300, 64), torch.randn(2, 1, 300, 64))
    seen = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    seen[0] = False
    given = latent_attention(torch.randn(2, 12, 1, 128), layer.entries, seen, 0.1, 64)
    assert (given[0] == 0).all() and (given[1] != 0).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "rank, rope, group", [(64, 64, 64), (64, 32, 32), (96, 48, 16), (512, 64, 64), (20, 4, 4), (5, 5, 5), (6, 0, 3)]
)
def test_new_tokens_are_quantised_as_without_it(calls, rank, rope, group, dtype):
    """Into a part of a larger buffer, and nowhere else; rotary keys as attention gives them, with strides."""
    n, width = 700, rank + rope
    latent, rope_key = torch.randn(3, n, rank, 1).movedim(3, 1), torch.randn(3, n, 1, rope).transpose(1, 2)
    sizes = torch.logspace(-3, 3, n)[:, None]
    latent, rope_key = (latent * sizes).to(dtype), (rope_key * sizes).to(dtype)
    latent[:, :, 2], rope_key[:, :, 2] = 0, 0
    buffer = torch.full((3, 1, n + 9, width), 7, dtype=torch.int8)
    factors = torch.full((3, 1, n + 9, width // group), 7, dtype=torch.bfloat16)
    torch.set_num_threads(3)
    try:
        write_int8(latent, rope_key, buffer, factors, 4)
    finally:
        torch.set_num_threads(1)
    assert calls["write_int8"] == 1
    for storage in (buffer, factors):
        assert (storage[:, :, :4] == 7).all() and (storage[:, :, n + 4 :] == 7).all()
    codes, scales = buffer[:, :, 4 : n + 4], factors[:, :, 4 : n + 4]
    entries = torch.cat((latent, rope_key), dim=-1)
    expected, expected_scales = quantize_elements(entries, rotation(rank, rope, entries.device), group)
    # Sums in another order may round the other way, scales and codes; and of two that are largest, one of each sign,
    # either may give the scale.
    steps = expected_scales.double().abs()
    assert ((scales.double().abs() - steps).abs() <= 0.01 * steps).all()
    found, right = (
        c.double().unflatten(-1, (-1, group)) * s.double().unsqueeze(-1)
        for c, s in ((codes, scales), (expected, expected_scales))
    )
    off = (found - right).abs()
    assert (off <= 1.6 * steps.unsqueeze(-1)).all() and (off > 0).double().mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rank, rope, group", [(64, 32, 32), (96, 48, 48), (80, 40, 20), (7, 7, 7)])
def test_new_tokens_that_are_no_numbers_stay_so(calls, rank, rope, group, value):
    """Groups of whole parts of the rotation and of several, the last of which has it."""
    latent, rope_key = torch.randn(1, 1, 3, rank), torch.randn(1, 1, 3, rope)
    latent[0, 0, 1, -1] = value
    layer = Int8LatentLayer(rank, rope, group_size=group)
    entries = layer.append(latent, rope_key)
    of_latent, of_key = layer.scales[0, 0, 1].split([rank // group, rope // group])
    assert not of_latent.isfinite().all() and of_key.isfinite().all()
    assert layer.scales[0, 0, :3:2].isfinite().all() and calls["write_int8"] == 1
    assert not latent_attention(torch.randn(1, 5, 1, rank + rope), entries, None, 0.1, rank).isfinite().any()


@torch.no_grad()
def test_large_new_tokens_do_not_overflow(calls):
    layer = Int8LatentLayer(512, 64)
    entries = layer.append(1e37 * torch.ones(1, 1, 2, 512), torch.zeros(1, 1, 2, 64))
    assert difference(entries.dequantize()[..., :512] / 1e37, torch.ones(1, 1, 2, 512)) <= 1e-2
    assert calls["write_int8"] == 1


@torch.no_grad()
def test_new_tokens_in_fp64_are_pytorchs(calls):
    codes, scales = torch.zeros(1, 1, 3, 24, dtype=torch.int8), torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)
    write_int8(torch.randn(1, 1, 3, 16).double(), torch.randn(1, 1, 3, 8), codes, scales, 0)
    write_int8(torch.randn(1, 1, 3, 16), torch.randn(1, 1, 3, 8).double(), codes, scales, 0)
    assert codes.abs().amax() > 100 and not calls


@torch.no_grad()
@pytest.mark.parametrize("batch, n", [(0, 3), (2, 0)])
def test_no_new_tokens(calls, batch, n):
    codes, scales = torch.ones(batch, 1, 5, 24, dtype=torch.int8), torch.ones(batch, 1, 5, 3, dtype=torch.bfloat16)
    write_int8(torch.zeros(batch, 1, n, 16), torch.zeros(batch, 1, n, 8), codes, scales, 5 - n)
    assert (codes == 1).all() and (scales == 1).all() and calls["write_int8"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent": (2, 1, 5, 17)}, "latents must be"),
        ({"latent": (2, 1, 4, 16)}, "latents must be"),
        ({"latent": (2, 5, 16)}, "latents must be"),
        ({"rope_key": (1, 1, 5, 8)}, "latents must be"),
        ({"start": -1}, "latents must be"),
        ({"start": 5}, r"codes must be \[B, 1, 10 or more, W\]"),
        ({"codes": (2, 9, 24)}, "codes must be"),
        ({"codes": (1, 1, 9, 24)}, "codes must be"),
        ({"scales": (2, 1, 8, 3)}, "scales must be"),
        ({"scales": (2, 1, 9, 5)}, "groups divide"),
        ({"scales": (2, 1, 9, 0)}, "scales must be"),
    ],
)
def test_operator_of_new_tokens_refuses_other_shapes(folder, change, message):
    shapes = {"latent": (2, 1, 5, 16), "rope_key": (2, 1, 5, 8), "codes": (2, 1, 9, 24), "scales": (2, 1, 9, 3)}
    dtypes = {"codes": torch.int8, "scales": torch.bfloat16}
    given = {name: torch.zeros(change.get(name, shape), dtype=dtypes.get(name)) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.egmla.write_int8(*given.values(), change.get("start", 4))


def test_operator_of_new_tokens_refuses_tokens_apart(folder):
    codes, scales = torch.zeros(2, 1, 10, 24, dtype=torch.int8), torch.zeros(2, 1, 5, 3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="codes must be"):
        torch.ops.egmla.write_int8(torch.zeros(2, 1, 5, 16), torch.zeros(2, 1, 5, 8), codes[:, :, ::2], scales, 0)


@torch.no_grad()
def test_a_sequence_that_sees_nothing_is_no_nan(calls):
    seen = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    seen[1] = False
    given = latent_attention(torch.randn(2, 4, 1, 24), torch.randn(2, 1, 50, 24), seen, 0.3, 16)
    assert (given[1] == 0).all() and given[0].abs().min() > 0


@torch.no_grad()
def test_large_scores_do_not_overflow(calls):
    query, entries = torch.randn(1, 4, 1, 24) * 100, torch.randn(1, 1, 600, 24) * 100
    expected = plain_attention(query, entries, None, 1.0)[..., :16]
    assert difference(latent_attention(query, entries, None, 1.0, 16), expected) <= 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"entries": torch.zeros(2, 1, 50, 23)}, "queries must be"),
        ({"entries": torch.zeros(3, 1, 50, 24)}, "entries must be"),
        ({"entries": torch.zeros(2, 1, 24, 50).mT}, "entries must be"),
        ({"entries": torch.zeros(2, 50, 24)}, "entries must be"),
        ({"entries": torch.zeros(2, 1, 50, 24, dtype=torch.float64)}, "must be of float32"),
        ({"mask": torch.ones(2, 1, 1, 49, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 50, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 1, 1, 50)}, "mask must be"),
        ({"query": torch.zeros(2, 4, 2, 24)}, "queries must be"),
        ({"query": torch.zeros(2, 4, 24)}, "queries must be"),
        ({"rank": 25}, "the latent no wider"),
        ({"rank": 0}, "the latent no wider"),
    ],
)
def test_operator_refuses_other_shapes(folder, change, message):
    given = {"query": torch.zeros(2, 4, 1, 24), "entries": torch.zeros(2, 1, 50, 24), "mask": None} | change
    rank = given.pop("rank", 16)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.egmla.latent_attention(*given.values(), 0.3, rank)


@pytest.mark.parametrize(
    "codes, scales, tokens",
    [
        ((1, 1, 5, 8), (1, 1, 5, 0), 5),
        ((1, 1, 5, 8), (1, 1, 4, 2), 5),
        ((1, 1, 5, 8), (1, 1, 5, 3), 5),
        ((1, 1, 5, 8), (1, 1, 5, 2), 6),
        ((1, 1, 5, 8), (1, 1, 5, 2), -1),
        ((1, 5, 8), (1, 5, 2), 5),
    ],
)
def test_int8_operator_refuses_other_shapes(folder, codes, scales, tokens):
    given = torch.zeros(codes, dtype=torch.int8), torch.zeros(scales, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="egmla: "):
        torch.ops.egmla.latent_attention_int8(torch.zeros(1, 4, 1, 8), *given, tokens, None, 0.3, 4)


@pytest.mark.parametrize(
    "kept, codes, scales, first, groups",
    [
        ((1, 1, 5, 8), (1, 1, 3, 15), (1, 1, 3, 16), 4, 3),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 3, 15), 4, 3),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 2, 16), 4, 3),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 3, 16), 4, 4),
        ((1, 1, 5, 8), (1, 1, 3, 16), (1, 1, 3, 16), 6, 3),
        ((1, 1, 5, 8), (2, 1, 3, 16), (2, 1, 3, 16), 4, 3),
        ((1, 1, 5, 6), (1, 1, 3, 16), (1, 1, 3, 16), 4, 3),
    ],
)
def test_int4_operator_refuses_other_shapes(folder, kept, codes, scales, first, groups):
    given = torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="egmla: "):
        torch.ops.egmla.latent_attention_int4(
            torch.zeros(1, 4, 1, 8), torch.zeros(kept), first, *given, groups, None, 0.3, 4
        )


@torch.no_grad()
@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_nothing_to_attend_to(calls, batch, tokens):
    given = latent_attention(torch.randn(batch, 4, 1, 24), torch.randn(batch, 1, tokens, 24), None, 0.3, 16)
    assert given.shape == (batch, 4, 1, 16) and (given == 0).all()


@torch.no_grad()
def test_what_is_no_number_stays_in_its_sequence(calls):
    entries = torch.randn(2, 1, 700, 24)
    entries[0, :, 300, 3] = torch.nan
    given = latent_attention(torch.randn(2, 4, 1, 24), entries, None, 0.3, 16)
    assert given[0].isnan().any() and given[1].isfinite().all()


# --- what is left to PyTorch ---


def test_gradients_several_tokens_and_additive_masks_are_pytorchs(calls):
    query, entries = torch.randn(2, 4, 1, 24, requires_grad=True), torch.randn(2, 1, 50, 24)
    latent_attention(query, entries, None, 0.3, 16).sum().backward()
    assert query.grad.abs().max() > 0
    with torch.no_grad():
        latent_attention(query, entries, torch.zeros(2, 1, 1, 50), 0.3, 16)
        latent_attention(query.expand(-1, -1, 2, -1), entries, torch.ones(1, 1, 2, 50, dtype=torch.bool), 0.3, 16)
        latent_attention(query.double(), entries.double(), None, 0.3, 16)
        torch.jit.trace(
            lambda *inputs: latent_attention(*inputs, None, 0.3, 16), (query.detach(), entries), check_trace=False
        )
    assert not calls


@torch.no_grad()
def test_forward_derivatives_are_not_lost(calls):
    query, entries = torch.randn(2, 4, 1, 24), torch.randn(2, 1, 50, 24)
    with pytest.raises(NotImplementedError):  # as PyTorch's fused kernel has it
        torch.func.jvp(lambda query: latent_attention(query, entries, None, 0.3, 16), (query,), (query,))
    assert not calls


@torch.no_grad()
def test_traced_and_exported_programs_quantise_without(calls):
    class Append(torch.nn.Module):
        def forward(self, latent, rope_key):
            layer = Int8LatentLayer(16, 8)
            layer.append(latent, rope_key)
            return layer.buffer, layer.scales

    given = torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 8)
    torch.jit.trace(Append(), given, check_trace=False)
    program = torch.export.export(Append(), given)
    assert not calls and "egmla" not in str(program.graph)
    assert program.module()(*given)[0].dtype == torch.int8


@torch.no_grad()
def test_exported_programs_do_without(folder, monkeypatch):
    monkeypatch.setattr(cpu_kernel_egmla, "OPERATORS", torch.ops.egmla)

    class Attention(torch.nn.Module):
        def forward(self, query, entries):
            return latent_attention(query, entries, None, 0.3, 16)

    program = torch.export.export(Attention(), (torch.randn(2, 4, 1, 24), torch.randn(2, 1, 50, 24)))
    assert "attention" in str(program.graph) and "egmla" not in str(program.graph)


@torch.no_grad()
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_models_in_fp64_work(calls, quantization):
    model, ids = tiny_model().double(), token_ids(2, 9)
    cache = EGMLACache(model.config, quantization=quantization)
    model(ids[:, :8], past_key_values=cache)
    step = model(ids[:, 8:], past_key_values=cache).logits
    assert difference(step, model(ids, use_cache=False).logits[:, 8:]) <= (5e-2 if quantization else 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_leaves_fp32_as_it_is(calls, kind):
    """Entries are quantised and attended to as without it."""
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = LAYERS[kind](16, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            layer.append(torch.randn(2, 1, 90, 16), torch.randn(2, 1, 90, 8))
            results.append(latent_attention(torch.randn(2, 4, 1, 24), layer.entries, None, 0.3, 16))
    assert torch.equal(*results)


# --- models ---


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "fixed", "int8", "int4"])
def test_generation_is_that_without_it(calls, case, kind, monkeypatch):
    """Left padding and all; the same tokens, logits to rounding."""
    if case in EXPANDED_CASES:
        pytest.skip("nothing is absorbed")
    model, ids = tiny_model(case), token_ids(2, 80)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"fixed": {"max_cache_len": 96}, "growing": {}}.get(kind, {"quantization": kind})

    def generate():
        return model.generate(
            ids,
            attention_mask=mask,
            past_key_values=EGMLACache(model.config, **options),
            max_new_tokens=8,
            do_sample=False,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )

    given = generate()
    used = sum(count for name, count in calls.items() if name.startswith("latent_attention"))
    assert used == 7 * model.config.num_hidden_layers
    monkeypatch.setattr(cpu_kernel_egmla, "OPERATORS", None)
    expected = generate()
    assert torch.equal(given.sequences, expected.sequences)
    # A code that is rounded the other way shows.
    tolerance = 1e-4 if kind in ("growing", "fixed") else 2e-2
    assert difference(torch.stack(given.logits), torch.stack(expected.logits)) <= tolerance


@torch.no_grad()
def test_compiled_steps_use_it(folder, monkeypatch):
    """One graph for all steps of a bucket, logits of eager ones."""
    model, ids = tiny_model(), token_ids(1, 40)
    monkeypatch.setattr(cpu_kernel_egmla, "OPERATORS", torch.ops.egmla)
    expected = model(ids, use_cache=False).logits
    cache = EGMLACache(model.config, max_cache_len=48)
    model(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(sum("latent_attention" in str(node.target) for node in graph.graph.nodes))
        return compile_fx(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for position in range(8, 40):
        step = compiled(ids[:, position : position + 1], past_key_values=cache).logits
        assert difference(step, expected[:, position : position + 1]) <= 1e-4
    assert 1 <= len(found) <= 2 and set(found) == {model.config.num_hidden_layers}
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("with_kernel", [True, False])
def test_steps_of_an_int8_cache_are_compiled_once(folder, monkeypatch, with_kernel):
    """Two graphs, of a constant length and of any, whatever comes after."""
    model, ids = tiny_model(), token_ids(1, 40)
    monkeypatch.setattr(cpu_kernel_egmla, "OPERATORS", torch.ops.egmla if with_kernel else None)
    caches = [EGMLACache(model.config, quantization="int8") for _ in range(2)]
    for cache in caches:
        model(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(sum("write_int8" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=backend)
    for position in range(8, 20):
        step = ids[:, position : position + 1]
        expected = model(step, past_key_values=caches[0]).logits
        assert difference(compiled(step, past_key_values=caches[1]).logits, expected) <= 1e-4
    assert 1 <= len(found) <= 2 and set(found) == {model.config.num_hidden_layers if with_kernel else 0}
    torch._dynamo.reset()


def test_operators_are_described_as_they_are(folder):
    """Arguments that they write to, shapes of results, and sizes that may change from call to call."""
    query = torch.randn(2, 4, 1, 24)
    codes = torch.randint(-128, 128, (2, 1, 9, 24), dtype=torch.int8)
    scales = torch.rand(2, 1, 9, 3).bfloat16()
    packed = torch.randint(0, 256, (2, 1, 3, 8 * 12), dtype=torch.uint8)
    factors = torch.rand(2, 1, 3, 48).bfloat16()
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    for name, arguments in {
        "latent_attention": (query, torch.randn(2, 1, 9, 24), mask, 0.3, 16),
        "latent_attention_int8": (query, codes, scales, 7, None, 0.3, 16),
        "latent_attention_int4": (query, torch.randn(2, 1, 5, 24), 4, packed, factors, 2, None, 0.3, 16),
        "write_int8": (torch.randn(2, 1, 3, 16), torch.randn(2, 1, 3, 8), codes, scales, 4),
    }.items():
        torch.library.opcheck(getattr(torch.ops.egmla, name).default, arguments)


# --- loading ---


def test_it_is_compiled_once(folder, monkeypatch):
    (library,) = folder.iterdir()  # nothing half-made beside it

    def refuse(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder.parent))
    monkeypatch.setattr(subprocess, "run", refuse)
    assert cpu_kernel._compiled_library() == library
    monkeypatch.setattr(cpu_kernel, "_processor", lambda: "another")
    with pytest.raises(AssertionError, match="compiled again"):
        cpu_kernel._compiled_library()


@pytest.mark.parametrize(
    "compiler, message",
    [
        ("no-such-compiler", "needs a C\\+\\+ compiler, and 'no-such-compiler' cannot be run"),
        ("false", "not be compiled"),
    ],
)
def test_no_compiler(folder, tmp_path, monkeypatch, compiler, message):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(
        ImportError, match="(?s)" + message + ".*in the environment variable CXX.*Without the kernel everything"
    ):
        cpu_kernel._compiled_library()
    assert not list((tmp_path / "egmla").iterdir())


@pytest.mark.parametrize("place", ["no home", "a file"])
def test_no_folder_to_compile_into(folder, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "" if place == "no home" else str(tmp_path / "file"))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cpu_kernel.Path, "home", no_home)
    with pytest.raises(ImportError, match=r"no folder .*TORCH_EXTENSIONS_DIR\. Without the kernel everything"):
        cpu_kernel._compiled_library()


def test_damaged_library(folder, tmp_path, monkeypatch):
    """Named, to be deleted; in a process that has loaded none."""
    (library,) = folder.iterdir()
    (tmp_path / "egmla").mkdir()
    (tmp_path / "egmla" / library.name).write_bytes(b"not a library")
    code = "from egmla import load_cpu_kernel; load_cpu_kernel()"
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ImportError" in done.stderr and f"{library.name} cannot be loaded" in done.stderr
    assert "Delete it and try again" in done.stderr


def test_wrong_results_keep_it_off(folder, monkeypatch):
    monkeypatch.setattr(torch.ops.egmla, "interface", None)
    monkeypatch.setattr(cpu_kernel_egmla, "OPERATORS", None)
    monkeypatch.setattr(cpu_kernel, "TOLERANCE", 0.0)
    with pytest.raises(ImportError, match=r"wrong on this machine.*differ by .*it is not used"):
        load_cpu_kernel()
    assert cpu_kernel_egmla.OPERATORS is None
    assert copy_of_the_code().cpu_operators() is None


def test_code_of_a_checkpoint_finds_it(folder, monkeypatch):
    assert copy_of_the_code().cpu_operators() is torch.ops.egmla
    monkeypatch.setattr(torch.ops.egmla, "interface", cpu_kernel_egmla.INTERFACE + 1)  # another version's
    assert copy_of_the_code().cpu_operators() is None


def copy_of_the_code():
    """A copy of the module, as `trust_remote_code` makes one."""
    specification = importlib.util.spec_from_file_location("copy_of_it", cpu_kernel_egmla.__file__)
    copy = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copy)
    return copy


def test_command_line_switches_it_on(folder, tmp_path):
    """A process of its own; without a compiler the command says so before anything else."""
    environment = {"TORCH_EXTENSIONS_DIR": str(folder.parent), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "egmla", "--cpu-kernel", "presets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment |= {"CXX": "no-such-compiler"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and "no-such-compiler" in done.stderr and "Traceback" not in done.stderr
