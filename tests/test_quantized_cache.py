"""Quantised cache: what rounding may cost, bytes counted from storages, attention in pieces, generation, bad input."""

import copy

import pytest
import torch
from cases import BASE, CORE_CASES, difference, exact_entries, plain_attention, token_ids
from cases import tiny_model as make_model
from test_cache import Spy, call_every_operation, check_selections, storage_bytes

from egmla import EGMLACache, EGMLAConfig, latent_attention_egmla, quantization_egmla
from egmla.cache_egmla import KEPT_FIRST_TOKENS, GrowingLatentLayer, Int4LatentLayer, Int8LatentLayer
from egmla.quantization_egmla import (
    ElementGroups,
    TokenGroups,
    element_group_size,
    quantize_elements,
    quantize_tokens,
    rotation,
)


# fp32 sums in another order.
TOLERANCE = 1e-5
# bf16 results of attention over values around 1: a few roundings of 2^-8 each.
BF16_TOLERANCE = 0.03
# Sums in another order may push an element over a rounding boundary, one code up or down. It moves logits by so much.
FLIP_TOLERANCE = {"int8": 0.03, "int4": 0.3}
# Logits, around 3 in magnitude, of random tiny models with int8 entries against those with fp32 entries.
INT8_TOLERANCE = 0.15
# Groups of few tokens, so that short texts fill several.
OPTIONS = {"int8": {"quantization": "int8"}, "int4": {"quantization": "int4", "quantization_group_size": 8}}
CACHE_CONFIGS = {"int8": {"nbits": 8}, "int4": {"nbits": 4, "q_group_size": 8}}
LAYERS = {"int8": Int8LatentLayer, "int4": Int4LatentLayer}
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SAMPLED = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.5, "top_k": 20}
BEAMS = {"max_new_tokens": NEW_TOKENS, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}

CONFIG = EGMLAConfig(**{**BASE, "kv_lora_rank": [12, 20], "qk_rope_head_dim": 4})
WIDTHS = [16, 24]


@pytest.fixture(params=list(OPTIONS))
def quantization(request) -> str:
    return request.param


def tiny_model(case="input-gate", **overrides):
    """Untied: a tied head of random weights likes to repeat the last token, which many a defect does as well."""
    return make_model(case, tie_word_embeddings=False, **overrides)


def rounded(entries: torch.Tensor, layer) -> torch.Tensor:
    """What a layer makes of all entries `[B, 1, S, R + P]` it was given, by the definition of its rounding."""
    entries = entries.double()
    if isinstance(layer, Int8LatentLayer):
        matrix = rotation(layer.kv_lora_rank, layer.qk_rope_head_dim, entries.device)
        codes, scales = quantize_elements(entries.float(), matrix, layer.group_size)
        scales = scales.double().repeat_interleave(layer.group_size, dim=-1)
        return ((codes.double() * scales) @ matrix.double()).to(layer.dtype)
    entries = entries.clone()
    first, size = KEPT_FIRST_TOKENS, layer.group_size
    for start in range(first, entries.shape[2] - size + 1, size):
        group = entries[:, :, start : start + size]
        zeros = group.amin(2, keepdim=True).bfloat16().double()
        scales = ((group.amax(2, keepdim=True).float() - zeros.float()) / 15).bfloat16().double()
        codes = ((group - zeros).float() / scales.float().clamp(min=1e-37)).round().clamp(0, 15)
        entries[:, :, start : start + size] = codes * scales + zeros
    return entries.to(layer.dtype)


class RoundedLayer(GrowingLatentLayer):
    """The reference: a dense layer that gives back what a quantised one would."""

    def __init__(self, layer):
        super().__init__(layer.kv_lora_rank, layer.qk_rope_head_dim, layer.layer_idx)
        self.layer = layer

    def append(self, latent, rope_key):
        self.layer.dtype = latent.dtype
        return rounded(super().append(latent, rope_key), self.layer)


def rounded_cache(config, quantization) -> EGMLACache:
    cache = EGMLACache(config, **OPTIONS[quantization])
    cache.layers = [RoundedLayer(layer) for layer in cache.layers]
    return cache


