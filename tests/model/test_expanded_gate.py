"""`kv_gate="expanded"`: ids cached once per token, gates computed from them at every step, and what is refused.

That the numbers are the oracle's, on every path, is tested with all other cases in `test_model.py`.
"""

import copy

import pytest
import torch
from cache_operations import call_every_operation, check_selections, storage_bytes
from cases import BASE, EXPANDED_CASES, MODEL_CASES, difference, make_tokenizer, tiny_config, token_ids
from cases import tiny_model as make_model
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

from egmla import EGMLACache, EGMLAConfig, EGMLAForCausalLM, EGMLAForSequenceClassification
from egmla.bench.contestants import CONTESTANTS, Models, shape_subject
from egmla.bench.decode import rewind, synthetic_cache
from egmla.bench.parity import check_parity
from egmla.commands import app
from egmla.commands.common import in_bytes
from egmla.conversion import Refinement, convert_checkpoint
from egmla.conversion.deepseek_export import deepseek_config
from egmla.training.stages import lora_targets, set_trainable
from egmla.utils.accounting import (
    cache_elements_per_layer,
    cache_id_bytes,
    cache_nbytes,
    decode_attention_flops,
    meta_model,
)


# fp32 sums in another order.
TOLERANCE = 1e-5
# bf16 logits up to 6, rounded some twenty times.
BF16_TOLERANCE = 0.25
# Logits, around 3 in magnitude, of random tiny models with int8 entries against those with fp32 entries.
INT8_TOLERANCE = 0.15
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SAMPLED = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.5, "top_k": 20}
BEAMS = {"max_new_tokens": NEW_TOKENS, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}
CACHES = {
    "growing": {},
    "fixed": {"max_cache_len": 200},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4", "quantization_group_size": 8},
}
CONFIG = EGMLAConfig(**{**BASE, "kv_gate": "expanded", "kv_lora_rank": [3, 5], "qk_rope_head_dim": 4})


@pytest.fixture(params=EXPANDED_CASES)
def case(request) -> str:
    return request.param


@pytest.fixture(params=list(CACHES))
def cache(request, poisoned_memory) -> EGMLACache:
    return EGMLACache(CONFIG, **CACHES[request.param])


def tiny_model(case="expanded gate", **overrides):
    """Untied: a tied head of random weights likes to repeat the last token, which many a defect does as well."""
    return make_model(case, tie_word_embeddings=False, **overrides)


def generate(model, ids, seed=7, **options):
    torch.manual_seed(seed)
    return model.generate(ids, return_dict_in_generate=True, **options)


# --- configuration ---


def test_configuration():
    config = tiny_config("expanded gate, tables")
    assert config.cache_elements_per_layer == [20, 36] and config.cache_elements_per_token == 56
    assert config.cache_bytes_per_token() == 2 * 56 + 4 and config.cache_bytes_per_token(4) == 4 * 56 + 4
    assert tiny_config().cache_bytes_per_token() == 2 * tiny_config().cache_elements_per_token
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"kv_gate='sideways': known gates are 'latent', 'expanded', None"
    ):
        tiny_config(kv_gate="sideways")
    tables = r"kv_gate=None: a gate table needs .* kv_gate='latent' or 'expanded'"
    with pytest.raises(StrictDataclassClassValidationError, match=tables):
        tiny_config(kv_gate=None, kv_gate_embedding_dim=5)


