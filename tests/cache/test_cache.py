"""The latent cache: its size, counted from storages; every operation of generation; what a decode step allocates."""

import copy

import pytest
import torch
from cache_operations import Spy, call_every_operation, reachable_tensors, storage_bytes
from cases import BASE, EXPANDED_CASES, difference, tiny_model, token_ids
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM, EGMLAModel, entries_egmla


# fp32 sums in another order.
TOLERANCE = 1e-5
# bf16 outputs of attention over values around 1: a few roundings of 2^-8 each.
BF16_TOLERANCE = 0.03
# Beyond 1,000 tokens a buffer has at most an eighth to spare, plus what the last step has not filled.
ALLOCATION_BOUND = 1.25

# The published row: 12 layers, width 768, 12 heads of 64 + 64 / 64. Small vocabulary and MLP: they cache nothing.
PUBLISHED = {"vocab_size": 61, "intermediate_size": 32, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
PUBLISHED_ROWS = {
    "kv64": ({}, 1536),
    "kv256 without a gate": ({"kv_lora_rank": 256, "kv_gate": None}, 3840),
    "kv16": ({"kv_lora_rank": 16}, 960),
}


@pytest.fixture(scope="module")
def published_models():
    models = {}

    def build(row):
        if row not in models:
            fields, elements = PUBLISHED_ROWS[row]
            torch.manual_seed(0)
            models[row] = EGMLAForCausalLM(EGMLAConfig(**PUBLISHED, **fields)).eval(), elements
        return models[row]

    return build


# --- size ---


@pytest.mark.parametrize("row", list(PUBLISHED_ROWS))
def test_elements_per_token_after_generate(row, published_models):
    """Counted from real storages, not from the formula: everything the cache object holds."""
    model, elements = published_models(row)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (64, 64, 64)
    assert config.cache_elements_per_token == elements
    assert config.cache_bytes_per_token() == 2 * elements
    held_before = sum(tensor.numel() for tensor in reachable_tensors(dict(model.named_modules())))

    ids = token_ids(2, 11, vocab_size=61)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert type(cache) is EGMLACache and cache.get_seq_length() == 16
    assert cache.nbytes == 2 * 16 * elements * 4
    assert cache.allocated_nbytes == storage_bytes(cache)
    capacity = cache.layers[0].buffer.shape[2]
    assert storage_bytes(cache) == 2 * capacity * elements * 4
    assert capacity <= 16 + 64
    # Nothing per token hides in the model.
    assert sum(tensor.numel() for tensor in reachable_tensors(dict(model.named_modules()))) == held_before

    # With room for exactly these tokens, storages are the entries and a length per layer.
    fixed = EGMLACache(config, max_cache_len=16)
    model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=fixed)
    assert fixed.get_seq_length() == 16
    assert storage_bytes(fixed) == 2 * 16 * elements * 4 + 12 * 8
    assert fixed.nbytes == fixed.allocated_nbytes == 2 * 16 * elements * 4


def test_published_reductions():
    """91.67 % below the 18,432 elements of multi-head attention, 60 % below MLA's 3,840."""
    heads = 12 * 2 * 12 * 64
    assert heads == 18_432
    assert round(100 * (1 - PUBLISHED_ROWS["kv64"][1] / heads), 2) == 91.67
    assert 1 - PUBLISHED_ROWS["kv64"][1] / PUBLISHED_ROWS["kv256 without a gate"][1] == pytest.approx(0.6)


@torch.no_grad()
def test_allocation_is_bounded_beyond_1000_tokens(published_models):
    """At every length, by steps of one token: after a prefill, and grown from nothing."""
    model, elements = published_models("kv64")
    ids = token_ids(1, 1001, vocab_size=61)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert cache.get_seq_length() == 1008 and cache.nbytes == 1008 * elements * 4
    assert storage_bytes(cache) <= ALLOCATION_BOUND * cache.nbytes

    cache = EGMLACache(EGMLAConfig(num_hidden_layers=1))
    one = torch.zeros(1, 1, 1, 64)
    reallocations, last = 0, 0
    for length in range(1, 4001):
        cache.update(one, one, 0)
        address = cache.layers[0].buffer.data_ptr()
        reallocations, last = reallocations + (address != last), address
        if length > 1000:
            assert cache.allocated_nbytes <= ALLOCATION_BOUND * cache.nbytes
    # Geometric growth: some twenty reallocations, not thousands of copies.
    assert reallocations < 40