# --- rounding ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 8, 24])
def test_int8_error(group_size, dtype):
    """Half a scale everywhere, but for elements as large as the largest and of the other sign, up to 1.25."""
    entries = (torch.randn(3, 1, 40, 24) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    entries[:, :, 7, 3:9] *= 100  # groups with outliers
    codes, scales = quantize_elements(entries, torch.eye(24), group_size)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert codes.shape == entries.shape and scales.shape == (3, 1, 40, 24 // group_size)
    steps = scales.double().repeat_interleave(group_size, dim=-1)
    error = (codes.double() * steps - entries.double()).abs()
    clamped = entries.double() / steps > 127.5
    assert (error <= torch.where(clamped, 1.25, 0.5) * steps.abs() * 1.001).all()
    # The scale follows from the largest element, whose own error is that of the scale's rounding.
    largest = entries.double().unflatten(-1, (-1, group_size)).abs().amax(-1)
    torch.testing.assert_close(scales.double().abs() * 128, largest, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 24])
def test_int4_error(width, dtype):
    """Half a scale and the rounding of the zero point; elements of a group far from zero, or all alike, too."""
    entries = torch.randn(3, 5, 8, width) * torch.logspace(-2, 2, width) + 3 * torch.arange(-2, 3).view(5, 1, 1)
    entries[0, 0, :, 0] = 7.3
    entries = entries.to(dtype)
    codes, scales = quantize_tokens(entries)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.bfloat16
    assert codes.shape == (3, 5, 8, (width + 1) // 2) and scales.shape == (3, 5, 2, width)
    steps, zeros = scales.double()[:, :, :1], scales.double()[:, :, 1:]
    unpacked = torch.cat((codes & 15, codes >> 4), dim=-1)[..., :width].double()
    error = (unpacked * steps + zeros - entries.double()).abs()
    bound = 0.5 * steps + 15 * 2**-9 * steps + 2**-8 * entries.double().abs().amax(2, keepdim=True)
    assert (error <= bound * 1.001).all()
    if width > 2:  # all sixteen codes are in use
        assert unpacked.amin() == 0 and unpacked.amax() == 15


def test_zeros_and_extremes(quantization):
    """Zero stays zero, ranges beyond fp16 fit, what is no finite number does not turn into something harmless."""
    for scale in (0, 1e30, 1e6, 1e-9, 1e-30):
        layer = EGMLACache(CONFIG, **OPTIONS[quantization]).layers[0]
        entries = scale * torch.randn(1, 1, 40, 16)
        given = torch.cat(layer.update(*entries.split([12, 4], dim=-1)), dim=-1)
        assert difference(given / (scale or 1), entries / (scale or 1)) <= (0.3 if scale else 0)
    for value in (torch.nan, torch.inf, -torch.inf):
        layer = EGMLACache(CONFIG, **OPTIONS[quantization]).layers[0]
        entries = torch.randn(1, 1, 40, 16)
        entries[:, :, 6, 5] = value
        latents, _ = layer.update(*entries.split([12, 4], dim=-1))
        assert not torch.isfinite(latents[:, :, 6]).all() and torch.isfinite(latents[:, :, 20:]).all()


@pytest.mark.parametrize("widths", [(1, 0), (7, 2), (24, 8), (64, 64), (96, 32)])
def test_rotation_is_its_own_inverse(widths):
    """And mixes no latent with a rotary key."""
    matrix = rotation(*widths, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T)
    assert difference(matrix @ matrix, torch.eye(sum(widths))) <= TOLERANCE
    assert not matrix[: widths[0], widths[0] :].any()


def test_latent_and_rotary_key_never_share_a_scale(case, quantization):
    """Entries a million times larger on one side leave the other as precise as before."""
    for layer in EGMLACache(tiny_model(case).config, **OPTIONS[quantization]).layers:
        latent, rope = torch.randn(1, 1, 50, layer.kv_lora_rank), torch.randn(1, 1, 50, layer.qk_rope_head_dim)
        layer.update(latent, 1e6 * rope)
        error = (layer.keys - latent).abs().max()
        assert error <= latent.abs().max() * {"int8": 0.05, "int4": 0.1}[quantization]


def test_default_group_sizes():
    for rank, rope_dim, expected in ((64, 64, 64), (128, 64, 64), (96, 64, 32), (64, 0, 64), (16, 64, 16), (24, 8, 8)):
        assert element_group_size(None, rank, rope_dim) == expected
    assert EGMLACache(CONFIG, quantization="int4").layers[0].group_size == 64


# --- size ---


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [64, 128])
def test_bytes_from_storages(rank, quantization, dtype, poisoned_memory):
    """Codes and scales, everything the cache object holds: within half of bf16 and 4 %, and within 30 %."""
    config = EGMLAConfig(**{**BASE, "kv_lora_rank": rank, "qk_rope_head_dim": 64, "num_hidden_layers": 3})
    cache = EGMLACache(config, quantization=quantization)
    batch, length, width = 2, 6000, rank + 64
    for layer_idx in range(3):
        latent, rope_key = torch.randn(batch, 1, length, rank), torch.randn(batch, 1, length, 64)
        cache.update(latent.to(dtype), rope_key.to(dtype), layer_idx)
    if quantization == "int8":
        per_token = width + 2 * width // 64
        expected = 3 * batch * length * per_token
        allocated = 3 * batch * (length + length // 8) * per_token
    else:
        groups, element = (length - 4) // 64, torch.finfo(dtype).bits // 8
        per_group, kept = 64 * width // 2 + 4 * width, (length - 64 * groups) * width * element
        expected = 3 * batch * (groups * per_group + kept)
        allocated = 3 * batch * ((groups + groups // 8) * per_group + kept)
    assert cache.nbytes == expected
    assert cache.allocated_nbytes == storage_bytes(cache) == allocated
    bf16 = 3 * batch * length * 2 * width
    assert cache.nbytes <= {"int8": 0.5 * 1.04, "int4": 0.3}[quantization] * bf16


@torch.no_grad()
def test_int4_stays_within_30_percent_of_bf16():
    """From 2,600 tokens on, at every length, however many tokens wait for their group to fill."""
    config = EGMLAConfig(**{**BASE, "kv_lora_rank": 64, "qk_rope_head_dim": 64, "num_hidden_layers": 1})
    cache = EGMLACache(config, quantization="int4")
    chunk = torch.randn(1, 1, 2600, 64).bfloat16()
    cache.append(chunk, chunk, 0)
    for length in range(2601, 2800):
        cache.append(chunk[:, :, :1], chunk[:, :, :1], 0)
        assert cache.get_seq_length() == length
        assert cache.nbytes <= 0.3 * length * 2 * 128


# --- content, by values that say where they came from ---


def entries(layer_idx, sequences, start, end):
    """Entries whose values say which sequence, token, layer and element they are: `[B, 1, T, R]`, `[B, 1, T, P]`."""
    width = WIDTHS[layer_idx]
    generator = torch.Generator()
    rows = []
    for b in sequences:
        for t in range(start, end):
            generator.manual_seed(10_000 * b + 10 * t + layer_idx)
            rows.append(torch.randn(width, generator=generator))
    values = torch.stack(rows).reshape(len(sequences), 1, end - start, width)
    return values.split([width - 4, 4], dim=-1)


def fill(cache, sequences, start, end):
    for layer_idx in range(2):
        cache.update(*entries(layer_idx, sequences, start, end), layer_idx)


def assert_holds(cache, sequences, end):
    """The cache holds tokens 0 to `end` of these sequences, rounded once and no more, and says so."""
    assert cache.get_seq_length() == end
    for layer_idx, layer in enumerate(cache.layers):
        expected = rounded(torch.cat(entries(layer_idx, sequences, 0, end), dim=-1), layer)
        assert layer.entries.shape == expected.shape and layer.batch_size == len(sequences)
        assert difference(layer.entries.dequantize(), expected) <= TOLERANCE
        assert torch.equal(torch.cat((layer.keys, layer.values), dim=-1), layer.entries.dequantize())
    assert cache.nbytes == sum(used.numel() * used.element_size() for layer in cache.layers for used in layer.used)
    assert cache.allocated_nbytes == storage_bytes(cache) >= cache.nbytes


@pytest.fixture
def cache(quantization, poisoned_memory):
    return EGMLACache(CONFIG, **OPTIONS[quantization])


def test_growth_keeps_every_token(cache):
    start = 0
    for size in (1, 2, 1, 1, 6, 1, 63, 1, 1, 64, 20, 1, 7, 30):
        before = [[storage.data_ptr() for storage in layer.storages[:2]] for layer in cache.layers]
        capacity = cache.layers[0].storages[0].shape[2] if start else 0
        for layer_idx in range(2):
            given = cache.update(*entries(layer_idx, [0, 1], start, start + size), layer_idx)
            assert torch.equal(torch.cat(given, dim=-1), cache.layers[layer_idx].entries.dequantize())
        start += size
        codes, scales = cache.layers[0].storages[:2]
        assert codes.shape[2] == scales.shape[2]
        rows = cache.layers[0].used[0].shape[2]
        if rows > capacity:
            least = 64 if isinstance(cache.layers[0], Int8LatentLayer) else 1
            assert codes.shape[2] == rows + max(least, rows // 8)
        elif before[0]:  # written in place
            assert [[storage.data_ptr() for storage in layer.storages[:2]] for layer in cache.layers] == before
        assert_holds(cache, [0, 1], start)


def test_operations_of_generation(cache):
    check_selections(cache, fill, assert_holds)
    assert_holds(cache, [0, 0, 0, 2, 2, 2], 130)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == cache.allocated_nbytes == storage_bytes(cache) == 0
    fill(cache, [1], 0, 4)
    assert_holds(cache, [1], 4)


@pytest.mark.parametrize("removed", [0, 1, 5, 6, 7, 8, 13, 14, 15, 60, 65, 66, 67, 69, 70, 1000])
def test_crop(cache, removed):
    """Within the tokens that are in no group, at the edges of groups, inside of one, within the first tokens."""
    fill(cache, [0, 1], 0, 70)
    before = [layer.entries.dequantize() for layer in cache.layers]
    with pytest.raises(ValueError, match=r"crop\(5\): .*negative"):
        cache.crop(5)
    cache.crop(-removed)
    remaining = max(0, 70 - removed)
    assert cache.get_seq_length() == remaining
    for layer, kept in zip(cache.layers, before, strict=True):
        assert layer.entries.shape == kept[:, :, :remaining].shape
        assert torch.equal(layer.entries.dequantize(), kept[:, :, :remaining])
    fill(cache, [0, 1], remaining, 100)
    assert cache.get_seq_length() == 100
    for layer_idx, layer in enumerate(cache.layers):
        expected = rounded(torch.cat(entries(layer_idx, [0, 1], 0, 100), dim=-1), layer)
        again = 70 if isinstance(layer, Int8LatentLayer) else 12 + (remaining + 4) // 8 * 8
        assert difference(layer.entries.dequantize()[:, :, again:], expected[:, :, again:]) <= TOLERANCE
        # What is left of a group is rounded twice.
        assert difference(layer.entries.dequantize(), expected) <= 0.5


def test_operations_on_an_empty_cache(cache):
    call_every_operation(cache)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert cache.get_seq_length() == 0 and cache.nbytes == cache.allocated_nbytes == 0
    assert cache.layers[0].keys is None and cache.layers[0].values is None
    cache.early_initialization(batch_size=1, num_heads=9, head_dim=9, dtype=torch.float32, device="cpu")
    assert cache.get_seq_length() == 0
    fill(cache, [0], 0, 2)
    assert_holds(cache, [0], 2)


def test_offload_and_prefetch(cache):
    """Codes and scales leave the device together and come back; what `append` returned stays where it was."""
    fill(cache, [0, 1], 0, 5)
    layer = cache.layers[0]
    layer.device = torch.device("meta")  # stands for an accelerator
    layer.prefetch()
    assert {storage.device.type for storage in layer.storages} == {"meta"}
    layer.device = torch.device("cpu")
    layer = cache.layers[1]
    given = layer.entries
    layer.offload()
    assert {storage.device.type for storage in layer.storages} == {"cpu"}
    layer.prefetch()
    assert torch.equal(given.dequantize(), layer.entries.dequantize())


@torch.no_grad()
def test_a_copied_cache_is_independent(quantization):
    model, ids = tiny_model(), token_ids(2, 9)
    prompt = EGMLACache(model.config, **OPTIONS[quantization])
    model(ids[:, :5], past_key_values=prompt)
    first = model(ids[:, 5:], past_key_values=copy.deepcopy(prompt)).logits
    model(ids[:, :4], past_key_values=copy.deepcopy(prompt))
    assert torch.equal(model(ids[:, 5:], past_key_values=copy.deepcopy(prompt)).logits, first)
    assert prompt.get_seq_length() == 5


def test_inference_mode_and_outside(quantization):
    """A tensor made in inference mode cannot be written to outside of it."""
    model, ids = tiny_model(), token_ids(2, 9)
    reference, cache = (EGMLACache(model.config, **OPTIONS[quantization]) for _ in range(2))
    with torch.no_grad():
        expected = [model(chunk, past_key_values=reference).logits for chunk in ids.split([6, 1, 2], dim=1)]
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
    with torch.no_grad():
        assert difference(model(ids[:, 6:7], past_key_values=cache).logits, expected[1]) <= TOLERANCE
    with torch.inference_mode():
        assert difference(model(ids[:, 7:], past_key_values=cache).logits, expected[2]) <= TOLERANCE
    cache.crop(-2)
    with torch.no_grad():
        assert difference(model(ids[:, 7:], past_key_values=cache).logits, expected[2]) <= TOLERANCE


# --- attention ---


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
    monkeypatch.setattr(quantization_egmla, "PIECE_TOKENS", 16 * batch)
    monkeypatch.setattr(latent_attention_egmla, "_cpu_threads", lambda: threads)
    entries, exact = random_entries(batch, length, dtype, quantization)
    assert type(entries) is {"int8": ElementGroups, "int4": TokenGroups}[quantization]
    assert entries.shape == (batch, 1, length, 24)
    query = (3 * torch.randn(batch, 1, 5, 24)).to(dtype)
    expected = plain_attention(query, exact, None, 0.3)[..., :16]
    given = latent_attention_egmla._quantized_attention(query, entries, None, 0.3)
    assert given.dtype == dtype
    assert difference(given, expected) <= (TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("additive", [None, float("-inf"), "lowest", -1e9])
@pytest.mark.parametrize("hidden", [slice(0, 3), slice(0, 40), slice(17, 47), slice(46, 47)])
@pytest.mark.parametrize("threads", [1, 4])
def test_attention_in_pieces_heeds_masks(threads, hidden, additive, dtype, quantization, monkeypatch):
    """Left padding over whole pieces, rows that see different tokens."""
    monkeypatch.setattr(quantization_egmla, "PIECE_TOKENS", 32)
    monkeypatch.setattr(latent_attention_egmla, "_cpu_threads", lambda: threads)
    entries, exact = random_entries(2, 47, dtype, quantization)
    query = torch.randn(2, 3, 2, 24).to(dtype)  # three heads, two tokens
    seen = torch.ones(2, 1, 2, 47, dtype=torch.bool)
    seen[1, :, :, hidden] = False
    seen[:, :, 0, 45:] = False
    value = torch.finfo(dtype).min if additive == "lowest" else additive
    mask = seen if additive is None else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, value)
    expected = plain_attention(query, exact, seen, 0.3)[..., :16]
    given = latent_attention_egmla.latent_attention(query, entries, mask, 0.3, 16)
    assert difference(given, expected) <= (TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE)


@torch.no_grad()
def test_many_rows_attend_to_a_dequantised_copy(quantization, monkeypatch):
    """A long chunk behind a past: heads times tokens beyond the packing limit."""
    monkeypatch.setattr(latent_attention_egmla, "PACK_MAX_ROWS", 3)
    entries, exact = random_entries(2, 30, torch.float32, quantization)
    query = torch.randn(2, 2, 4, 24)
    seen = torch.ones(1, 1, 4, 30, dtype=torch.bool).tril(26)
    expected = plain_attention(query, exact, seen, 0.3)[..., :16]
    assert difference(latent_attention_egmla.latent_attention(query, entries, None, 0.3, 16), expected) <= TOLERANCE
    monkeypatch.undo()  # few rows: without a mask it is the same
    assert difference(latent_attention_egmla.latent_attention(query, entries, None, 0.3, 16), expected) <= TOLERANCE
    monkeypatch.setattr(latent_attention_egmla, "PACK_MAX_ROWS", 3)
    assert difference(latent_attention_egmla.latent_attention(query, entries, seen, 0.3, 16), expected) <= TOLERANCE


@torch.no_grad()
def test_models_read_what_a_dense_cache_of_rounded_entries_holds(case, quantization, monkeypatch):
    """Prefill, a chunk, single tokens: the logits of a dense cache that was given the rounded entries."""
    monkeypatch.setattr(quantization_egmla, "PIECE_TOKENS", 16)
    model, ids = tiny_model(case), token_ids(2, 34)
    mine, reference = EGMLACache(model.config, **OPTIONS[quantization]), rounded_cache(model.config, quantization)
    for chunk in ids.split([7, 3, 15, 1, 1, 3, 1, 1, 1, 1], dim=1):
        expected = model(chunk, past_key_values=reference).logits
        assert difference(model(chunk, past_key_values=mine).logits, expected) <= FLIP_TOLERANCE[quantization]


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
    monkeypatch.setattr(quantization_egmla, "PIECE_TOKENS", 16 * batch)
    monkeypatch.setattr(latent_attention_egmla, "_cpu_threads", lambda: threads)
    with torch.no_grad():
        entries, exact = random_entries(batch, 50, torch.float32, quantization)
    query = torch.randn(batch, 1, 5, 24, requires_grad=True)
    seen = torch.rand(1 if masked == "one mask for all" else batch, 1, 5, 50) > 0.4
    mask = {"nothing": None, "additive": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}.get(masked, seen)
    output = latent_attention_egmla._quantized_attention(query, entries, mask, 0.3)
    output.square().sum().backward()
    given, query.grad = query.grad, None
    expected = plain_attention(query, exact, None if mask is None else seen, 0.3)[..., :16]
    expected.square().sum().backward()
    assert difference(output.detach(), expected.detach()) <= TOLERANCE
    assert difference(given, query.grad) <= TOLERANCE


@torch.no_grad()
def test_memory_of_pieces_is_kept(quantization, monkeypatch):
    """The same memory at every step, also where the first step was in inference mode."""
    monkeypatch.setattr(quantization_egmla, "PIECE_TOKENS", 16)
    entries, _ = random_entries(1, 50, torch.float32, quantization)
    groups = [piece.data_ptr() for piece in entries.pieces()][1:-1]
    assert len(set(groups)) == 1
    monkeypatch.setattr(quantization_egmla, "_kept", quantization_egmla._Kept())
    with torch.inference_mode():
        list(entries.pieces())
    before = quantization_egmla._kept.memory
    list(entries.pieces())
    assert quantization_egmla._kept.memory is before is not None


@torch.no_grad()
def test_kept_memory_is_where_the_entries_are(quantization, monkeypatch):
    """Whatever PyTorch's default device is."""
    monkeypatch.setattr(quantization_egmla, "_kept", quantization_egmla._Kept())
    entries, exact = random_entries(1, 50, torch.float32, quantization)
    monkeypatch.setattr(quantization_egmla, "_kept", quantization_egmla._Kept())
    query = torch.randn(1, 1, 5, 24)
    with torch.device("meta"):
        latent_attention_egmla._quantized_attention(query, entries, None, 0.3)
    given = latent_attention_egmla._quantized_attention(query, entries, None, 0.3)
    assert difference(given, plain_attention(query, exact, None, 0.3)[..., :16]) <= TOLERANCE


@torch.no_grad()
def test_autocast_leaves_sums_in_fp32(quantization):
    """Left padding, whose lowest number of fp32 bf16 does not have."""
    entries, exact = random_entries(2, 50, torch.float32, quantization)
    query, seen = torch.randn(2, 1, 5, 24), torch.ones(2, 1, 1, 50, dtype=torch.bool)
    seen[1, ..., :7] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = latent_attention_egmla.latent_attention(query.transpose(1, 2), entries, seen, 0.3, 16).transpose(1, 2)
    assert difference(given, plain_attention(query, exact, seen, 0.3)[..., :16]) <= TOLERANCE


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
    monkeypatch.setattr(quantization_egmla, "PIECE_TOKENS", 2048)
    monkeypatch.setattr(quantization_egmla, "_kept", quantization_egmla._Kept())  # as in a new process
    spy = spied_step(quantization)
    assert spy.largest[0] <= 2048 * 96 < 3001 * 96, spy.largest
    assert spy.largest[0] >= 2048 * 64  # the spy saw the piece


@torch.no_grad()
def test_spy_sees_a_dequantised_cache(quantization, monkeypatch):
    """The test above can fail: with pieces as long as the context it does."""
    monkeypatch.setattr(quantization_egmla, "PIECE_TOKENS", 10_000)
    assert spied_step(quantization).largest[0] >= 2944 * 96  # int4: all tokens that are in groups


# --- generate ---


def generate(model, ids, seed=7, **options):
    torch.manual_seed(seed)
    return model.generate(ids, return_dict_in_generate=True, **options)


def cache_of(out, quantization) -> EGMLACache:
    cache = out.past_key_values
    assert type(cache) is EGMLACache and {type(layer) for layer in cache.layers} == {LAYERS[quantization]}
    return cache


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, BEAMS, {**GREEDY, "prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("name", CORE_CASES)
def test_generate_by_name_and_by_object(name, options, quantization):
    """Tokens of a dense cache of rounded entries, whichever way the cache is asked for; beams reorder it."""
    model, ids = tiny_model(name), token_ids(2, 7)
    expected = generate(model, ids, past_key_values=rounded_cache(model.config, quantization), **options).sequences
    given = EGMLACache(model.config, **OPTIONS[quantization])
    out = generate(model, ids, past_key_values=given, **options)
    assert out.past_key_values is given and torch.equal(out.sequences, expected)
    named = {"cache_implementation": "quantized", "cache_config": CACHE_CONFIGS[quantization]}
    out = generate(model, ids, **named, **options)
    assert torch.equal(out.sequences, expected)
    assert cache_of(out, quantization).get_seq_length() == 7 + NEW_TOKENS - 1
    assert CACHE_CONFIGS == {"int8": {"nbits": 8}, "int4": {"nbits": 4, "q_group_size": 8}}  # as it was given


def test_int8_generates_the_tokens_of_a_full_cache(case):
    """As long as the two best logits are further apart than rounding moves them."""
    model, ids = tiny_model(case), token_ids(2, 7)
    full = generate(model, ids, output_logits=True, **GREEDY)
    cache = EGMLACache(model.config, quantization="int8")
    eight = generate(model, ids, output_logits=True, past_key_values=cache, **GREEDY)
    alike = torch.ones(2, dtype=torch.bool)
    for step, (expected, logits) in enumerate(zip(full.logits, eight.logits, strict=True)):
        assert difference(logits[alike], expected[alike]) <= INT8_TOLERANCE
        best = expected.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * INT8_TOLERANCE
        same = full.sequences[:, 7 + step] == eight.sequences[:, 7 + step]
        assert same[alike & clear].all()
        alike &= same
        if not alike.any():
            break


@pytest.mark.parametrize("name", CORE_CASES)
def test_assisted_decoding_and_prompt_lookup(name):
    """Rejected candidates are cropped off the cache."""
    model, ids = tiny_model(name), token_ids(1, 4).repeat(1, 3)
    named = {"cache_implementation": "quantized", "cache_config": {"nbits": 8}}
    expected = generate(model, ids, **named, **GREEDY).sequences
    out = generate(model, ids, assistant_model=tiny_model(name, seed=11), **named, **GREEDY)
    assert torch.equal(out.sequences, expected)
    cache_of(out, "int8")
    out = generate(model, ids, prompt_lookup_num_tokens=3, **named, **GREEDY)
    assert torch.equal(out.sequences, expected)


def test_continuing_from_a_past(quantization):
    model, ids, cache = tiny_model(), token_ids(2, 5), None
    options = {"cache_implementation": "quantized", "cache_config": CACHE_CONFIGS[quantization]}
    reference = rounded_cache(model.config, quantization)
    for turn in range(3):
        mask = torch.ones_like(ids)  # a generated token 0 is no padding
        out = generate(model, ids, attention_mask=mask, past_key_values=cache, **options, **GREEDY)
        expected = generate(model, ids, attention_mask=mask, past_key_values=reference, **GREEDY).sequences
        assert torch.equal(out.sequences, expected)
        cache, options = cache_of(out, quantization), {}
        ids = torch.cat((out.sequences, token_ids(2, 3, seed=turn)), dim=1)


def test_cache_config_of_generate():
    model, ids = tiny_model(), token_ids(1, 4)
    out = generate(model, ids, cache_implementation="quantized", **GREEDY)
    assert cache_of(out, "int4").layers[0].group_size == 64
    config = {"nbits": 8, "q_group_size": 4}
    out = generate(model, ids, cache_implementation="quantized", cache_config=config, **GREEDY)
    assert cache_of(out, "int8").layers[0].group_size == 4
    for config, message in (
        ({"nbits": 2}, "cache_config has nbits=2: must be 8 or 4"),
        ({"backend": "hqq", "axis_key": 1}, "cache_config has 'backend', 'axis_key', and .* takes only nbits"),
        ({"nbits": 8, "q_group_size": 5}, "quantization_group_size=5: must divide both the latent of 24 and the"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, cache_implementation="quantized", cache_config=config, **GREEDY)
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        generate(model, ids, cache_implementation="quantized", past_key_values=EGMLACache(model.config), **GREEDY)


# --- limits and messages ---


def test_construction_messages():
    for options, message in (
        ({"quantization": "int2"}, "quantization='int2': must be 'int8' or 'int4', or None to keep entries"),
        ({"quantization": 8}, "quantization=8: must be 'int8' or 'int4'"),
        (
            {"quantization": "int8", "quantization_group_size": 8},
            "group_size=8: must divide both the latent of 12 and the rotary key of 4 .*; use one of 1, 2, 4, or leave",
        ),
        ({"quantization": "int8", "quantization_group_size": 0}, "quantization_group_size=0: must divide both"),
        ({"quantization": "int4", "quantization_group_size": "4"}, "group_size='4': int4 groups are of neighbouring"),
        ({"quantization": "int4", "quantization_group_size": 1}, "group_size=1: .* give their number, 2 or more, or"),
        ({"quantization_group_size": 4}, "quantization_group_size=4 without quantization: nothing is quantised; give"),
        (
            {"quantization": "int4", "max_cache_len": 9},
            "quantization='int4' with max_cache_len=9: only growing caches are quantised; leave out one of the two",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            EGMLACache(CONFIG, **options)
    # A size that divides one layer's latent and not another's.
    config = EGMLAConfig(**{**BASE, "kv_lora_rank": [16, 24], "qk_rope_head_dim": 16})
    with pytest.raises(ValueError, match="must divide both the latent of 24 and the rotary key of 16"):
        EGMLACache(config, quantization="int8", quantization_group_size=16)


@torch.no_grad()
def test_wrong_updates_leave_the_cache_usable(quantization):
    """Another model's entries, another batch, dtype or device, training: named, and the cache goes on as before."""
    model, ids = tiny_model(), token_ids(3, 8)
    cache, reference = (EGMLACache(model.config, **OPTIONS[quantization]) for _ in range(2))
    for each in (cache, reference):
        model(ids[:2, :5], past_key_values=each)
    before = [used.clone() for layer in cache.layers for used in layer.used]

    def training():
        with torch.enable_grad():
            model(ids[:2, 5:], past_key_values=cache)

    latent, rope = torch.zeros(2, 1, 1, 24), torch.zeros(2, 1, 1, 8)
    for call, message in (
        (lambda: tiny_model("no-rope")(ids[:2, 5:], past_key_values=cache), "rotary key of 0 .* built for 24 and 8"),
        (lambda: model(ids[:, 5:], past_key_values=cache), "3 sequences in torch.float32, but this cache holds 2"),
        (
            lambda: tiny_model().to(torch.bfloat16)(ids[:2, 5:], past_key_values=cache),
            "2 sequences in torch.bfloat16, but this cache holds 2 in torch.float32",
        ),
        (
            lambda: cache.append(latent.to("meta"), rope.to("meta"), 0),
            "gives entries on meta, but this cache holds its own on cpu; use a new cache, or move the model back",
        ),
        (training, "require gradients, and this cache is quantised: .* Use EGMLACache.model.config. for training"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        after = [used for layer in cache.layers for used in layer.used]
        assert cache.get_seq_length() == 5 and all(map(torch.equal, before, after))
    expected = model(ids[:2, 5:], past_key_values=reference).logits
    assert torch.equal(model(ids[:2, 5:], past_key_values=cache).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 20])
def test_dense_caches_check_the_device_too(length):
    model, ids = tiny_model(), token_ids(2, 5)
    cache = EGMLACache(model.config, max_cache_len=length)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="gives entries on meta, but this cache holds its own on cpu"):
        cache.append(torch.zeros(2, 1, 1, 24, device="meta"), torch.zeros(2, 1, 1, 8, device="meta"), 0)
    assert cache.get_seq_length() == 5
