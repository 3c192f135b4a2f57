"""Caches with allocated bits: what they hold and give, their bytes, operations in any order, generation, bad input."""

import copy
import json
import os
import random
import re

import pytest
import torch
from allocated import FIRST, GROUP, PlainLayer, allocation_for, rounded_cache
from cache_operations import (
    WIDTHS,
    Spy,
    check_operations_of_generation,
    check_operations_on_an_empty_cache,
    entries,
    fill,
    storage_bytes,
)
from cases import BASE, CORE_CASES, difference, exact_entries, plain_attention, tiny_config, token_ids
from quantized import TOLERANCE, assert_attended_in_pieces, tiny_model

from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM, allocated_cache_egmla, quantized_entries_egmla
from egmla.allocated_cache_egmla import AllocatedLatentLayer
from egmla.bit_allocation_egmla import read_allocation
from egmla.cache_layers_egmla import GrowingLatentLayer


# Sums in another order may move an element over a rounding boundary. It moves logits by so much.
FLIP_TOLERANCE = 0.5
# Random sequences of operations; the bar is 2,000: EGMLA_CACHE_SEQUENCES=2000.
SEQUENCES = int(os.environ.get("EGMLA_CACHE_SEQUENCES", "100"))
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
BEAMS = {"max_new_tokens": NEW_TOKENS, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}

BITS = {
    "group_tokens": GROUP,
    "first_tokens": FIRST,
    "recent_tokens": 5,
    "share": 0.3,
    "layers": [
        {"latent": [[8, 2], [6, 1], [4, 3], [3, 2], [1, 1]], "rope": [[6, 1]]},
        {"latent": [[4, 7], [2, 13]], "rope": [[3, 1], [2, 1]]},
    ],
    "budgets": {
        "0.125": [{"latent": [[4, 3], [2, 2]], "rope": []}, {"latent": [[2, 5]], "rope": [[2, 1]]}],
        # Nothing of a layer may be worth a bit.
        "0.05": [{"latent": [], "rope": []}, {"latent": [[1, 4]], "rope": []}],
    },
}
CONFIG = EGMLAConfig(**{**BASE, "kv_lora_rank": [12, 20], "qk_rope_head_dim": 4, "kv_cache_bits": BITS})
ALLOCATION = CONFIG.bit_allocation()


@pytest.fixture(params=[None, 0.125, 0.05], ids=["stored", "0.125", "0.05"])
def budget(request):
    return request.param


def allocation_of(budget):
    return ALLOCATION if budget is None else ALLOCATION.at_most(budget)


# --- content, by values that say where they came from ---


def assert_holds(cache, sequences, end, allocation=ALLOCATION):
    """The cache holds tokens 0 to `end` of these sequences, rounded once and no more, in as many bytes as it says."""
    assert cache.get_seq_length() == end
    for layer_idx, layer in enumerate(cache.layers):
        given = torch.cat(entries(layer_idx, sequences, 0, end), dim=-1)
        expected = PlainLayer(allocation, layer_idx).append(given[:, 0]).unsqueeze(1)
        assert layer.entries.shape == expected.shape and layer.batch_size == len(sequences)
        assert difference(layer.entries.to_tensor(), expected) <= TOLERANCE
        assert torch.equal(torch.cat((layer.keys, layer.values), dim=-1), layer.entries.to_tensor())
    assert cache.nbytes == len(sequences) * allocation.nbytes(end, 4)
    assert cache.allocated_nbytes == storage_bytes(cache) >= cache.nbytes


@pytest.fixture
def cache(poisoned_memory):
    return EGMLACache(CONFIG)


def test_growth_keeps_every_token(budget, poisoned_memory):
    cache, start = EGMLACache(CONFIG, bits=budget), 0
    for size in (1, 2, 1, 1, 6, 1, 63, 1, 1, 64, 20, 1, 7, 30):
        for layer_idx in range(2):
            given = cache.update(*entries(layer_idx, [0, 1], start, start + size), layer_idx)
            assert torch.equal(torch.cat(given, dim=-1), cache.layers[layer_idx].entries.to_tensor())
        start += size
        assert_holds(cache, [0, 1], start, allocation_of(budget))


def test_operations_of_generation(cache):
    check_operations_of_generation(cache, assert_holds)


def test_operations_on_an_empty_cache(cache):
    check_operations_on_an_empty_cache(cache, assert_holds)