@torch.no_grad()
def test_size_follows_the_rank_of_each_layer(case):
    model, ids = tiny_model(case), token_ids(3, 7)
    for cache in (EGMLACache(model.config, bits=16), EGMLACache(model.config, max_cache_len=7, bits=16)):
        model(ids, past_key_values=cache)
        widths = [layer.buffer.shape[-1] for layer in cache.layers]
        assert widths == model.config.cache_elements_per_layer
        assert sum(widths) == model.config.cache_elements_per_token
        ids_of_tokens = 4 if case in EXPANDED_CASES else 0
        assert cache.nbytes == 3 * 7 * (sum(widths) * 4 + ids_of_tokens)
        assert cache.nbytes == 3 * 7 * model.config.cache_bytes_per_token(4)
        holders = cache.layers + ([cache.token_ids] if ids_of_tokens else [])
        assert cache.allocated_nbytes == sum(holder.buffer.untyped_storage().nbytes() for holder in holders)


# --- content, by values that say where they came from ---


CONFIG = EGMLAConfig(**{**BASE, "kv_lora_rank": [3, 5], "qk_rope_head_dim": 4})


def entries(layer_idx, sequences, start, end, dtype=torch.float32):
    """Entries whose values say which sequence, token, layer and element they are: `[B, 1, T, R]`, `[B, 1, T, P]`."""
    width = CONFIG.cache_elements_per_layer[layer_idx]
    values = torch.tensor(
        [
            [[10_000 * b + 10 * t + layer_idx + w / 32 for w in range(width)] for t in range(start, end)]
            for b in sequences
        ],
        dtype=dtype,
    )
    values = values.reshape(len(sequences), 1, end - start, width)
    return values.split([width - 4, 4], dim=-1)


def fill(cache, sequences, start, end):
    for layer_idx in range(2):
        cache.update(*entries(layer_idx, sequences, start, end), layer_idx)


def assert_holds(cache, sequences, end):
    """The cache holds tokens 0 to `end` of these sequences, exactly, and says so."""
    assert cache.get_seq_length() == end and cache.get_query_offset(0) == end
    for layer_idx, layer in enumerate(cache.layers):
        latents, rope_keys = entries(layer_idx, sequences, 0, end)
        assert torch.equal(layer.keys, latents) and torch.equal(layer.values, rope_keys)
        assert torch.equal(layer.entries.to_tensor(), torch.cat((latents, rope_keys), dim=-1))
        assert layer.batch_size == len(sequences)
    assert cache.nbytes == len(sequences) * end * sum(CONFIG.cache_elements_per_layer) * 4


@pytest.fixture(params=["growing", "fixed"])
def cache(request, poisoned_memory):
    return EGMLACache(CONFIG, max_cache_len=None if request.param == "growing" else 1200)


def test_growth_keeps_every_token(cache):
    """Over several reallocations, by chunks of odd sizes: what update returns, and what is held."""
    start = 0
    for size in (1, 63, 1, 1, 64, 200, 1, 7, 300, 1, 129, 90, 300):
        for layer_idx in range(2):
            latents, rope_keys = cache.update(*entries(layer_idx, [0, 1], start, start + size), layer_idx)
            expected = entries(layer_idx, [0, 1], 0, start + size)
            assert torch.equal(latents, expected[0]) and torch.equal(rope_keys, expected[1])
            packed = cache.layers[layer_idx].buffer.untyped_storage().data_ptr()
            assert latents.untyped_storage().data_ptr() == packed, "a copy, not a view"
        start += size
        assert_holds(cache, [0, 1], start)


@torch.no_grad()
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_expected_tokens_are_given_room_at_once(quantization):
    """A prompt in chunks stays where its first tokens went; more than expected, and after a reset, is taken too."""
    cache = EGMLACache(CONFIG, quantization=quantization, expected_tokens=700)
    plain = EGMLACache(CONFIG, quantization=quantization)
    for _ in range(2):
        places = set()
        for start in range(0, 700, 100):
            fill(cache, [0, 1], start, start + 100)
            fill(plain, [0, 1], start, start + 100)
            places.add(cache.layers[1].buffer.data_ptr())
        assert len(places) == 1
        assert cache.nbytes == plain.nbytes and cache.allocated_nbytes <= 1.15 * cache.nbytes
        fill(cache, [0, 1], 700, 900)
        fill(plain, [0, 1], 700, 900)
        for mine, other in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)
        cache.reset()
        plain.reset()


