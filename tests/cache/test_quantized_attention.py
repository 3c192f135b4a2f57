"""Attention to quantised entries: in pieces as on all, with masks and gradients, in models, and what a step makes."""

import pytest
import torch
from cache_operations import Spy
from cases import BASE, difference, exact_entries, plain_attention, token_ids
from quantized import (
    BF16_TOLERANCE,
    INT8_TOLERANCE,
    OPTIONS,
    TOLERANCE,
    assert_attended_in_pieces,
    rounded_cache,
    tiny_model,
)

from egmla import EGMLACache, EGMLAConfig, entries_egmla, quantization_egmla, quantized_entries_egmla
from egmla.quantized_entries_egmla import ElementGroups, TokenGroups


# Sums in another order may push an element over a rounding boundary, one code up or down. It moves logits by so much.
FLIP_TOLERANCE = {"int8": 0.03, "int4": 0.3}


def random_entries(batch, length, dtype, quantization):
    """A layer's entries, 16 + 8 wide, and the same dequantised, in fp32."""
    config = EGMLAConfig(**{**BASE, "kv_lora_rank": 16, "num_hidden_layers": 1})
    layer = EGMLACache(config, **OPTIONS[quantization]).layers[0]
    layer.append(torch.randn(batch, 1, length, 16).to(dtype), torch.randn(batch, 1, length, 8).to(dtype))
    return layer.entries, exact_entries(layer)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 4, 5, 15, 16, 17, 50, 64, 100])
@pytest.mark.parametrize("batch, threads", [(1, 1), (1, 2), (1, 3), (2, 5), (3, 1)])
def test_attention_in_pieces_equals_attention_on_all(batch, threads, length, dtype, quantization, monkeypatch):
    monkeypatch.setattr(quantized_entries_egmla, "PIECE_TOKENS", 16 * batch)
    monkeypatch.setattr(quantized_entries_egmla, "cpu_threads", lambda: threads)
    entries, exact = random_entries(batch, length, dtype, quantization)
    assert type(entries) is {"int8": ElementGroups, "int4": TokenGroups}[quantization]
    assert entries.shape == (batch, 1, length, 24)
    assert_attended_in_pieces(entries, exact, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("additive", [None, float("-inf"), "lowest", -1e9])
@pytest.mark.parametrize("hidden", [slice(0, 3), slice(0, 40), slice(17, 47), slice(46, 47)])
@pytest.mark.parametrize("threads", [1, 4])
def test_attention_in_pieces_heeds_masks(threads, hidden, additive, dtype, quantization, monkeypatch):
    """Left padding over whole pieces, rows that see different tokens."""
    monkeypatch.setattr(quantized_entries_egmla, "PIECE_TOKENS", 32)
    monkeypatch.setattr(quantized_entries_egmla, "cpu_threads", lambda: threads)
    entries, exact = random_entries(2, 47, dtype, quantization)
    query = torch.randn(2, 3, 2, 24).to(dtype)  # three heads, two tokens
    seen = torch.ones(2, 1, 2, 47, dtype=torch.bool)
    seen[1, :, :, hidden] = False
    seen[:, :, 0, 45:] = False
    value = torch.finfo(dtype).min if additive == "lowest" else additive
    mask = seen if additive is None else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, value)
    expected = plain_attention(query, exact, seen, 0.3)[..., :16]
    given = entries.attend(query, mask, 0.3)
    assert difference(given, expected) <= (TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE)


@torch.no_grad()
def test_many_rows_attend_to_a_dequantised_copy(quantization, monkeypatch):
    """A long chunk behind a past: heads times tokens beyond the packing limit."""
    monkeypatch.setattr(entries_egmla, "PACK_MAX_ROWS", 3)
    entries, exact = random_entries(2, 30, torch.float32, quantization)
    query = torch.randn(2, 2, 4, 24)
    seen = torch.ones(1, 1, 4, 30, dtype=torch.bool).tril(26)
    expected = plain_attention(query, exact, seen, 0.3)[..., :16]
    assert difference(entries.attend(query, None, 0.3), expected) <= TOLERANCE
    monkeypatch.undo()  # few rows: without a mask it is the same
    assert difference(entries.attend(query, None, 0.3), expected) <= TOLERANCE
    monkeypatch.setattr(entries_egmla, "PACK_MAX_ROWS", 3)
    assert difference(entries.attend(query, seen, 0.3), expected) <= TOLERANCE