def test_offload_and_prefetch(cache):
    """All storages leave the device together and come back."""
    fill(cache, [0, 1], 0, 25)
    layer = cache.layers[0]
    assert len(layer.storages) == 4
    layer.device = torch.device("meta")  # stands for an accelerator
    layer.prefetch()
    assert {storage.device.type for storage in layer.storages} == {"meta"}
    layer = cache.layers[1]
    given = layer.entries.to_tensor()
    layer.offload()
    layer.prefetch()
    assert torch.equal(given, layer.entries.to_tensor())


def test_expected_tokens_are_given_room_at_once():
    cache = EGMLACache(CONFIG, expected_tokens=700)
    places = set()
    for start in range(0, 700, 100):
        fill(cache, [0, 1], start, start + 100)
        places.add(cache.layers[1].buffer.data_ptr())
    assert len(places) == 1 and cache.allocated_nbytes <= 1.15 * cache.nbytes
    assert_holds(cache, [0, 1], 700)


# --- bytes ---


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_at_the_published_shape(dtype, poisoned_memory):
    """Counted from storages, at SmolLM2's widths and an eighth: 2,048 tokens are at most 1.25 times as dear as 32K."""
    layers = [{"latent": [[6, 6], [4, 30], [3, 50], [2, 50]], "rope": [[4, 10], [3, 10], [2, 12]]}]
    bits = {"group_tokens": 64, "first_tokens": 4, "layers": layers}
    config = EGMLAConfig(
        **{**BASE, "kv_lora_rank": 256, "qk_rope_head_dim": 128, "num_hidden_layers": 1, "kv_cache_bits": bits}
    )
    per_token = {}
    for tokens in (2048, 32768):
        cache = EGMLACache(config)
        latent = torch.randn(1, 1, 1, 256).to(dtype).expand(-1, -1, tokens, -1)
        cache.append(latent, latent[..., :128], 0)
        groups, rest = divmod(tokens - 4, 64)
        stored = {6: 6, 4: 30 + 20, 3: 50 + 20, 2: 50 + 24}
        group = sum(64 * width * count // 8 for width, count in stored.items()) + 2 * sum(stored.values())
        element = torch.finfo(dtype).bits // 8
        expected = groups * group + element * (4 * 384 + rest * sum(stored.values()))
        assert cache.nbytes == expected == config.bit_allocation().nbytes(tokens, element)
        assert cache.allocated_nbytes == storage_bytes(cache)
        assert cache.allocated_nbytes <= 1.13 * expected
        per_token[tokens] = expected / tokens
    assert 0.1 < per_token[32768] / 768 < 0.13
    assert per_token[2048] <= {torch.bfloat16: 1.25, torch.float32: 1.4}[dtype] * per_token[32768]


# --- the same in every batch and chunking, and in any order of operations ---


def held(cache):
    return [layer.entries.to_tensor() for layer in cache.layers]


def test_a_token_is_the_same_in_every_batch_and_chunking():
    """Bitwise: alone, in a batch, in chunks of any size, after beams took it along."""
    whole = EGMLACache(CONFIG)
    fill(whole, [0, 1, 2], 0, 61)
    for sizes in ([1] * 61, [7, 30, 1, 1, 22], [3, 8, 8, 8, 34]):
        alone, start = EGMLACache(CONFIG), 0
        for size in sizes:
            fill(alone, [1], start, start + size)
            start += size
        for expected, given in zip(held(whole), held(alone), strict=True):
            assert torch.equal(given[0], expected[1])
    beams = EGMLACache(CONFIG)
    fill(beams, [2, 1], 0, 20)
    beams.batch_repeat_interleave(2)
    beams.reorder_cache(torch.tensor([2, 0, 3, 1]))
    fill(beams, [1, 2, 1, 2], 20, 61)
    for expected, given in zip(held(whole), held(beams), strict=True):
        assert torch.equal(given, expected[[1, 2, 1, 2]])


def random_operations(seed: int) -> None:
    """One sequence of operations, on a cache and on the definition; compared after each."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    allocation = allocation_of(choose.choice([None, None, 0.125, 0.05]))
    cache = EGMLACache(CONFIG, bits=allocation.share)
    plain = [PlainLayer(allocation, layer_idx) for layer_idx in range(2)]
    batch = choose.choice([1, 2, 3])
    for _ in range(choose.randint(3, 12)):
        length = cache.get_seq_length()
        operation = choose.choice(
            ["append", "append", "append", "crop", "select", "repeat", "reset", "copy", "offload"]
        )
        if operation == "append" or length == 0:
            tokens = choose.choice([1, 1, 2, 5, 8, 13, 30])
            for layer_idx, width in enumerate(WIDTHS):
                new = torch.randn(batch, 1, tokens, width, generator=generator)
                new *= 10 ** torch.rand(width, generator=generator)
                cache.append(*new.split([width - 4, 4], dim=-1), layer_idx)
                plain[layer_idx].append(new[:, 0])
        elif operation == "crop":
            removed = choose.randint(0, min(length - 1, 25))
            cache.crop(-removed)
            for layer in plain:
                layer.crop(removed)
        elif operation in ("select", "repeat"):
            rows = [choose.randrange(batch) for _ in range(choose.choice([batch, 1, 2]))]
            if operation == "repeat":
                rows = [row for row in range(batch) for _ in range(2)] if batch < 3 else list(range(batch))
                cache.batch_repeat_interleave(len(rows) // batch)
            elif choose.random() < 0.5:
                cache.reorder_cache(torch.tensor(rows))
            else:
                cache.batch_select_indices(torch.tensor(rows))
            for layer in plain:
                layer.select(rows)
            batch = len(rows)
        elif operation == "reset":
            cache.reset()
            plain = [PlainLayer(allocation, layer_idx) for layer_idx in range(2)]
        elif operation == "copy":
            other, cache = cache, copy.deepcopy(cache)
            other.crop(-length)  # must leave the copy alone
        else:
            for layer in cache.layers:
                layer.offload()
                layer.prefetch()
        compare(cache, plain, allocation, batch, generator)


def compare(cache, plain, allocation, batch, generator):
    length, total = cache.get_seq_length(), 0
    for layer, expected in zip(cache.layers, plain, strict=True):
        if not length:
            continue
        # Cropping leaves groups where recent tokens would be.
        first, groups = min(length, allocation.first_tokens), expected.grouped // allocation.group_tokens
        total += groups * layer.bits.group_bytes(allocation.group_tokens) + 4 * first * layer.width
        total += 4 * (length - first - expected.grouped) * layer.bits.stored_channels
        given = layer.entries.to_tensor()
        scale = expected.values.abs().max()
        assert difference(given[:, 0] / scale, expected.values / scale) <= TOLERANCE
        query = torch.randn(batch, 3, 1, given.shape[-1], generator=generator) / scale
        attended = layer.entries.attend(query, None, 0.5)
        exact = plain_attention(query, given, None, 0.5)[..., : layer.kv_lora_rank]
        assert difference(attended / scale, exact / scale) <= TOLERANCE
    assert cache.nbytes == batch * total


@torch.no_grad()
@pytest.mark.parametrize("block", range(10))
def test_random_operations_follow_the_definition(block):
    for seed in range(block * SEQUENCES // 10, (block + 1) * SEQUENCES // 10):
        try:
            random_operations(seed)
        except Exception as error:
            raise AssertionError(f"random_operations({seed}) fails") from error


# --- attention ---


def random_entries(batch, length, dtype, latent=((8, 3), (4, 6), (3, 2)), rope=((6, 1), (2, 1))):
    """A layer's entries, 16 + 8 wide, and the same in fp32."""
    bits = {"group_tokens": GROUP, "first_tokens": FIRST}
    bits["layers"] = [{"latent": [list(run) for run in latent], "rope": [list(run) for run in rope]}]
    config = EGMLAConfig(**{**BASE, "kv_lora_rank": 16, "num_hidden_layers": 1, "kv_cache_bits": bits})
    layer = EGMLACache(config).layers[0]
    layer.append(torch.randn(batch, 1, length, 16).to(dtype), torch.randn(batch, 1, length, 8).to(dtype))
    return layer.entries, exact_entries(layer)


@pytest.fixture(params=["some", "all", "latent only", "rope only", "nothing"])
def stored(request):
    """Channels that have bits: with all of them no token has more than its stored channels."""
    return {
        "some": {},
        "all": {"latent": ((4, 10), (2, 6)), "rope": ((4, 4),)},
        "latent only": {"rope": ()},
        "rope only": {"latent": ()},
        "nothing": {"latent": (), "rope": ()},
    }[request.param]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 11, 12, 50, 67])