@pytest.mark.parametrize("options", [{"expected_tokens": 0}, {"expected_tokens": 9, "max_cache_len": 9}])
def test_expected_tokens_are_checked(options):
    with pytest.raises(ValueError, match=r"expected_tokens=\d.*at least 1 token, and is for growing caches"):
        EGMLACache(CONFIG, **options)


def test_append_returns_a_view_of_all_entries(cache):
    fill(cache, [0], 0, 5)
    given = cache.append(*entries(0, [0], 5, 6), 0).to_tensor()
    assert torch.equal(given, torch.cat(entries(0, [0], 0, 6), dim=-1))
    assert given.data_ptr() == cache.layers[0].buffer.data_ptr()


def test_reorder(cache):
    fill(cache, [0, 1, 2], 0, 70)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_holds(cache, [2, 0, 0], 70)
    fill(cache, [2, 0, 0], 70, 72)
    assert_holds(cache, [2, 0, 0], 72)


def test_crop(cache):
    fill(cache, [0, 1], 0, 90)
    cache.crop(0)
    assert_holds(cache, [0, 1], 90)
    cache.crop(-30)
    assert_holds(cache, [0, 1], 60)
    fill(cache, [0, 1], 60, 100)
    assert_holds(cache, [0, 1], 100)
    with pytest.raises(ValueError, match=r"crop\(5\): .*negative.*use crop\(-5\)"):
        cache.crop(5)
    assert_holds(cache, [0, 1], 100)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    fill(cache, [0, 1], 0, 3)
    assert_holds(cache, [0, 1], 3)


def test_batch_repeat_and_select(cache):
    fill(cache, [0, 1], 0, 70)
    cache.batch_repeat_interleave(3)
    assert_holds(cache, [0, 0, 0, 1, 1, 1], 70)
    cache.batch_select_indices(torch.tensor([4, 0]))
    assert_holds(cache, [1, 0], 70)
    fill(cache, [1, 0], 70, 140)
    assert_holds(cache, [1, 0], 140)


def test_reset(cache):
    fill(cache, [0, 1], 0, 70)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    fill(cache, [1, 0], 0, 4)
    assert_holds(cache, [1, 0], 4)


def test_operations_on_an_empty_cache(cache):
    call_every_operation(cache)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and cache.allocated_nbytes == 0
    assert cache.layers[0].keys is None and cache.layers[0].values is None
    fill(cache, [0], 0, 2)
    assert_holds(cache, [0], 2)


def test_early_initialization(cache):
    cache.early_initialization(batch_size=2, num_heads=9, head_dim=9, dtype=torch.float32, device="cpu")
    assert [layer.buffer.shape[-1] for layer in cache.layers] == CONFIG.cache_elements_per_layer
    assert cache.get_seq_length() == 0
    fill(cache, [0, 1], 0, 66)
    assert_holds(cache, [0, 1], 66)


@torch.no_grad()
def test_no_slot_is_read_before_it_is_written(case, poisoned_memory):
    """A model over poisoned memory: a NaN anywhere in reach would show in the logits."""
    model, ids = tiny_model(case), token_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    for length in (None, 40):
        cache = EGMLACache(model.config, max_cache_len=length, bits=length and 16)
        logits = [model(ids[:, :5], past_key_values=cache).logits]
        logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 12)]
        assert difference(torch.cat(logits, dim=1), expected) <= TOLERANCE
        cache.crop(-4)
        assert difference(model(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:]) <= TOLERANCE


@torch.no_grad()
def test_empty_slots_of_a_fixed_cache_are_zero(poisoned_memory):
    """Compiled attention reads them too, and a NaN under a mask is still a NaN."""
    model = tiny_model()
    cache = EGMLACache(model.config, max_cache_len=20)
    model(token_ids(2, 5), past_key_values=cache)
    for layer in cache.layers:
        assert not layer.buffer[:, :, 5:].any()


def test_poisoned_memory_is_poisoned(poisoned_memory):
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(2).isnan().all()


@torch.no_grad()
def test_reordered_cache_continues_the_right_sequence(case):
    model, ids = tiny_model(case), token_ids(3, 9)
    for length in (None, 12):
        cache = EGMLACache(model.config, max_cache_len=length, bits=length and 16)
        model(ids[:, :6], past_key_values=cache)
        order = torch.tensor([2, 2, 0])
        cache.reorder_cache(order)
        expected = model(ids[order], use_cache=False).logits[:, 6:]
        assert difference(model(ids[order, 6:], past_key_values=cache).logits, expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 20])
