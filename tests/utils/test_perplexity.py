"""Perplexity by hand, windows of a text, and the fraction of a loss that was won back."""

import math

import pytest
import torch
from shapes import CharacterTokenizer, build

from egmla import EGMLACache
from egmla.utils.perplexity import cached_losses, perplexity, recovered_share, token_windows


def test_perplexity_by_hand():
    model = build("llama")
    windows = torch.randint(0, 97, (3, 11))
    logits = model(windows).logits
    losses = [
        -torch.log_softmax(logits[row, position], dim=-1)[windows[row, position + 1]].item()
        for row in range(3)
        for position in range(10)
    ]
    assert perplexity(model, windows, chunk=4) == pytest.approx(math.exp(sum(losses) / 30), rel=1e-5)


def test_perplexity_reports_progress():
    seen = []
    perplexity(build("egmla"), torch.randint(0, 97, (2, 5)), progress=lambda *state: seen.append(state))
    assert seen == [(1, 2), (2, 2)]


def test_token_windows():
    assert token_windows(CharacterTokenizer(), "a" * 25, 10).shape == (2, 10)
    assert token_windows(CharacterTokenizer(), "a" * 25, 10, max_windows=1).shape == (1, 10)
    with pytest.raises(ValueError, match="has 5 tokens and one window needs 10"):
        token_windows(CharacterTokenizer(), "a" * 5, 10)


def test_recovered_share_by_hand():
    # From 4 to 16 the loss is log 4; back to 8 is half of it, on to 32 another half lost.
    assert recovered_share(4.0, 16.0, 8.0) == pytest.approx(0.5)
    assert recovered_share(4.0, 16.0, 4.0) == pytest.approx(1.0)
    assert recovered_share(4.0, 16.0, 32.0) == pytest.approx(-0.5)
    assert recovered_share(None, 16.0, 8.0) is None
    assert recovered_share(4.0, 4.0, 3.0) is None


def test_losses_through_a_cache_are_those_of_each_window_by_itself():
    model = build("egmla")
    windows = torch.randint(0, 97, (3, 21))
    seen = []
    losses = cached_losses(
        model, windows, lambda: EGMLACache(model.config), 8, 2, progress=lambda *state: seen.append(state)
    )
    expected = [math.log(perplexity(model, window[None])) for window in windows]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4) and seen == [(2, 3), (3, 3)]