@pytest.mark.parametrize("fields", [{}, {"query_norm_dim": 8, "rope_interleave": False}, {"qk_norm_dim": 4}], ids=str)
def test_tensor_parallelism_splits_only_the_mlp(fields):
    """The gate's norm spans all heads."""
    plan = EGMLAConfig(**{**BASE, "kv_gate": "expanded", **fields}).base_model_tp_plan
    assert set(plan) == {f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")}


# --- initialisation and training ---


@torch.no_grad()
def test_a_new_model_is_one_without_a_gate(case):
    """The gate is exactly 1, with and without a cache."""
    torch.manual_seed(0)
    model, ids = EGMLAForCausalLM(tiny_config(case)).eval(), token_ids(2, 9)
    plain = EGMLAForCausalLM(tiny_config(case, kv_gate=None, kv_gate_embedding_dim=None)).eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and all("kv_gate" in name for name in missing.unexpected_keys)
    assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    past, plain_past = model(ids[:, :6]).past_key_values, plain(ids[:, :6]).past_key_values
    last, plain_last = (one(ids[:, 6:], past_key_values=kept) for one, kept in ((model, past), (plain, plain_past)))
    assert difference(last.logits, plain_last.logits) <= TOLERANCE


@torch.no_grad()
def test_a_checkpoint_without_gates_loads_as_the_same_model(tmp_path):
    plain, ids = make_model("gate-off"), token_ids(2, 9)
    plain.save_pretrained(tmp_path)
    gated = EGMLAForCausalLM.from_pretrained(tmp_path, kv_gate="expanded", kv_gate_embedding_dim=6)
    assert torch.equal(gated(ids).logits, plain(ids).logits)
    gated.save_pretrained(tmp_path / "gated")
    assert EGMLAForCausalLM.from_pretrained(tmp_path / "gated").config.kv_gate == "expanded"


def test_gradients_reach_the_gate_and_what_it_reads(case):
    model, ids = tiny_model(case).train(), token_ids(2, 9)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    # The embedding's through the gate alone: the attention's input does not depend on it.
    model.zero_grad()
    attention, embeddings = model.model.layers[1].self_attn, model.get_input_embeddings()
    gate_input = ids if model.config.kv_gate_embedding_dim else embeddings(ids)
    rope = tuple(torch.ones(1, 1, 9, 4) for _ in range(2))
    attention(torch.randn(2, 9, 48), gate_input, position_embeddings=rope)[0].square().sum().backward()
    table = attention.kv_gate_embedding if model.config.kv_gate_embedding_dim else embeddings
    assert table.weight.grad.abs().max() > 0.1


def test_stages_and_adapters_go_by_names(case):
    model, ids = tiny_model(case).train(), token_ids(2, 9)
    assert "kv_gate_proj" in lora_targets(model, "gate")
    set_trainable(model, "gate")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("kv_gate_" in name for name in trained)
    model(ids, labels=ids).loss.backward()
    grown = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grown == trained


# --- the gate of all tokens ---


@torch.no_grad()
def test_never_absorbed(case):
    model = tiny_model(case)
    past = model(token_ids(1, 4)).past_key_values
    assert not any(
        model.model._absorb(new_tokens, past, model.model.embed_tokens.weight) for new_tokens in (1, 2, 10_000)
    )


@torch.no_grad()
def test_past_tokens_are_gated_by_their_ids(case):
    """The test can fail: with other ids in the cache, the next token's logits are others."""
    model, ids = tiny_model(case), token_ids(2, 9)
    expected = model(ids, use_cache=False).logits[:, 6:]
    cache = model(ids[:, :6]).past_key_values
    other = copy.deepcopy(cache)
    other.token_ids.buffer[:, :, 2] += 1
    assert difference(model(ids[:, 6:], past_key_values=cache).logits, expected) <= TOLERANCE
    assert difference(model(ids[:, 6:], past_key_values=other).logits, expected) > 1000 * TOLERANCE


@torch.no_grad()
def test_latents_are_cached_ungated():
    model, ids = tiny_model(), token_ids(2, 9)
    keys = model(ids).past_key_values.layers[0].keys
    for layer in model.model.layers:
        layer.self_attn.kv_gate_norm.weight.mul_(2)
    assert torch.equal(model(ids).past_key_values.layers[0].keys, keys)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_half_precision(case, kind):
    model, ids = tiny_model(case).to(torch.bfloat16), token_ids(2, 12)
    expected = tiny_model(case)(ids, use_cache=False).logits
    cache = EGMLACache(model.config, **CACHES[kind])
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split([6, 1, 4, 1], dim=1)]
    assert difference(torch.cat(logits, dim=1), expected) <= BF16_TOLERANCE