def test_a_copied_cache_is_independent(length):
    """The cache of a common prompt is copied for each continuation."""
    model, ids = tiny_model(), token_ids(2, 9)
    expected = model(ids, use_cache=False).logits
    prompt = EGMLACache(model.config, max_cache_len=length)
    model(ids[:, :5], past_key_values=prompt)
    for _ in range(2):
        given = model(ids[:, 5:], past_key_values=copy.deepcopy(prompt)).logits
        assert difference(given, expected[:, 5:]) <= TOLERANCE
        model(ids[:, :4], past_key_values=copy.deepcopy(prompt))
    assert prompt.get_seq_length() == 5


# --- limits and messages ---


@torch.no_grad()
def test_overflow_leaves_the_fixed_cache_usable():
    model, ids = tiny_model(), token_ids(2, 12)
    cache = EGMLACache(model.config, max_cache_len=10)
    expected = model(ids, use_cache=False).logits
    model(ids[:, :8], past_key_values=cache)
    before = [layer.entries.to_tensor().clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="8 cached and 4 new tokens exceed this cache's max_cache_len=10") as error:
        model(ids[:, 8:], past_key_values=cache)
    assert "the cache is unchanged" in str(error.value) and "max_cache_len=12 or more" in str(error.value)
    assert cache.get_seq_length() == 8
    for layer, kept in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.entries.to_tensor(), kept)
    assert difference(model(ids[:, 8:10], past_key_values=cache).logits, expected[:, 8:10]) <= TOLERANCE
    with pytest.raises(ValueError, match="10 cached and 1 new tokens exceed"):
        model(ids[:, 10:11], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 20])