@pytest.mark.parametrize("batch, threads", [(1, 1), (1, 2), (2, 5), (3, 1)])
def test_attention_in_pieces_equals_attention_on_all(batch, threads, length, dtype, stored, monkeypatch):
    """Blocks of two pieces, pieces of two groups; first tokens with all channels, the others with the stored ones."""
    monkeypatch.setattr(quantized_entries_egmla, "cpu_threads", lambda: threads)
    entries, exact = random_entries(batch, length, dtype, **stored)
    channels = max(1, entries.bits.stored_channels)
    monkeypatch.setattr(allocated_cache_egmla, "PIECE_ELEMENTS", 16 * batch * channels)
    monkeypatch.setattr(allocated_cache_egmla, "BLOCK_ELEMENTS", 32 * batch * channels)
    assert entries.shape == (batch, 1, length, 24)
    assert_attended_in_pieces(entries, exact, dtype)


@torch.no_grad()
@pytest.mark.parametrize("additive", [None, float("-inf"), "lowest"])
@pytest.mark.parametrize("hidden", [slice(0, 3), slice(0, 40), slice(17, 47), slice(46, 47)])
def test_attention_in_pieces_heeds_masks(hidden, additive, stored, monkeypatch):
    """Left padding over whole pieces, rows that see different tokens, heads in one row each."""
    monkeypatch.setattr(allocated_cache_egmla, "PIECE_ELEMENTS", 256)
    monkeypatch.setattr(allocated_cache_egmla, "BLOCK_ELEMENTS", 512)
    monkeypatch.setattr(quantized_entries_egmla, "cpu_threads", lambda: 4)
    entries, exact = random_entries(2, 47, torch.float32, **stored)
    query = torch.randn(2, 3, 2, 24)  # three heads, two tokens
    seen = torch.ones(2, 1, 2, 47, dtype=torch.bool)
    seen[1, :, :, hidden] = False
    seen[:, :, 0, 45:] = False
    value = torch.finfo(torch.float32).min if additive == "lowest" else additive
    mask = seen if additive is None else torch.zeros(seen.shape).masked_fill(~seen, value)
    expected = plain_attention(query, exact, seen, 0.3)[..., :16]
    assert difference(entries.attend(query, mask, 0.3), expected) <= TOLERANCE