@torch.no_grad()
def test_a_head_without_generation():
    model, ids = make_model("expanded gate", EGMLAForSequenceClassification, num_labels=3), token_ids(2, 9)
    assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)


# --- bytes ---


@torch.no_grad()
def test_ids_are_cached_once_per_token(case):
    """Counted from storages, everything the cache object holds: elements of the layers and 4 bytes a token."""
    model, ids = tiny_model(case), token_ids(2, 11)
    per_token = 4 * model.config.cache_elements_per_token + 4
    assert model.config.cache_bytes_per_token(4) == per_token
    cache = model(ids).past_key_values
    assert cache.nbytes == cache_nbytes(cache)[0] == 2 * 11 * per_token
    assert cache.token_ids.buffer.dtype == torch.int32
    assert storage_bytes(cache) == cache.allocated_nbytes == 2 * (11 + 64) * per_token
    fixed = EGMLACache(model.config, max_cache_len=11)
    model(ids, past_key_values=fixed)
    lengths = 8 * (model.config.num_hidden_layers + 1)
    assert storage_bytes(fixed) - lengths == fixed.allocated_nbytes == fixed.nbytes == 2 * 11 * per_token
    shrunk = EGMLACache(model.config, quantization="int8")
    model(ids, past_key_values=shrunk)
    assert shrunk.nbytes == sum(used.nbytes for layer in shrunk.layers for used in layer.used) + 2 * 11 * 4


@torch.no_grad()
def test_expected_tokens_are_given_room_at_once():
    cache = EGMLACache(CONFIG, expected_tokens=700)
    places = set()
    for start in range(0, 700, 100):
        fill(cache, [0, 1], start, start + 100)
        places.add(cache.token_ids.buffer.data_ptr())
    assert len(places) == 1 and cache.allocated_nbytes <= 1.15 * cache.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formula_is_what_is_measured(case, dtype):
    """For every kind of cache that benchmarks know, filled as they fill it."""
    config = tiny_config(case)
    subject = shape_subject("tiny", config, 200)
    assert "kv_gate='expanded'" in subject.missing["deepseek"]
    models = Models(subject, dtype, torch.device("cpu"))
    assert models.cache_elements("egmla") == config.cache_elements_per_layer
    model = models.get("egmla")
    for name in ("egmla", "egmla-fixed", "egmla-int8", "egmla-int4"):
        contestant = CONTESTANTS[name]
        cache = None if contestant.cache is None else contestant.cache(model, 150)
        cache = synthetic_cache(model, 141, 3, cache=cache)
        assert cache.get_seq_length() == 141
        assert cache.nbytes == 3 * models.cache_bytes(contestant, 141), name
        with torch.no_grad():
            expected = model(token_ids(3, 4), past_key_values=cache).logits
            rewind(cache, 4)
            if name != "egmla-int4":  # which rounds tokens in groups
                assert torch.equal(model(token_ids(3, 4), past_key_values=cache).logits, expected)
    assert models.case_bytes(CONTESTANTS["egmla"], 1, 100)[1] > models.case_bytes(CONTESTANTS["egmla"], 1, 10)[1]


def test_parity_of_benchmarks(case, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(model, backend="eager", **options))
    subject = shape_subject("tiny", tiny_config(case), 200)
    names = ("egmla", "egmla-fixed", "egmla-compiled", "egmla-int8", "egmla-int4")
    rows = check_parity(Models(subject, torch.float32, torch.device("cpu")), subject.contestants(names))
    assert [row["contestant"] for row in rows] == list(names)