def test_cache_of_another_model(length):
    model, ids = tiny_model(), token_ids(2, 5)
    for other, message in (
        (
            tiny_model("always-absorbed"),
            "latent of 24 .* rotary key of 8 .* built for 6 and 8; build it with EGMLACache",
        ),
        (tiny_model("no-rope"), "rotary key of 8 .* built for 24 and 0; build it with"),
        (
            tiny_model(num_hidden_layers=1),
            "Layer 1 does not exist in this cache of 1 layers.*; build it with",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=EGMLACache(other.config, max_cache_len=length))


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 20])
def test_cache_of_another_batch_or_dtype(length):
    model, ids = tiny_model(), token_ids(3, 8)
    cache = EGMLACache(model.config, max_cache_len=length)
    model(ids[:2, :5], past_key_values=cache)
    expected = model(ids[:2], use_cache=False).logits[:, 5:]
    given = r"3 sequences in torch\.float32, but this cache holds 2 in torch\.float32; use a new cache"
    with pytest.raises(ValueError, match=given):
        model(ids[:, 5:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"2 sequences in torch\.bfloat16, but this cache holds 2 in torch\.float32"):
        tiny_model().to(torch.bfloat16)(ids[:2, 5:], past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert difference(model(ids[:2, 5:], past_key_values=cache).logits, expected) <= TOLERANCE


def test_construction_messages():
    with pytest.raises(
        TypeError, match="needs an EGMLAConfig and got LlamaConfig; pass the config of an EG-MLA model"
    ):
        from transformers import LlamaConfig

        EGMLACache(LlamaConfig())
    with pytest.raises(ValueError, match="max_cache_len=0: must be at least 1 token, or None for a growing cache"):
        EGMLACache(CONFIG, max_cache_len=0)


# --- what a decode step allocates and runs ---


FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@torch.no_grad()
def spied_step(published_models, length, *, max_cache_len=None, absorbed=True, backend=None, batch=1):
    model, _ = published_models("kv64")
    ids = token_ids(batch, length + 1, vocab_size=61)
    cache = EGMLACache(model.config, max_cache_len=max_cache_len)
    with pytest.MonkeyPatch.context() as patch:
        if not absorbed:
            patch.setattr(EGMLAModel, "_absorb", lambda *args: False)
        model(ids[:, :length], past_key_values=cache)
        with Spy(model, cache) as spy:
            if backend is None:
                model(ids[:, length:], past_key_values=cache)
            else:
                with sdpa_kernel(backend):
                    model(ids[:, length:], past_key_values=cache)
    return spy


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("max_cache_len", [None, 400])
def test_decode_step_makes_nothing_of_expanded_size(published_models, max_cache_len, batch):
    """No tensor of `S H N` elements or more: the latent is never expanded, the cache never copied or joined."""
    length = 300
    spy = spied_step(published_models, length, max_cache_len=max_cache_len, batch=batch)
    assert len(spy.operators) > 100
    # Far less, even: less than one layer's entries, and so than a copy of them.
    assert spy.largest[0] < batch * length * 128 < batch * length * 12 * 64, spy.largest


def test_spy_sees_an_expansion(published_models):
    """The test above can fail: the expanded path is caught."""
    spy = spied_step(published_models, 300, absorbed=False)
    assert spy.largest[0] >= 301 * 12 * 64


@pytest.mark.parametrize("max_cache_len", [None, 400])
def test_decode_step_runs_the_fused_kernel(published_models, max_cache_len):
    spy = spied_step(published_models, 300, max_cache_len=max_cache_len)
    assert spy.count(FLASH) == 12
    assert spy.count("_softmax") == spy.count("_safe_softmax") == 0


def test_spy_sees_the_math_path(published_models):
    """The test above can fail: without the fused kernel, its softmax shows and the kernel does not."""
    spy = spied_step(published_models, 300, backend=SDPBackend.MATH)
    assert spy.count(FLASH) == 0
    assert spy.count("_softmax") + spy.count("_safe_softmax") == 12


@torch.no_grad()
def test_padded_decode_step_runs_the_fused_kernel():
    """With a mask, too (a batch of unequal lengths)."""
    model, ids = tiny_model(), token_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    cache = EGMLACache(model.config)
    model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    with Spy(model, cache) as spy:
        model(ids[:, 8:], attention_mask=mask, past_key_values=cache)
    assert spy.count(FLASH) == 2 and spy.count("_softmax") == 0


# --- modes ---


@pytest.mark.parametrize("length", [None, 24])
def test_inference_mode_prefill_then_no_grad_decode(length):
    """A tensor made in inference mode cannot be written to outside of it."""
    model, ids = tiny_model(), token_ids(2, 9)
    cache = EGMLACache(model.config, max_cache_len=length)
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for t in range(6, 8):
            logits = model(ids[:, t : t + 1], past_key_values=cache).logits
            assert difference(logits[:, 0], expected[:, t]) <= TOLERANCE
    with torch.inference_mode():
        assert difference(model(ids[:, 8:], past_key_values=cache).logits[:, 0], expected[:, 8]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 24])
def test_inference_mode_cache_is_cropped_and_reset_outside(length):
    model, ids = tiny_model(), token_ids(2, 9)
    expected = model(ids, use_cache=False).logits
    with torch.inference_mode():
        cache = EGMLACache(model.config, max_cache_len=length)
        model(ids, past_key_values=cache)
    cache.crop(-4)
    assert difference(model(ids[:, 5:], past_key_values=cache).logits, expected[:, 5:]) <= TOLERANCE
    with torch.inference_mode():
        cache.reset()
        model(ids, past_key_values=cache)
    cache.reset()
    assert difference(model(ids, past_key_values=cache).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["growing", "fixed", "default"])
def test_training_with_a_cache_keeps_gradients(case, kind):
    model, ids = tiny_model(case).train(), token_ids(2, 9)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    length = 12 if kind == "fixed" else None
    cache = None if kind == "default" else EGMLACache(model.config, max_cache_len=length, bits=16)
    out = model(ids, labels=ids, past_key_values=cache, use_cache=True)
    assert out.past_key_values.get_seq_length() == 9
    out.loss.backward()
    for name, parameter in model.named_parameters():
        scale = max(1.0, expected[name].abs().max().item())
        assert difference(parameter.grad, expected[name]) <= TOLERANCE * scale, name


# --- attention split over threads ---


def plain_attention(query, entries, scaling):
    weights = (query.double() @ entries.double().transpose(2, 3) * scaling).softmax(-1)
    return weights @ entries.double()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [16, 17, 50, 63, 127, 1000])
@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_split_attention_equals_unsplit(batch, parts, length, dtype):
    """Pieces of the cache as heads, merged by their log-sum-exp: remainders included, views of a larger buffer."""
    buffer = torch.randn(batch, 1, length + 13, 24).to(dtype)
    entries, query = buffer[:, :, :length], (3 * torch.randn(batch, 1, 5, 24)).to(dtype)
    expected = plain_attention(query, entries, 0.3)
    split = entries_egmla._split_attention(query, entries, None, 0.3, parts)
    assert split.shape == query.shape and split.dtype == dtype
    assert difference(split, expected) <= (TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["input-gate", "no-rope", "rank-per-layer", "always-absorbed"])
