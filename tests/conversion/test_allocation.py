"""Allocation of bits against brute force, its budget in bytes, and smaller budgets as prefixes."""

from itertools import pairwise, product

import pytest
import torch

from egmla.conversion.allocation import (
    NOT_STORED,
    ROUNDING,
    LayerBits,
    Storage,
    allocate_bits,
    allocation_cost,
    as_config,
    cache_bytes,
)


STORAGE = Storage(group_tokens=8, first_tokens=2, recent_tokens=4)
TOKENS = 86  # ten groups behind the first tokens


def importances(layers: int = 3, rank: int = 12, pairs: int = 5, seed: int = 0) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(seed)

    def falling(count):
        values = torch.exp(3 * torch.randn(count, generator=generator, dtype=torch.float64))
        return values.sort(descending=True).values

    return [falling(rank) for _ in range(layers)], [falling(pairs) for _ in range(layers)]


def all_allocations(rank: int, pairs: int):
    """Every allocation of one layer with bits that do not rise along the channels, and with some in the latent."""
    for latent in product(ROUNDING, repeat=rank):
        for rope in product(ROUNDING, repeat=pairs):
            if all(list(bits) == sorted(bits, reverse=True) for bits in (latent, rope)) and latent[0] != NOT_STORED:
                yield LayerBits(*([bits for bits in kind if bits != NOT_STORED] for kind in (latent, rope)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_no_other_allocation_of_as_many_bytes_costs_less(seed, share):
    latents, pairs = importances(1, 3, 2, seed)
    most = share * cache_bytes([LayerBits([8] * 3, [8] * 2)], [7], STORAGE, TOKENS)
    chosen = allocate_bits(latents, pairs, most, TOKENS, STORAGE)
    used, cost = cache_bytes(chosen, [7], STORAGE, TOKENS), allocation_cost(chosen, latents, pairs)
    # Exact tokens are counted too, and are no matter of bits: compared without any.
    spent = cache_bytes(chosen, [7], Storage(8, 0, 0), 80)
    others = [
        allocation_cost([other], latents, pairs)
        for other in all_allocations(3, 2)
        if cache_bytes([other], [7], Storage(8, 0, 0), 80) <= spent
    ]
    assert used <= most and len(others) > 10
    assert cost == pytest.approx(min(others))


@pytest.mark.parametrize("share", [0.12, 0.2, 0.4, 0.8])
def test_a_budget_is_used_and_never_exceeded(share):
    latents, pairs = importances()
    most = share * cache_bytes([LayerBits([8] * 12, [8] * 5)] * 3, [22] * 3, STORAGE, TOKENS)
    chosen = allocate_bits(latents, pairs, most, TOKENS, STORAGE)
    step = 2 * TOKENS * STORAGE.channel_bits(8) / 8  # what one more pair may take at most
    assert most - step - 4 * 22 < cache_bytes(chosen, [22] * 3, STORAGE, TOKENS) <= most


def test_smaller_budgets_are_prefixes():
    latents, pairs = importances()
    full = cache_bytes([LayerBits([8] * 12, [8] * 5)] * 3, [22] * 3, STORAGE, TOKENS)
    budgets = [allocate_bits(latents, pairs, share * full, TOKENS, STORAGE) for share in (0.7, 0.4, 0.2, 0.12)]
    for larger, smaller in pairwise(budgets):
        for before, after in zip(larger, smaller, strict=True):
            for more, fewer in zip(before, after, strict=True):
                assert list(more) == sorted(more, reverse=True)
                assert len(fewer) <= len(more)
                assert all(few <= many for few, many in zip(fewer, more, strict=False))


def test_layers_get_bits_by_what_they_matter():
    latents, pairs = importances(1)
    chosen = allocate_bits([latents[0], latents[0] / 100], [pairs[0], pairs[0] / 100], 800, TOKENS, STORAGE)
    for first, second in zip(*chosen, strict=True):
        assert sum(first) > sum(second) and len(first) >= len(second) > 0


def test_the_rank_is_limited():
    latents, pairs = importances()
    most = cache_bytes([LayerBits([4] * 12, [4] * 5)] * 3, [22] * 3, STORAGE, TOKENS)
    assert max(len(layer.latent) for layer in allocate_bits(latents, pairs, most, TOKENS, STORAGE)) > 4
    limited = allocate_bits(latents, pairs, most, TOKENS, STORAGE, max_rank=4)
    assert max(len(layer.latent) for layer in limited) == 4


def test_bytes_by_hand():
    layers = [LayerBits([8, 2], [4])]
    # A group of 8 behind 2 first tokens of all 7 numbers; of 17 tokens 7 are newer, of the 4 numbers with bits.
    codes = 8 * (8 + 2 + 2 * 4) / 8
    scales = 4 * 16 / 8
    assert cache_bytes(layers, [7], STORAGE, 17) == codes + scales + 2 * (2 * 7 + 7 * 4)
    assert cache_bytes(layers, [7], STORAGE, 13) == 2 * (2 * 7 + 11 * 4)
    assert cache_bytes(layers, [7], STORAGE, 1) == 2 * 7


def test_the_form_that_a_configuration_has():
    large, small = [LayerBits([8, 4, 4, 2], [4, 3, 3])], [LayerBits([2], [])]
    assert as_config({0.25: large, 0.125: small}, Storage()) == {
        "group_tokens": 64,
        "first_tokens": 4,
        "recent_tokens": 64,
        "share": 0.25,
        "layers": [{"latent": [[8, 1], [4, 2], [2, 1]], "rope": [[4, 1], [3, 2]]}],
        "budgets": {"0.125": [{"latent": [[2, 1]], "rope": []}]},
    }


def test_budgets_that_cannot_be_met_and_channels_out_of_order_are_refused():
    latents, pairs = importances()
    with pytest.raises(
        ValueError, match=r"No cache of 86 tokens has at most 3 bytes: the smallest, .*, has \d+\. Give"
    ):
        allocate_bits(latents, pairs, 3, TOKENS, STORAGE)
    with pytest.raises(ValueError, match="Importances must come largest first"):
        allocate_bits([latents[0].flip(0)], pairs[:1], 400, TOKENS, STORAGE)