def test_accounting(case, tmp_path):
    config = tiny_config(case)
    assert cache_elements_per_layer(meta_model(config)) == config.cache_elements_per_layer
    assert cache_id_bytes(config) == 4 and cache_id_bytes(tiny_config()) == 0
    gate = 48 if config.kv_gate_embedding_dim is None else 10
    # Keys and values of 8 + 12, scores and their use of 8 + 8 + 12, four heads.
    per_token = sum(2 * 4 * ((rank + gate) * 20 + 28) for rank in config.layer_kv_lora_ranks)
    assert decode_attention_flops(config, 10) == 10 * per_token
    config.save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)]).stdout
    bytes_per_token = 2 * config.cache_elements_per_token + 4
    assert f"│ {bytes_per_token:,} " in shown and "the token's id, for all layers" in shown
    assert in_bytes(8192 * bytes_per_token) in shown


# --- operations of the cache, by ids and entries that say where they came from ---


def ids_of(sequences, start, end) -> torch.Tensor:
    return torch.tensor([[1000 * b + t for t in range(start, end)] for b in sequences])


def fill(cache, sequences, start, end):
    """As a model's forward: ids first, then every layer's entries, which are as the ids."""
    ids = ids_of(sequences, start, end)
    given = cache.append_token_ids(ids)
    assert given.dtype == torch.int64 and torch.equal(given, ids_of(sequences, 0, end))
    for layer_idx, rank in enumerate((3, 5)):
        entries = ids[:, None, :, None].float()
        cache.append(entries.expand(-1, -1, -1, rank), entries.expand(-1, -1, -1, 4), layer_idx)


def assert_holds(cache, sequences, end):
    assert cache.get_seq_length() == end
    assert torch.equal(cache.token_ids.entries.to_tensor()[:, 0, :, 0], ids_of(sequences, 0, end).int())
    assert cache.nbytes == sum(u.nbytes for layer in cache.layers for u in layer.used) + len(sequences) * end * 4
    assert cache.allocated_nbytes >= cache.nbytes


def test_growth_keeps_every_id(cache):
    start = 0
    for size in (1, 63, 1, 1, 64, 50, 1, 7):
        fill(cache, [0, 1], start, start + size)
        start += size
        assert_holds(cache, [0, 1], start)


def test_operations_of_generation(cache):
    check_selections(cache, fill, assert_holds)
    cache.crop(-90)
    assert_holds(cache, [0, 0, 0, 2, 2, 2], 40)
    fill(cache, [0, 0, 0, 2, 2, 2], 40, 50)
    assert_holds(cache, [0, 0, 0, 2, 2, 2], 50)
    with pytest.raises(ValueError, match=r"crop\(5\): .*negative"):
        cache.crop(5)
    cache.crop(-1000)
    assert cache.get_seq_length() == cache.nbytes == 0
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    sequences = [0, 1, 2, 3, 4, 5]  # a fixed cache keeps its buffers
    fill(cache, sequences, 0, 4)
    assert_holds(cache, sequences, 4)


def test_operations_on_an_empty_cache(cache):
    call_every_operation(cache)
    assert cache.get_seq_length() == cache.nbytes == cache.allocated_nbytes == 0
    fill(cache, [0], 0, 2)
    assert_holds(cache, [0], 2)


def test_early_initialization(cache):
    cache.early_initialization(batch_size=2, num_heads=9, head_dim=9, dtype=torch.float32, device="cpu")
    assert cache.token_ids.is_initialized and cache.get_seq_length() == cache.nbytes == 0
    fill(cache, [0, 1], 0, 66)
    assert_holds(cache, [0, 1], 66)


