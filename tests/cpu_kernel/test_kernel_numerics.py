"""Precision of the CPU kernel, and what it does with NaN, infinity and large numbers."""

import pytest
import torch
from cases import difference, exact_entries, needs_compiler, plain_attention
from kernel_cases import LAYERS, attend, check_codes


pytestmark = needs_compiler

NUMBERS = {
    "nan": torch.tensor(torch.nan),
    "other nan": torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32),
    "inf": torch.tensor(torch.inf),
    "-inf": torch.tensor(-torch.inf),
}


@torch.no_grad()
@pytest.mark.parametrize("scaling", [0.02, 0.5])
def test_bf16_is_as_exact_as_pytorchs_kernel(calls, scaling):
    query, entries = torch.randn(2, 12, 1, 128).bfloat16(), torch.randn(2, 1, 4001, 128).bfloat16()
    expected = plain_attention(query, entries, None, scaling)[..., :64]
    packed = query.transpose(1, 2)
    theirs = torch.nn.functional.scaled_dot_product_attention(packed, entries, entries, scale=scaling)
    error, their_error = (
        (found.double() - expected).pow(2).mean().sqrt()
        for found in (attend(query, entries, None, scaling, 64), theirs.transpose(1, 2)[..., :64])
    )
    assert calls["latent_attention"] == 1 and error <= 1.1 * their_error


@torch.no_grad()
def test_a_large_token_without_attention_costs_no_precision(calls):
    """int8: weights are rounded relative to their product with the token's scale, not to the largest scale."""
    latent, rope_key = torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    latent[:, :, 100] *= 1000
    query = torch.cat((torch.zeros(1, 12, 1, 64), torch.ones(1, 12, 1, 64)), dim=-1)
    rope_key[:, :, 100] = -10
    layer = LAYERS["int8"](64, 64)
    layer.append(latent, rope_key)
    check_codes(layer.entries.attend(query, None, 0.1), query, layer, None, 0.1, 64)


@torch.no_grad()
def test_elements_of_many_magnitudes(calls):
    """int4: scales of elements are rounded relative to their typical values, not to the largest."""
    sizes = torch.logspace(-1.5, 1.5, 64)
    layer = LAYERS["int4"](64, 64)
    latent, rope_key = torch.randn(1, 1, 400, 64) * sizes, torch.randn(1, 1, 400, 64) * sizes.flip(0)
    layer.append(latent, rope_key)
    query = torch.randn(1, 12, 1, 128) / torch.cat((sizes, sizes.flip(0)))
    expected = plain_attention(query, exact_entries(layer), None, 0.1)[..., :64]
    unrounded = plain_attention(query, torch.cat((latent, rope_key), dim=-1), None, 0.1)[..., :64]
    error = difference(layer.entries.attend(query, None, 0.1) / sizes, expected / sizes)
    assert error <= 0.25 * difference(expected / sizes, unrounded / sizes)


@torch.no_grad()
def test_zero_points_use_unrounded_weights(calls):
    """68 weights rounded to 16 bits, times zero points, would be 3 off. The rounding of queries accounts for 0.06."""
    layer = LAYERS["int4"](64, 64)
    layer.append(1e5 + torch.randn(1, 1, 68, 64), torch.randn(1, 1, 68, 64))
    query = torch.cat((torch.zeros(1, 12, 1, 64), 5 * torch.randn(1, 12, 1, 64)), dim=-1)
    expected = plain_attention(query, exact_entries(layer), None, 0.1)[..., :64]
    assert difference(layer.entries.attend(query, None, 0.1), expected) <= 0.3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["full", "int8", "int4"])
@pytest.mark.parametrize("number", list(NUMBERS))
@pytest.mark.parametrize("place", ["latent", "rotary key", "query"])
def test_nan_and_infinity_reach_their_sequence_only(calls, place, number, kind, dtype):
    if kind == "full" and "inf" in number:
        pytest.skip("a weight may be zero")
    latent, rope_key, query = torch.randn(2, 1, 300, 64), torch.randn(2, 1, 300, 64), torch.randn(2, 12, 1, 128)
    # The token is in an int4 group, not among the residual tokens.
    given_to, token = {"latent": (latent, 99), "rotary key": (rope_key, 99), "query": (query, 0)}[place]
    given_to[0, 0, token, 5] = NUMBERS[number]
    layer = LAYERS[kind](64, 64)
    layer.append(latent.to(dtype), rope_key.to(dtype))
    given = layer.entries.attend(query.to(dtype), None, 0.1)
    heads = [0] if place == "query" else list(range(12))
    assert not given[0, heads].isfinite().any()
    assert given[1].isfinite().all() and (place != "query" or given[0, 1:].isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [12, 14, 20])
@pytest.mark.parametrize("number", ["inf", "-inf"])
def test_an_infinite_query_reaches_its_head_only(calls, number, heads, dtype):
    query = torch.randn(1, heads, 1, 128).to(dtype)
    query[0, heads - 2, 0, 7] = NUMBERS[number]
    given = attend(query, torch.randn(1, 1, 300, 128).to(dtype), None, 0.1, 64)
    others = [head for head in range(heads) if head != heads - 2]
    assert not given[0, heads - 2].isfinite().any() and given[0, others].isfinite().all()


@torch.no_grad()
def test_an_infinite_scale_of_zero_codes_gives_nan(folder):
    codes = torch.randint(-128, 128, (1, 1, 100, 128), dtype=torch.int8)
    scales = torch.full((1, 1, 100, 2), 1 / 64, dtype=torch.bfloat16)
    codes[0, 0, 40, 64:], scales[0, 0, 40, 1] = 0, -torch.inf
    query = torch.randn(1, 16, 1, 128)
    given = torch.ops.egmla.latent_attention_int8(query, codes, scales, 100, None, 0.1, 64)
    assert not given.isfinite().any()


@torch.no_grad()
def test_large_scores_do_not_overflow(calls):
    query, entries = torch.randn(1, 4, 1, 24) * 100, torch.randn(1, 1, 600, 24) * 100
    expected = plain_attention(query, entries, None, 1.0)[..., :16]
    assert difference(attend(query, entries, None, 1.0, 16), expected) <= 1e-3


@torch.no_grad()
def test_nan_stays_in_its_sequence_without_whole_vectors(calls):
    entries = torch.randn(2, 1, 700, 24)
    entries[0, :, 300, 3] = torch.nan
    given = attend(torch.randn(2, 4, 1, 24), entries, None, 0.3, 16)
    assert given[0].isnan().any() and given[1].isfinite().all()