@pytest.mark.parametrize("batch, threads", [(1, 2), (2, 1)])
def test_pieces_with_gradients_are_apart(batch, threads, stored, monkeypatch):
    """Without them a piece is overwritten by the next; a backward pass needs them all."""
    monkeypatch.setattr(allocated_cache_egmla, "PIECE_ELEMENTS", 256)
    monkeypatch.setattr(quantized_entries_egmla, "cpu_threads", lambda: threads)
    with torch.no_grad():
        entries, exact = random_entries(batch, 50, torch.float32, **stored)
    query = torch.randn(batch, 1, 5, 24, requires_grad=True)
    output = entries.attend_rows(query, None, 0.3)
    output.square().sum().backward()
    given, query.grad = query.grad, None
    expected = plain_attention(query, exact, None, 0.3)[..., :16]
    expected.square().sum().backward()
    assert difference(output.detach(), expected.detach()) <= TOLERANCE
    assert difference(given, query.grad) <= TOLERANCE


@torch.no_grad()
def test_decode_step_makes_no_dequantised_cache(monkeypatch):
    """No tensor of as many elements as the cache stands for, codes of a byte each included: a block at most."""
    monkeypatch.setattr(allocated_cache_egmla, "PIECE_ELEMENTS", 2**15)
    monkeypatch.setattr(allocated_cache_egmla, "BLOCK_ELEMENTS", 2**16)
    monkeypatch.setattr(quantized_entries_egmla, "_kept", quantized_entries_egmla._Kept())  # as in a new process
    config = tiny_config(num_hidden_layers=1, kv_lora_rank=64, qk_rope_head_dim=32)
    model = tiny_model(num_hidden_layers=1, kv_lora_rank=64, qk_rope_head_dim=32, kv_cache_bits=allocation_for(config))
    ids, cache = token_ids(1, 3001), EGMLACache(model.config)
    model(ids[:, :3000], past_key_values=cache, logits_to_keep=1)
    with Spy(model, cache) as spy:
        model(ids[:, 3000:], past_key_values=cache)
    assert 2**14 <= spy.largest[0] <= 2**16 < 3000 * cache.layers[0].bits.stored_channels, spy.largest


# --- in models ---