def test_split_attention_is_used_and_changes_nothing(name, monkeypatch):
    """A model's decode with more threads than sequences: the split path runs, and gives the uncached logits."""
    calls = []

    def spied(query, entries, attention_mask, scaling, parts):
        calls.append(parts)
        return split(query, entries, attention_mask, scaling, parts)

    split = entries_egmla._split_attention
    monkeypatch.setattr(entries_egmla, "_split_attention", spied)
    monkeypatch.setattr(entries_egmla, "SPLIT_MIN_TOKENS", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    model = tiny_model(name)
    for batch, expected_parts in ((1, {3, 4}), (2, {2}), (3, set())):  # 31 to 33 tokens by at least 8, 4 threads
        calls.clear()
        ids = token_ids(batch, 33)
        expected = model(ids, use_cache=False).logits
        cache = EGMLACache(model.config)
        logits = [model(ids[:, :30], past_key_values=cache).logits]
        logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(30, 33)]
        assert difference(torch.cat(logits, dim=1), expected) <= TOLERANCE
        assert set(calls) == expected_parts and len(calls) == (6 if expected_parts else 0)  # 3 steps of 2 layers


@torch.no_grad()
def test_split_attention_on_two_threads():
    """As above with nothing replaced: two threads and a cache long enough for both."""
    model, ids = tiny_model(num_hidden_layers=1), token_ids(1, 1101)
    expected = model(ids, use_cache=False, logits_to_keep=1).logits
    cache = EGMLACache(model.config)
    model(ids[:, :1100], past_key_values=cache, logits_to_keep=1)
    torch.set_num_threads(2)
    try:
        with Spy(model, cache) as spy:
            logits = model(ids[:, 1100:], past_key_values=cache).logits
    finally:
        torch.set_num_threads(1)
    assert difference(logits, expected) <= TOLERANCE
    assert spy.count(FLASH) == 1  # both halves at once, an odd token in both and masked in one
    assert spy.largest[0] < 1101 * 32, spy.largest


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("additive", [None, float("-inf"), -1e9])
@pytest.mark.parametrize("length", [40, 47])
@pytest.mark.parametrize("hidden", [slice(0, 3), slice(0, 25), slice(18, 47)])
def test_split_attention_heeds_masks(hidden, length, additive, dtype):
    """Left padding, and the empty end of a fixed cache: pieces hidden in part or as a whole have no weight."""
    query, entries = torch.randn(2, 1, 5, 24).to(dtype), torch.randn(2, 1, length, 24).to(dtype)
    seen = torch.ones(2, 1, 1, length, dtype=torch.bool)
    seen[1, :, :, hidden] = False
    weights = (query.double() @ entries.double().transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf).softmax(-1)
    mask = seen if additive is None else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, additive)
    split = entries_egmla._split_attention(query, entries, mask, 0.3, 4)
    expected = weights @ entries.double()
    assert difference(split, expected) <= (TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE)


def test_split_attention_stays_out_of_training(monkeypatch):
    """The split kernel is called below autograd, so it must not run where gradients are wanted."""
    monkeypatch.setattr(entries_egmla, "SPLIT_MIN_TOKENS", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    query, entries = torch.randn(1, 1, 5, 24), torch.randn(1, 1, 50, 24)
    assert entries_egmla._split_count(query, entries) == 4
    assert entries_egmla._split_count(query.requires_grad_(), entries) == 1
    with torch.no_grad():
        assert entries_egmla._split_count(query, entries) == 4


# --- stock caches hold the same ---


@torch.no_grad()
def test_stock_cache_holds_the_same_entries(case):
    """A cache of Transformers given by the user gets the latent and the rotary key, in DeepSeek's places."""
    if case in EXPANDED_CASES:
        pytest.skip("holds no token ids; that it is refused is tested in test_expanded_gate.py")
    model, ids = tiny_model(case), token_ids(2, 7)
    own, stock = EGMLACache(model.config), DynamicCache(config=model.config)
    model(ids, past_key_values=own)
    model(ids, past_key_values=stock)
    for mine, theirs in zip(own.layers, stock.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_cache_is_not_a_parameter_of_the_model():
    model = tiny_model()
    assert not any(isinstance(module, EGMLACache) for module in model.modules())
    assert isinstance(model.model.layers[0].self_attn.kv_b_proj, nn.Linear)
