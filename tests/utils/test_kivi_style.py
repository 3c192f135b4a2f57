"""The quantised cache of a source, as a peer: which tokens it rounds, how far, and its bytes."""

import pytest
import torch
from shapes import build

from egmla.utils.kivi_style import FIRST_TOKENS, GROUP, RECENT_TOKENS, KiviStyleCache, kivi_style_share, round_trip


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_is_within_half_a_step(bits):
    values = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(bits))
    read = round_trip(values, bits, dim=1)
    step = (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) / (2**bits - 1)
    assert ((read - values).abs() <= step / 2 + 1e-6).all()
    assert all(len(read[row, :, channel].unique()) <= 2**bits for row in range(3) for channel in range(8))


def test_equal_values_stay():
    assert torch.equal(round_trip(torch.full((1, 4, 2), 3.0), 2, dim=1), torch.full((1, 4, 2), 3.0))


def test_first_and_newest_tokens_are_exact():
    """The same in one call as in many, and no token is rounded twice."""
    config = build("llama").config
    width, tokens = config.hidden_size // config.num_attention_heads, FIRST_TOKENS + 2 * GROUP + RECENT_TOKENS + 5
    shape = (1, config.num_key_value_heads, tokens, width)
    keys, values = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    at_once, step_by_step = KiviStyleCache(config, 2), KiviStyleCache(config, 2)
    whole = at_once.update(keys.clone(), values.clone(), 0)
    for start in range(0, tokens, 7):
        parts = (entries[:, :, start : start + 7].clone() for entries in (keys, values))
        found = step_by_step.update(*parts, 0)
    for given, once, stepped in zip((keys, values), whole, found, strict=True):
        assert torch.equal(once, stepped)
        changed = (once != given).flatten(0, 1).any(0).any(-1)
        assert changed.tolist() == [FIRST_TOKENS <= token < FIRST_TOKENS + 2 * GROUP for token in range(tokens)]


def test_share_of_the_bytes():
    config = build("llama").config
    config.head_dim = 64
    # 4 bits and 4 bytes for each 64 elements, of 16 bits: (4 + 0.5) / 16, and a few exact tokens.
    assert kivi_style_share(config, 4, 1_000_000) == pytest.approx(4.5 / 16, rel=1e-3)
    assert kivi_style_share(config, 3) < kivi_style_share(config, 4) < kivi_style_share(config, 4, 2048) < 1
    assert kivi_style_share(config, 2, FIRST_TOKENS + RECENT_TOKENS) == 1