@torch.no_grad()
def test_models_read_what_a_dense_cache_of_rounded_entries_holds(case, monkeypatch):
    """Prefill, a chunk, single tokens: the logits of a dense cache that was given the rounded entries."""
    monkeypatch.setattr(allocated_cache_egmla, "PIECE_ELEMENTS", 256)
    model, ids = tiny_model(case), token_ids(2, 34)
    bits = allocation_for(model.config)
    mine = EGMLACache(model.config, bits=bits)
    allocation = read_allocation(bits, model.config.layer_kv_lora_ranks, model.config.qk_rope_head_dim)
    reference = rounded_cache(model.config, allocation)
    for chunk in ids.split([7, 3, 15, 1, 1, 3, 1, 1, 1, 1], dim=1):
        expected = model(chunk, past_key_values=reference).logits
        assert difference(model(chunk, past_key_values=mine).logits, expected) <= FLIP_TOLERANCE


@torch.no_grad()
def test_eager_attention_and_left_padding(case):
    """Weights come back; both kinds of attention agree, though padding holds something else in eager attention."""
    ids, bits = token_ids(2, 9), allocation_for(tiny_config(case))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    logits = {}
    for implementation in ("sdpa", "eager"):
        model = tiny_model(case, attn_implementation=implementation)
        cache = EGMLACache(model.config, bits=bits)
        model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
        for t in (8, 9):
            out = model(ids[:, t - 1 : t], attention_mask=mask[:, :t], past_key_values=cache)
        logits[implementation] = out.logits
    assert difference(logits["sdpa"], logits["eager"]) <= 1e-4
    out = model(ids[:, :1], past_key_values=cache, output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 1, 10)


@torch.no_grad()
def test_bf16_and_inference_mode():
    model, ids = tiny_model().to(torch.bfloat16), token_ids(2, 20)
    bits = allocation_for(model.config)
    cache = EGMLACache(model.config, bits=bits)
    with torch.inference_mode():
        logits = [model(chunk, past_key_values=cache).logits for chunk in ids[:, :16].split([13, 3], dim=1)]
    logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(16, 20)]
    assert {chunk.dtype for chunk in logits} == {torch.bfloat16}
    assert cache.layers[0].keys.dtype == torch.bfloat16
    cache.crop(-9)
    again = model(ids[:, 11:], past_key_values=cache).logits
    assert torch.isfinite(again).all()


def test_training_with_the_default_cache_keeps_entries_as_they_are():
    """Rounding has no gradient; an explicit cache says so."""
    model = tiny_model(kv_cache_bits=allocation_for(tiny_config())).train()
    ids = token_ids(2, 9)
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert type(out.past_key_values.layers[0]) is GrowingLatentLayer
    message = r"this cache is quantised: rounding has none. Use EGMLACache\(model.config, bits=16\) for training"
    with pytest.raises(ValueError, match=message):
        model(ids, past_key_values=EGMLACache(model.config))
    with torch.no_grad():
        assert type(model(ids, use_cache=True).past_key_values.layers[0]) is AllocatedLatentLayer


# --- generate ---


def generate(model, ids, **options):
    torch.manual_seed(7)
    return model.generate(ids, return_dict_in_generate=True, **options)


def allocated_model(name="input-gate", **overrides):
    bits = allocation_for(tiny_config(name, **overrides))
    return tiny_model(name, kv_cache_bits=bits, **overrides)