@torch.no_grad()
def test_models_read_what_a_dense_cache_of_rounded_entries_holds(case, quantization, monkeypatch):
    """Prefill, a chunk, single tokens: the logits of a dense cache that was given the rounded entries."""
    monkeypatch.setattr(quantized_entries_egmla, "PIECE_TOKENS", 16)
    model, ids = tiny_model(case), token_ids(2, 34)
    mine, reference = EGMLACache(model.config, **OPTIONS[quantization]), rounded_cache(model.config, quantization)
    for chunk in ids.split([7, 3, 15, 1, 1, 3, 1, 1, 1, 1], dim=1):
        expected = model(chunk, past_key_values=reference).logits
        assert difference(model(chunk, past_key_values=mine).logits, expected) <= FLIP_TOLERANCE[quantization]


class Foreign:
    """Entries of a class of the same name in another module, as between a checkpoint's own code and the package."""

    def __init__(self, entries):
        self.entries = entries

    def __getattr__(self, name):
        return getattr(self.entries, name)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_caches_of_another_copy_of_the_package(case, quantization, implementation, monkeypatch):
    model, ids = tiny_model(case, attn_implementation=implementation), token_ids(2, 20)
    mine, other = (EGMLACache(model.config, **OPTIONS[quantization]) for _ in range(2))
    append = other.append
    monkeypatch.setattr(other, "append", lambda *arguments: Foreign(append(*arguments)))
    for chunk in ids.split([12, 6, 1, 1], dim=1):
        expected = model(chunk, past_key_values=mine).logits
        assert torch.equal(model(chunk, past_key_values=other).logits, expected)


@torch.no_grad()
def test_int8_logits_do_not_depend_on_chunks(case):
    """Every token reads every token rounded, itself too: whole, in chunks, token by token."""
    model, ids = tiny_model(case), token_ids(2, 12)
    expected = model(ids, past_key_values=EGMLACache(model.config, quantization="int8")).logits
    for sizes in ([5, 7], [1] * 12, [3, 1, 8]):
        cache = EGMLACache(model.config, quantization="int8")
        logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split(sizes, dim=1)]
        assert difference(torch.cat(logits, dim=1), expected) <= FLIP_TOLERANCE["int8"]


@torch.no_grad()
def test_int8_logits_are_close_to_a_full_cache(case):
    model, ids = tiny_model(case), token_ids(2, 30)
    expected = model(ids, use_cache=False).logits
    cache = EGMLACache(model.config, quantization="int8")
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split([20] + 10 * [1], dim=1)]
    assert difference(torch.cat(logits, dim=1), expected) <= INT8_TOLERANCE


@torch.no_grad()
def test_eager_attention_and_left_padding(case, quantization):
    """Weights come back; a padded row gives what it gives alone."""
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    logits = {}
    for implementation in ("sdpa", "eager"):
        model = tiny_model(case, attn_implementation=implementation)
        cache = EGMLACache(model.config, **OPTIONS[quantization])
        model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
        for t in (8, 9):
            out = model(ids[:, t - 1 : t], attention_mask=mask[:, :t], past_key_values=cache)
        logits[implementation] = out.logits
    assert difference(logits["sdpa"], logits["eager"]) <= FLIP_TOLERANCE[quantization]
    out = model(ids[:, :1], past_key_values=cache, output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 1, 10)
    alone = EGMLACache(model.config, **OPTIONS[quantization])
    for chunk in ids[1:, 4:].split([3, 1, 1], dim=1):
        expected = model(chunk, past_key_values=alone).logits
    assert difference(logits["sdpa"][1:], expected) <= FLIP_TOLERANCE[quantization]


@torch.no_grad()
def test_bf16_model(quantization):
    model, ids = tiny_model().to(torch.bfloat16), token_ids(2, 9)
    cache = EGMLACache(model.config, **OPTIONS[quantization])
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split([6, 1, 1, 1], dim=1)]
    assert {chunk.dtype for chunk in logits} == {torch.bfloat16}
    assert cache.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("masked", ["nothing", "boolean", "additive", "one mask for all"])
