"""Layers as such: entries held apart from tokens seen, where a layer drops some; caches asked by attribute."""

import copy

import pytest
import torch
from cases import BASE, difference, tiny_model, token_ids
from quantized import OPTIONS

from egmla import EGMLACache, EGMLAConfig
from egmla.quantized_cache_egmla import KEPT_FIRST_TOKENS


# fp32 sums in another order.
TOLERANCE = 1e-5
CONFIG = EGMLAConfig(**{**BASE, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "num_hidden_layers": 2})
KINDS = {"growing": {}, **OPTIONS}
# The tokens that `drop` drops: the oldest ones, or the first group, behind the first tokens kept as they are.
DROPPED = {
    "growing": slice(0, 5),
    "int8": slice(0, 5),
    "int4": slice(KEPT_FIRST_TOKENS, KEPT_FIRST_TOKENS + OPTIONS["int4"]["quantization_group_size"]),
}


def drop(cache, kind):
    """Drop entries of every layer as an evicting layer would."""
    for layer in cache.layers:
        rows = DROPPED[kind].stop - DROPPED[kind].start
        if kind == "int4":
            layer.buffer, layer.scales, layer.groups = layer.buffer[:, :, 1:], layer.scales[:, :, 1:], layer.groups - 1
        else:
            layer.replace_storages(lambda storage, rows=rows: storage[:, :, rows:])
        layer.stored -= rows


def kept(tensor, kind):
    """The entries of a tensor `[B, 1, S, .]` that `drop` leaves."""
    return torch.cat((tensor[:, :, : DROPPED[kind].start], tensor[:, :, DROPPED[kind].stop :]), dim=2)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@torch.no_grad()
def test_views_are_of_what_is_stored_and_positions_of_what_is_seen(kind):
    cache = EGMLACache(CONFIG, **KINDS[kind])
    for layer_idx in range(2):
        cache.append(torch.randn(2, 1, 30, 16), torch.randn(2, 1, 30, 8), layer_idx)
    full = copy.deepcopy(cache)
    drop(cache, kind)
    dropped = DROPPED[kind].stop - DROPPED[kind].start
    assert cache.nbytes < full.nbytes
    for step in range(2):
        assert cache.get_seq_length() == full.get_seq_length() == 30 + step
        assert cache.get_mask_sizes(3, 0) == (33 + step - dropped, dropped)
        for layer, whole in zip(cache.layers, full.layers, strict=True):
            expected = kept(whole.entries.to_tensor(), kind)
            assert layer.entries.shape == expected.shape == (2, 1, 30 + step - dropped, 24)
            assert torch.equal(layer.entries.to_tensor(), expected)
            assert torch.equal(torch.cat((layer.keys, layer.values), dim=-1), expected)
            assert layer.stored == expected.shape[2] and layer.seen == 30 + step
        latent, rope_key = torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 8)
        for layer_idx in range(2):
            found = cache.append(latent, rope_key, layer_idx).to_tensor()
            assert torch.equal(found, kept(full.append(latent, rope_key, layer_idx).to_tensor(), kind))
    cache.crop(-4)
    full.crop(-4)
    assert cache.get_seq_length() == 28 and cache.layers[0].stored == 28 - dropped
    assert torch.equal(cache.layers[1].entries.to_tensor(), kept(full.layers[1].entries.to_tensor(), kind))
    cache.reset()
    assert cache.get_seq_length() == cache.layers[0].stored == cache.nbytes == 0


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_models_go_on_after_dropped_entries(kind, tokens, attention):
    """As with a mask over the dropped tokens: positions go on, and new tokens see those before them."""
    model, ids = tiny_model(attn_implementation=attention), token_ids(2, 33)
    cache = EGMLACache(model.config, **KINDS[kind])
    model(ids[:, :30], past_key_values=cache)
    full = copy.deepcopy(cache)
    drop(cache, kind)
    mask = torch.ones(2, 30 + tokens, dtype=torch.long)
    mask[:, DROPPED[kind]] = 0
    new, positions = ids[:, 30 : 30 + tokens], torch.arange(30, 30 + tokens)[None]
    expected = model(new, past_key_values=full, attention_mask=mask, position_ids=positions).logits
    assert difference(model(new, past_key_values=cache).logits, expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "fixed", *OPTIONS])
def test_a_cache_that_promises_no_entries_is_a_stock_cache(kind, monkeypatch):
    """As a cache of another version of this package: it is given keys and values, and gives them back."""
    options = {"fixed": {"max_cache_len": 40}, **KINDS}[kind]
    model, ids = tiny_model(), token_ids(2, 20)
    chunks, logits = ids.split([12, 6, 1, 1], dim=1), {}
    for promised in (True, False):
        monkeypatch.setattr(EGMLACache, "holds_latents", promised)
        cache = EGMLACache(model.config, **options)
        logits[promised] = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
    assert difference(logits[False], logits[True]) <= TOLERANCE
