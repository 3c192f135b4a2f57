"""Quantised cache: what rounding may cost, bytes counted from storages, operations, generation, bad input."""

import copy

import pytest
import torch
from cache_operations import (
    check_operations_of_generation,
    check_operations_on_an_empty_cache,
    entries,
    fill,
    storage_bytes,
)
from cases import BASE, CORE_CASES, difference, token_ids
from quantized import INT8_TOLERANCE, OPTIONS, TOLERANCE, rounded, rounded_cache, tiny_model

from egmla import EGMLACache, EGMLAConfig
from egmla.quantization_egmla import element_group_size, quantize_elements, quantize_tokens, rotation
from egmla.quantized_cache_egmla import Int4LatentLayer, Int8LatentLayer


CACHE_CONFIGS = {"int8": {"nbits": 8}, "int4": {"nbits": 4, "q_group_size": 8}}
LAYERS = {"int8": Int8LatentLayer, "int4": Int4LatentLayer}
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SAMPLED = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.5, "top_k": 20}
BEAMS = {"max_new_tokens": NEW_TOKENS, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}


CONFIG = EGMLAConfig(**{**BASE, "kv_lora_rank": [12, 20], "qk_rope_head_dim": 4})


# --- rounding ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 8, 24])
def test_int8_error(group_size, dtype):
    """Half a scale everywhere, but for elements as large as the largest and of the other sign, up to 1.5."""
    entries = (torch.randn(3, 1, 40, 24) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    entries[:, :, 7, 3:9] *= 100  # groups with outliers
    codes, scales = quantize_elements(entries, torch.eye(24), group_size)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert codes.shape == entries.shape and scales.shape == (3, 1, 40, 24 // group_size)
    steps = scales.double().repeat_interleave(group_size, dim=-1)
    error = (codes.double() * steps - entries.double()).abs()
    clamped = entries.double() / steps > 127.5
    assert (error <= torch.where(clamped, 1.5, 0.5) * steps.abs() * 1.001).all()
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


def test_rotation_is_fp32_whatever_the_default():
    rotation.cache_clear()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert rotation(24, 8, torch.device("cpu")).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)
        rotation.cache_clear()


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


def assert_holds(cache, sequences, end):
    """The cache holds tokens 0 to `end` of these sequences, rounded once and no more, and says so."""
    assert cache.get_seq_length() == end
    for layer_idx, layer in enumerate(cache.layers):
        expected = rounded(torch.cat(entries(layer_idx, sequences, 0, end), dim=-1), layer)
        assert layer.entries.shape == expected.shape and layer.batch_size == len(sequences)
        assert difference(layer.entries.to_tensor(), expected) <= TOLERANCE
        assert torch.equal(torch.cat((layer.keys, layer.values), dim=-1), layer.entries.to_tensor())
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
            assert torch.equal(torch.cat(given, dim=-1), cache.layers[layer_idx].entries.to_tensor())
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
    check_operations_of_generation(cache, assert_holds)


@pytest.mark.parametrize("removed", [0, 1, 5, 6, 7, 8, 13, 14, 15, 60, 65, 66, 67, 69, 70, 1000])
def test_crop(cache, removed):
    """Within the tokens that are in no group, at the edges of groups, inside of one, within the first tokens."""
    fill(cache, [0, 1], 0, 70)
    before = [layer.entries.to_tensor() for layer in cache.layers]
    with pytest.raises(ValueError, match=r"crop\(5\): .*negative"):
        cache.crop(5)
    cache.crop(-removed)
    remaining = max(0, 70 - removed)
    assert cache.get_seq_length() == remaining
    for layer, kept in zip(cache.layers, before, strict=True):
        assert layer.entries.shape == kept[:, :, :remaining].shape
        assert torch.equal(layer.entries.to_tensor(), kept[:, :, :remaining])
    fill(cache, [0, 1], remaining, 100)
    assert cache.get_seq_length() == 100
    for layer_idx, layer in enumerate(cache.layers):
        expected = rounded(torch.cat(entries(layer_idx, [0, 1], 0, 100), dim=-1), layer)
        again = 70 if isinstance(layer, Int8LatentLayer) else 12 + (remaining + 4) // 8 * 8
        assert difference(layer.entries.to_tensor()[:, :, again:], expected[:, :, again:]) <= TOLERANCE
        # What is left of a group is rounded twice.
        assert difference(layer.entries.to_tensor(), expected) <= 0.5


def test_operations_on_an_empty_cache(cache):
    check_operations_on_an_empty_cache(cache, assert_holds)


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
    assert torch.equal(given.to_tensor(), layer.entries.to_tensor())


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
        (
            training,
            "require gradients, and this cache is quantised: .* Use EGMLACache.model.config, bits=16. for training",
        ),
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