@pytest.mark.parametrize("options", [GREEDY, BEAMS, {**GREEDY, "prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("name", CORE_CASES)
def test_generate_uses_the_allocation_by_default(name, options):
    """Tokens of a dense cache of rounded entries; asked for by name it is the same."""
    model, ids = allocated_model(name), token_ids(2, 15)
    reference = rounded_cache(model.config, model.config.bit_allocation())
    expected = generate(model, ids, past_key_values=reference, **options).sequences
    for named in ({}, {"cache_implementation": "quantized"}, {"past_key_values": EGMLACache(model.config)}):
        out = generate(model, ids, **named, **options)
        assert torch.equal(out.sequences, expected)
        assert {type(layer) for layer in out.past_key_values.layers} == {AllocatedLatentLayer}
        assert out.past_key_values.get_seq_length() == 15 + NEW_TOKENS - 1


@pytest.mark.parametrize("name", CORE_CASES)
def test_assisted_decoding_and_prompt_lookup(name):
    """Rejected candidates are cropped off the cache. Without a full group nothing is rounded twice."""
    model, ids = allocated_model(name), token_ids(1, 4)
    bits = {**model.config.kv_cache_bits, "group_tokens": 64}
    model.config.kv_cache_bits = bits
    expected = generate(model, ids, **GREEDY).sequences
    out = generate(model, ids, assistant_model=tiny_model(name, seed=11), **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert type(out.past_key_values.layers[0]) is AllocatedLatentLayer
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3, **GREEDY).sequences, expected)


def test_continuing_from_a_past():
    model, ids, cache = allocated_model(), token_ids(2, 15), None
    reference = rounded_cache(model.config, model.config.bit_allocation())
    for turn in range(3):
        mask = torch.ones_like(ids)  # a generated token 0 is no padding
        out = generate(model, ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        expected = generate(model, ids, attention_mask=mask, past_key_values=reference, **GREEDY).sequences
        assert torch.equal(out.sequences, expected)
        cache = out.past_key_values
        ids = torch.cat((out.sequences, token_ids(2, 3, seed=turn)), dim=1)


def test_budgets_of_generate():
    model, ids = tiny_model(kv_lora_rank=[12, 20], qk_rope_head_dim=4, kv_cache_bits=BITS), token_ids(1, 30)
    sizes = {}
    for bits in (None, 0.3, 0.2, 0.125, 0.06):
        out = generate(model, ids, cache_implementation="quantized", cache_config={"bits": bits}, **GREEDY)
        sizes[bits] = out.past_key_values.nbytes
        assert sizes[bits] == budget_bytes(model.config, bits, 30 + NEW_TOKENS - 1)
    assert sizes[None] == sizes[0.3] > sizes[0.2] == sizes[0.125] > sizes[0.06]
    out = generate(model, ids, cache_implementation="quantized", cache_config={"nbits": 4}, **GREEDY)
    assert type(out.past_key_values.layers[0]).__name__ == "Int4LatentLayer"
    exact = EGMLACache(model.config, bits=16)
    assert torch.equal(
        generate(model, ids, past_key_values=exact, **GREEDY).sequences,
        generate(model, ids, use_cache=False, **GREEDY).sequences,
    )
    with pytest.raises(ValueError, match=r"cache_config has bits=0.125 and 'nbits': bits says it all; leave the rest"):
        generate(model, ids, cache_implementation="quantized", cache_config={"bits": 0.125, "nbits": 4}, **GREEDY)
    with pytest.raises(ValueError, match="only growing caches are quantised"):
        generate(model, ids, cache_implementation="static", **GREEDY)


def budget_bytes(config, bits, tokens):
    allocation = config.bit_allocation()
    return (allocation if bits is None else allocation.at_most(bits)).nbytes(tokens, 4)


# --- configuration, and what is refused ---


def test_configuration_is_saved_and_loaded(tmp_path):
    model, ids = allocated_model(), token_ids(1, 30)
    model.save_pretrained(tmp_path)
    again = EGMLAForCausalLM.from_pretrained(tmp_path)
    assert again.config.kv_cache_bits == model.config.kv_cache_bits
    assert torch.equal(generate(again, ids, **GREEDY).sequences, generate(model, ids, **GREEDY).sequences)
    # As an older version wrote it: without the field.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["kv_cache_bits"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = EGMLAForCausalLM.from_pretrained(tmp_path)
    assert old.config.kv_cache_bits is None
    assert type(EGMLACache(old.config).layers[0]) is GrowingLatentLayer


def layers(**changes):
    return {**BITS, "layers": [{**BITS["layers"][0], **changes}, BITS["layers"][1]]}


@pytest.mark.parametrize(
    "bits, message",
    [
        ([4], r"kv_cache_bits=\[4\]: must be a dictionary with group_tokens, first_tokens and layers, or None"),
        ({"layers": []}, "must be a dictionary with group_tokens, first_tokens and layers"),
        (
            {**BITS, "groups": 3},
            "kv_cache_bits has 'groups': known are group_tokens, first_tokens, recent_tokens, layers",
        ),
        ({**BITS, "group_tokens": 12}, "group_tokens=12: must be a multiple of 8 tokens, .*; use 64"),
        ({**BITS, "first_tokens": -1}, "first_tokens=-1: must be a number of tokens, 0 or more"),
        ({**BITS, "recent_tokens": 1.5}, "recent_tokens=1.5: must be a number of tokens, 0 or more"),
        ({**BITS, "layers": BITS["layers"][:1]}, "1 layers in layers, and the model has 2: .* of another model; use"),
        ({**BITS, "layers": 3}, "3 in layers, and the model has 2"),
        (layers(latent=[[4, 13]]), r"13 latent channels in layers\[0\]\['latent'\], and the layer has 12: .* another"),
        (layers(rope=[[4, 3]]), r"3 rotary pairs in layers\[0\]\['rope'\], and the layer has 2: .* another model"),
        (
            layers(latent=[[5, 2]]),
            r"\[5, 2\] in layers\[0\]\['latent'\]: bits must be one of 8, .* 1, 0, for",
        ),
        (layers(latent=[[-1, 2]]), r"\[-1, 2\] in .* leave those that are not stored out"),
        (layers(latent=[[4, 0]]), r"\[4, 0\] in layers\[0\]\['latent'\]: bits must be one of .* for 1 or more latent"),
        (layers(latent=[[2, 3], [4, 3]]), "bits must fall from run to run, since latent channels are sorted by"),
        (layers(latent=[[4, 3], [4, 3]]), "bits must fall from run to run"),
        (layers(latent=[4, 3]), r"kv_cache_bits has 4 in layers\[0\]\['latent'\]: must be two numbers, bits and a"),
        (layers(latent=[[4, 1.5]]), r"\[4, 1.5\] in .* must be two numbers"),
        (layers(values=[]), r"in layers\[0\]: must have latent and rope, no more"),
        ({**BITS, "budgets": {"0.1": []}}, r"0 layers in budgets\['0.1'\], and the model has 2"),
        ({**BITS, "budgets": {"half": BITS["layers"]}}, "'half' in budgets: must be a share of the source's bytes"),
        ({**BITS, "budgets": [1]}, r"budgets=\[1\]: must be layers by their share of bytes"),
        ({**BITS, "share": 2}, "2 in share: must be a share of the source's bytes, above 0 and at most 1"),
    ],
)
def test_wrong_allocations_are_refused(bits, message):
    """By the configuration and, where the type is right, by a cache that is given one."""
    fields = {**BASE, "kv_lora_rank": [12, 20], "qk_rope_head_dim": 4}
    with pytest.raises(Exception, match=message if isinstance(bits, dict) else "kv_cache_bits"):
        EGMLAConfig(**fields, kv_cache_bits=bits)
    with pytest.raises(ValueError, match=message):
        read_allocation(bits, [12, 20], 4)
    if isinstance(bits, dict):
        with pytest.raises(ValueError, match=message):
            EGMLACache(EGMLAConfig(**fields), bits=bits)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"bits": 0.01},
            r"bits=0.01: must be one of the budgets of kv_cache_bits \(0.05, 0.125, 0.3\) or more, 16 for",
        ),
        ({"bits": 4}, "bits=4: must be a share of the source's bytes, above 0 and at most 1, 16 for entries as they"),
        ({"bits": 0}, "bits=0: must be a share"),
        ({"bits": True}, "bits=True: must be a share"),
        ({"bits": "0.1"}, "bits='0.1': must be a share"),
        ({"bits": 16.0}, "bits=16.0: must be a share"),
        ({"bits": 0.125, "quantization": "int4"}, "quantization='int4' with bits=0.125: each says how entries are"),
        ({"max_cache_len": 9}, "max_cache_len=9 with allocated bits .* only growing caches are quantised; leave it"),
        ({"max_cache_len": 9, "bits": 0.125}, "max_cache_len=9 with allocated bits"),
    ],
)
def test_construction_messages(options, message):
    with pytest.raises(ValueError, match=message):
        EGMLACache(CONFIG, **options)


def test_a_budget_without_an_allocation_is_refused():
    with pytest.raises(ValueError, match=r"bits=0.125, and the config has no kv_cache_bits: .* quantization='int8'"):
        EGMLACache(tiny_config(), bits=0.125)
    bits = {name: value for name, value in BITS.items() if name not in ("share", "budgets")}
    config = EGMLAConfig(**{**BASE, "kv_lora_rank": [12, 20], "qk_rope_head_dim": 4, "kv_cache_bits": bits})
    with pytest.raises(ValueError, match=re.escape("kv_cache_bits (only the stored one) or more")):
        EGMLACache(config, bits=0.5)
    assert type(EGMLACache(config, bits=16, max_cache_len=9)) is EGMLACache