def test_ids_follow_layers_that_are_cropped_by_themselves(cache):
    """As benchmarks rewind them."""
    fill(cache, [0, 1], 0, 70)
    for layer in cache.layers:
        layer.crop(-9)
    fill(cache, [0, 1], 61, 63)
    assert_holds(cache, [0, 1], 63)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_what_fails_leaves_the_cache_usable(case, kind):
    model, ids = tiny_model(case), token_ids(3, 9)
    cache = EGMLACache(model.config, **CACHES[kind] and {"max_cache_len": 9})
    with pytest.raises(ValueError, match="this cache was built for"):  # nothing was held before
        make_model("expanded gate", kv_lora_rank=5)(ids, past_key_values=cache)
    model(ids[:2, :5], past_key_values=cache)
    with pytest.raises(ValueError, match="Ids of 3 sequences were given, but this cache holds 2; use a new cache"):
        model(ids[:, 5:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"2 sequences in torch.bfloat16, but this cache holds 2 in torch.float32"):
        tiny_model(case).to(torch.bfloat16)(ids[:2, 5:], past_key_values=cache)
    if kind == "fixed":
        with pytest.raises(ValueError, match="5 cached and 5 new tokens exceed this cache's max_cache_len=9"):
            model(ids[:2, :5], past_key_values=cache)
    expected = model(ids[:2], use_cache=False).logits[:, 5:]
    assert difference(model(ids[:2, 5:], past_key_values=cache).logits, expected) <= TOLERANCE


def test_tokens_without_ids_are_noticed():
    for cache in (EGMLACache(CONFIG), EGMLACache(CONFIG, max_cache_len=20)):
        entries = torch.zeros(1, 1, 3, 5)
        cache.append_token_ids(ids_of([0], 0, 1))
        cache.append(entries[..., :3], entries[..., :4], 0)
        with pytest.raises(ValueError, match=r"holds 3 tokens and the ids of 1, .* call append_token_ids before"):
            cache.append_token_ids(ids_of([0], 3, 4))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_inference_mode_prefill_then_no_grad_decode(case, kind):
    """A tensor made in inference mode cannot be written to outside of it."""
    model, ids = tiny_model(case), token_ids(2, 9)
    cache = EGMLACache(model.config, **CACHES[kind])
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache.crop(-1)
        logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 9)]
        assert difference(torch.cat(logits, dim=1), expected[:, 5:]) <= TOLERANCE


# --- compilation ---


