"""Transformers' quantised cache, as a peer. Its libraries are no dependency: most tests wait for them."""

import copy

import pytest
import torch
from shapes import build
from transformers.cache_utils import DynamicCache

from egmla.utils import stock_quantized
from egmla.utils.stock_quantized import BACKENDS, StockQuantizedCache, missing_package, stock_quantized_share


@pytest.fixture(params=list(BACKENDS))
def backend(request) -> str:
    """A library that is installed."""
    if (package := missing_package(request.param)) is not None:
        pytest.skip(f"{package} is not installed")
    return request.param


def read(model, ids: torch.Tensor, cache, chunk: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)], dim=1)


def test_a_missing_library_is_named(monkeypatch):
    for name, known in BACKENDS.items():
        for installed in (False, True):
            changed = known._replace(is_available=lambda installed=installed: installed)
            monkeypatch.setitem(stock_quantized.BACKENDS, name, changed)
            assert missing_package(name) == (None if installed else known.package)


def test_any_number_of_tokens(backend):
    """HQQ packs what is divisible by four only; the newest tokens are exact until 128 are there."""
    model = build("llama").eval()
    ids = torch.randint(model.config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    full = read(model, ids, DynamicCache(config=model.config), 67)
    errors = []
    for bits in (4, 2):
        cache = StockQuantizedCache(model.config, backend, bits)
        found = read(model, ids, cache, 67)
        assert cache.get_seq_length() == 200
        torch.testing.assert_close(found[:, :67], full[:, :67])  # nothing was rounded before
        errors.append(float((found - full)[:, 134:].abs().mean()))
    assert 0 < errors[0] < errors[1] < float(full.abs().mean())


def test_a_copy_goes_its_own_way(backend):
    model = build("llama").eval()
    ids = torch.randint(model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    cache = StockQuantizedCache(model.config, backend, 4)
    read(model, ids[:, :140], cache, 70)
    copied = copy.deepcopy(cache)
    expected = read(model, ids[:, 140:], copied, 40)
    assert (cache.get_seq_length(), copied.get_seq_length()) == (140, 300)
    assert torch.equal(read(model, ids[:, 140:], cache, 40), expected)


def test_share_of_the_bytes(backend):
    config = build("llama").config
    config.head_dim = 64
    # Codes, and scale and zero point of 16 bits for each 64 elements, of 16 bits; 64 tokens are exact.
    for bits in (4, 2):
        for tokens in (2048, 8192):
            rounded = (bits + 32 / 64) / 16
            expected = (64 + (tokens - 64) * rounded) / tokens
            assert stock_quantized_share(config, backend, bits, tokens) == pytest.approx(expected, rel=1e-6)