@pytest.mark.parametrize("batch, threads", [(1, 2), (2, 1), (2, 4)])
def test_pieces_with_gradients_are_apart(batch, threads, masked, quantization, monkeypatch):
    """Without them a piece is overwritten by the next; a backward pass needs them all."""
    monkeypatch.setattr(quantized_entries_egmla, "PIECE_TOKENS", 16 * batch)
    monkeypatch.setattr(quantized_entries_egmla, "cpu_threads", lambda: threads)
    with torch.no_grad():
        entries, exact = random_entries(batch, 50, torch.float32, quantization)
    query = torch.randn(batch, 1, 5, 24, requires_grad=True)
    seen = torch.rand(1 if masked == "one mask for all" else batch, 1, 5, 50) > 0.4
    mask = {"nothing": None, "additive": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}.get(masked, seen)
    output = entries.attend_rows(query, mask, 0.3)
    output.square().sum().backward()
    given, query.grad = query.grad, None
    expected = plain_attention(query, exact, None if mask is None else seen, 0.3)[..., :16]
    expected.square().sum().backward()
    assert difference(output.detach(), expected.detach()) <= TOLERANCE
    assert difference(given, query.grad) <= TOLERANCE


@torch.no_grad()
def test_memory_of_pieces_is_kept(quantization, monkeypatch):
    """The same memory at every step, also where the first step was in inference mode."""
    monkeypatch.setattr(quantized_entries_egmla, "PIECE_TOKENS", 16)
    entries, _ = random_entries(1, 50, torch.float32, quantization)
    groups = [piece.data_ptr() for piece in entries.pieces()][1:-1]
    assert len(set(groups)) == 1
    monkeypatch.setattr(quantized_entries_egmla, "_kept", quantized_entries_egmla._Kept())
    with torch.inference_mode():
        list(entries.pieces())
    before = quantized_entries_egmla._kept.memory
    list(entries.pieces())
    assert quantized_entries_egmla._kept.memory is before is not None


@torch.no_grad()
def test_kept_memory_is_where_the_entries_are(quantization, monkeypatch):
    """Whatever PyTorch's default device is."""
    monkeypatch.setattr(quantized_entries_egmla, "_kept", quantized_entries_egmla._Kept())
    entries, exact = random_entries(1, 50, torch.float32, quantization)
    monkeypatch.setattr(quantized_entries_egmla, "_kept", quantized_entries_egmla._Kept())
    query = torch.randn(1, 1, 5, 24)
    with torch.device("meta"):
        entries.attend_rows(query, None, 0.3)
    given = entries.attend_rows(query, None, 0.3)
    assert difference(given, plain_attention(query, exact, None, 0.3)[..., :16]) <= TOLERANCE


@torch.no_grad()
def test_autocast_leaves_sums_in_fp32(quantization):
    """Left padding, whose lowest number of fp32 bf16 does not have."""
    entries, exact = random_entries(2, 50, torch.float32, quantization)
    query, seen = torch.randn(2, 1, 5, 24), torch.ones(2, 1, 1, 50, dtype=torch.bool)
    seen[1, ..., :7] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = entries.attend(query.transpose(1, 2), seen, 0.3).transpose(1, 2)
    assert difference(given, plain_attention(query, exact, seen, 0.3)[..., :16]) <= TOLERANCE


@torch.no_grad()
def test_autocast_leaves_entries_as_they_are():
    entries, matrix = torch.randn(2, 50, 24), quantization_egmla.rotation(16, 8, torch.device("cpu"))
    expected = quantization_egmla.quantize_elements(entries, matrix, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = quantization_egmla.quantize_elements(entries, matrix, 8)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


# --- what a decode step makes ---


def spied_step(quantization, length=3000):
    model, ids = tiny_model(num_hidden_layers=1, kv_lora_rank=64, qk_rope_head_dim=32), token_ids(1, length + 1)
    cache = EGMLACache(model.config, **OPTIONS[quantization])
    model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
    with Spy(model, cache) as spy:
        model(ids[:, length:], past_key_values=cache)
    return spy


@torch.no_grad()
def test_decode_step_makes_no_dequantised_cache(quantization, monkeypatch):
    """No tensor of as many elements as the cache stands for, in any dtype: a piece at most."""
    monkeypatch.setattr(quantized_entries_egmla, "PIECE_TOKENS", 2048)
    monkeypatch.setattr(quantized_entries_egmla, "_kept", quantized_entries_egmla._Kept())  # as in a new process
    spy = spied_step(quantization)
    assert spy.largest[0] <= 2048 * 96 < 3001 * 96, spy.largest
    assert spy.largest[0] >= 2048 * 64  # the spy saw the piece


@torch.no_grad()
def test_spy_sees_a_dequantised_cache(quantization, monkeypatch):
    """The test above can fail: with pieces as long as the context it does."""
    monkeypatch.setattr(quantized_entries_egmla, "PIECE_TOKENS", 10_000)
    assert spied_step(quantization).largest[0] >= 2944 * 96  # int4: all tokens that are in groups