@torch.no_grad()
def test_compiled_decode_steps_are_one_graph(case):
    """Over the whole buffers, and again after the layers alone were rewound, with the uncompiled logits."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, ids = tiny_model(case), token_ids(2, 20)
    expected = model(ids, use_cache=False).logits
    cache = EGMLACache(model.config, max_cache_len=32)
    model(ids[:, :8], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        for position in range(8, 20):
            positions = torch.tensor([[position]])
            logits = step(ids[:, position : position + 1], position_ids=positions, past_key_values=cache).logits
            assert difference(logits[:, 0], expected[:, position]) <= TOLERANCE
        assert torch.equal(cache.token_ids.entries.to_tensor()[:, 0, :, 0], ids.int())
        rewind(cache, 12)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert difference(model(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:]) <= TOLERANCE
    torch._dynamo.reset()


# --- generate ---


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, BEAMS], ids=str)
def test_every_way_of_caching_gives_the_same_tokens(case, options):
    """The same random numbers, with every cache and without one; beams reorder the cache."""
    model, ids = tiny_model(case), token_ids(2, 7)
    expected = generate(model, ids, use_cache=False, **options).sequences
    assert len({tuple(row.tolist()) for row in expected}) > 1
    for given in (
        {},
        {"past_key_values": EGMLACache(model.config)},
        {"past_key_values": EGMLACache(model.config, max_cache_len=7 + NEW_TOKENS)},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
    ):
        out = generate(model, ids, **given, **options)
        assert torch.equal(out.sequences, expected), given
        assert type(out.past_key_values) is EGMLACache
        assert out.past_key_values.token_ids.get_seq_length() == out.past_key_values.get_seq_length()


def test_assisted_decoding_and_prompt_lookup(case):
    """Rejected candidates are cropped off the cache, ids too."""
    model, ids = tiny_model(case), token_ids(1, 4).repeat(1, 3)
    expected = generate(model, ids, use_cache=False, **GREEDY).sequences
    for given in (None, EGMLACache(model.config, max_cache_len=60)):
        helper = {"assistant_model": tiny_model(case, seed=11), "past_key_values": given}
        assert torch.equal(generate(model, ids, **helper, **GREEDY).sequences, expected)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3, **GREEDY).sequences, expected)


@pytest.mark.parametrize("kind", ["default", "growing", "fixed"])
def test_continuing_from_a_past(case, kind):
    model, ids = tiny_model(case), token_ids(2, 5)
    cache = None if kind == "default" else EGMLACache(model.config, **CACHES[kind])
    for turn in range(3):
        mask = torch.ones_like(ids)  # a generated token 0 is no padding
        options = {"attention_mask": mask, "disable_compile": True, **GREEDY}
        out = generate(model, ids, past_key_values=cache, **options)
        assert torch.equal(out.sequences, generate(model, ids, use_cache=False, **options).sequences)
        cache = out.past_key_values
        ids = torch.cat((out.sequences, token_ids(2, 3, seed=turn)), dim=1)


@pytest.mark.parametrize("nbits", [8, 4])
def test_quantized_caches(case, nbits):
    model, ids = tiny_model(case), token_ids(2, 17)
    config = {"nbits": nbits} if nbits == 8 else {"nbits": 4, "q_group_size": 8}
    out = generate(model, ids, cache_implementation="quantized", cache_config=config, **GREEDY)
    cache = out.past_key_values
    given = EGMLACache(model.config, **CACHES[f"int{nbits}"])
    assert torch.equal(generate(model, ids, past_key_values=given, **GREEDY).sequences, out.sequences)
    assert torch.equal(cache.token_ids.entries.to_tensor()[:, 0, :, 0], out.sequences[:, :-1].int())
    if nbits == 8:
        with torch.no_grad():
            expected = model(out.sequences, use_cache=False).logits[:, -1:]
            logits = model(out.sequences[:, -1:], past_key_values=cache).logits
        assert difference(logits, expected) <= INT8_TOLERANCE


# --- embeddings instead of ids ---


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=str)
def test_generate_from_inputs_embeds(case, options):
    model, ids = tiny_model(case), token_ids(2, 7)
    expected = generate(model, ids, **options).sequences[:, 7:]
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "kv_gate_input_ids": ids}
    for cache in (None, EGMLACache(model.config, max_cache_len=40)):
        given = generate(model, None, past_key_values=cache, disable_compile=True, **inputs, **options).sequences
        assert torch.equal(given, expected)


@torch.no_grad()
def test_ids_that_go_along_are_used_with_and_without_a_cache(case):
    model, ids = tiny_model(case), token_ids(2, 7)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "kv_gate_input_ids": ids.flip(1)}
    cached, uncached = (model(**inputs, use_cache=use).logits for use in (True, False))
    assert difference(cached, uncached) <= TOLERANCE
    assert difference(cached, model(ids).logits) > 0.01
    inputs["kv_gate_input_ids"] = ids[:1]  # of all sequences the same
    past = model(**inputs).past_key_values
    assert torch.equal(past.token_ids.entries.to_tensor()[:, 0, :, 0], ids[:1].expand(2, -1).int())


@torch.no_grad()
def test_embeddings_without_ids():
    """They gate themselves where nothing is kept of them; a cache would hold the ids they do not have."""
    model, ids = tiny_model(), token_ids(2, 7)
    embeddings = model.get_input_embeddings()(ids)
    expected = model(ids).logits
    assert torch.equal(model(inputs_embeds=embeddings, use_cache=False).logits, expected)
    assert difference(model(inputs_embeds=embeddings + 0.1, use_cache=False).logits, expected) > 0.01
    for call in (
        lambda: model(inputs_embeds=embeddings),
        lambda: model(inputs_embeds=embeddings, past_key_values=EGMLACache(model.config)),
        lambda: model.generate(inputs_embeds=embeddings, **GREEDY),
    ):
        with pytest.raises(ValueError, match=r"Only inputs_embeds .* holds token ids, .* use_cache=False") as error:
            call()
        assert "kv_gate_input_ids=ids" in str(error.value)
    with pytest.raises(ValueError, match="kv_gate_input_ids covers 6 tokens and inputs_embeds 7"):
        model(inputs_embeds=embeddings, kv_gate_input_ids=ids[:, 1:])
    tables = tiny_model("expanded gate, tables")
    with pytest.raises(ValueError, match=r"read a table by token id .kv_gate_embedding_dim=10.*kv_gate_input_ids=ids"):
        tables(inputs_embeds=embeddings, use_cache=False)


# --- refusals ---


def test_stock_caches_are_refused(case):
    model, ids = tiny_model(case), token_ids(2, 7)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        name = type(cache).__name__
        for call in (
            lambda cache=cache: model(ids, past_key_values=cache),
            lambda cache=cache: generate(model, ids, past_key_values=cache, disable_compile=True, **GREEDY),
        ):
            with pytest.raises(ValueError, match=rf"{name} holds no token ids, .*EGMLACache\(model.config\)"):
                call()


def test_caches_of_other_gates_are_refused():
    model, ids = tiny_model(), token_ids(2, 7)
    with pytest.raises(ValueError, match=r"gates need no token ids, and kv_gate='expanded' does; build it with EGMLA"):
        model(ids, past_key_values=EGMLACache(tiny_config()))
    # The other way round the ids are not needed.
    latent = make_model("input-gate")
    cache = EGMLACache(model.config)
    assert difference(latent(ids, past_key_values=cache).logits, latent(ids, use_cache=False).logits) <= TOLERANCE


def test_continuous_batching_is_refused(case):
    model = tiny_model(case)
    with pytest.raises(ValueError, match=r"generate_batch with kv_gate='expanded': .* Use generate\(\)"):
        model.generate_batch([[1, 2, 3]])


def test_deepseek_layout_is_refused():
    with pytest.raises(ValueError, match=r"does not fit layout deepseek_v3: its gate acts on keys and values"):
        deepseek_config(tiny_config("expanded gate"))


def test_conversion_replaces_a_gate_at_identity_and_refuses_a_trained_one(calibration, tmp_path):
    """As those of latents: a conversion's gate is a new one, on the latent."""
    torch.manual_seed(0)
    config = EGMLAConfig(**{**BASE, "vocab_size": 128, "kv_gate": "expanded", "tie_word_embeddings": False})
    model, ids = EGMLAForCausalLM(config).eval(), token_ids(2, 9)
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "exact", exact=True)
    exact = EGMLAForCausalLM.from_pretrained(tmp_path / "exact").eval()
    assert exact.config.kv_gate == "latent"
    with torch.no_grad():
        assert difference(exact(ids).logits, model(ids).logits) <= TOLERANCE
    quick = {"calibration_tokens": 4096, "refinement": Refinement(steps=0)}
    convert_checkpoint(tmp_path / "source", tmp_path / "small", kv_lora_rank=8, calibration=calibration, **quick)
    assert EGMLAForCausalLM.from_pretrained(tmp_path / "small").config.kv_lora_rank == 8
    torch.nn.init.constant_(model.model.layers[1].self_attn.kv_gate_norm.weight, 0.1)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"gate of layer 1 of .* is trained"):
        convert_checkpoint(tmp_path / "source", tmp_path / "t", exact=True)


def test_cases_cover_both_inputs_of_the_gate():
    tables = {MODEL_CASES[name].get("kv_gate_embedding_dim") is not None for name in EXPANDED_CASES}
    assert tables == {True, False}
