"""`generate()` in all its modes: the tokens of a loop without a cache, whichever cache and method is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ALLOCATED_CASES, CORE_CASES, EXPANDED_CASES, difference, needs_compiler, token_ids
from cases import tiny_model as make_model
from transformers import CompileConfig, DynamicCache, StaticCache

from egmla import EGMLACache
from egmla.allocated_cache_egmla import AllocatedLatentLayer
from egmla.cache_layers_egmla import FixedLatentLayer, GrowingLatentLayer


pytestmark = pytest.mark.long  # in front, see conftest.py


# Scores of a beam sum log-probabilities of fp32 logits.
TOLERANCE = 1e-4
# Two logits closer than twice the rounding of fp32 (1e-5 here) may change places.
NEAR_TIE = 2e-5
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
SAMPLED = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.5, "top_k": 20}
BEAMS = {"max_new_tokens": NEW_TOKENS, "num_beams": 4, "do_sample": False, "num_return_sequences": 2}


def tiny_model(case="input-gate", **overrides):
    """Untied: a tied head of random weights likes to repeat the last token, which many a defect does as well."""
    return make_model(case, tie_word_embeddings=False, **overrides)


def growing_layer(case):
    """Class of the layers that a model of this case caches in by default."""
    return AllocatedLatentLayer if case in ALLOCATED_CASES else GrowingLatentLayer


@torch.no_grad()
def greedy_loop(model, ids, steps=NEW_TOKENS) -> torch.Tensor:
    """The tokens of whole forwards without a cache."""
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > NEAR_TIE, "choose another seed"
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids


def generate(model, ids, seed=7, **options):
    torch.manual_seed(seed)
    return model.generate(ids, return_dict_in_generate=True, **options)


def test_greedy_equals_a_loop_without_a_cache(case):
    model, ids = tiny_model(case), token_ids(2, 7)
    expected = greedy_loop(model, ids)
    out = generate(model, ids, **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert type(out.past_key_values) is EGMLACache
    assert all(type(layer) is growing_layer(case) for layer in out.past_key_values.layers)
    assert out.past_key_values.get_seq_length() == 7 + NEW_TOKENS - 1
    assert torch.equal(generate(model, ids, use_cache=False, **GREEDY).sequences, expected)
    assert len(set(expected[:, 7:].flatten().tolist())) > NEW_TOKENS // 2


def test_eager_attention_generates_the_same(case):
    model, ids = tiny_model(case, attn_implementation="eager"), token_ids(2, 7)
    assert torch.equal(generate(model, ids, **GREEDY).sequences, greedy_loop(tiny_model(case), ids))


def test_left_padded_batch(case):
    model = tiny_model(case)
    rows = [token_ids(1, length, seed=length)[0] for length in (7, 3, 1)]
    ids = torch.stack([torch.cat((torch.zeros(7 - len(row), dtype=torch.long), row)) for row in rows])
    expected = [greedy_loop(model, row[None])[0, -NEW_TOKENS:] for row in rows]
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({}, static) if case not in ALLOCATED_CASES else ({},):
        out = generate(model, ids, attention_mask=(ids != 0).long(), **GREEDY, **options).sequences
        assert torch.equal(out[:, 7:], torch.stack(expected))


@pytest.mark.parametrize("options", [SAMPLED, BEAMS, {**BEAMS, "do_sample": True, "temperature": 1.5}], ids=str)
@pytest.mark.parametrize("name", CORE_CASES)
def test_sampling_and_beams(name, options):
    """The same random numbers give the same tokens with every cache and without one; beams reorder the cache."""
    model, ids = tiny_model(name), token_ids(2, 7)
    expected = generate(model, ids, use_cache=False, **options).sequences
    total = 7 + NEW_TOKENS
    for cache in (
        None,
        EGMLACache(model.config),
        EGMLACache(model.config, max_cache_len=total),
        DynamicCache(config=model.config),
    ):
        out = generate(model, ids, past_key_values=cache, **options)
        assert torch.equal(out.sequences, expected)
        assert out.past_key_values is cache or (cache is None and type(out.past_key_values) is EGMLACache)
    assert len({tuple(row.tolist()) for row in expected}) > 1


@pytest.mark.parametrize("kind", ["growing", "fixed", "stock dynamic", "stock static"])
def test_given_caches_are_used_and_kept(case, kind):
    if kind.startswith("stock") and case in EXPANDED_CASES:
        pytest.skip("holds no token ids; that it is refused is tested in test_expanded_gate.py")
    model, ids = tiny_model(case), token_ids(2, 7)
    cache = {
        "growing": lambda: EGMLACache(model.config),
        "fixed": lambda: EGMLACache(model.config, max_cache_len=40, bits=16),
        "stock dynamic": lambda: DynamicCache(config=model.config),
        "stock static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[kind]()
    kind_of_cache = type(cache)
    out = generate(model, ids, past_key_values=cache, disable_compile=True, **GREEDY)
    assert out.past_key_values is cache and type(cache) is kind_of_cache
    assert cache.get_seq_length() == 7 + NEW_TOKENS - 1
    assert torch.equal(out.sequences, generate(model, ids, **GREEDY).sequences)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_cache_implementation(case, implementation):
    model, ids = tiny_model(case), token_ids(2, 7)
    if implementation == "static" and case in ALLOCATED_CASES:
        with pytest.raises(ValueError, match="only growing caches are quantised"):
            generate(model, ids, cache_implementation=implementation, **GREEDY)
        return
    out = generate(model, ids, cache_implementation=implementation, disable_compile=True, **GREEDY)
    assert type(out.past_key_values) is EGMLACache
    layer_type = FixedLatentLayer if implementation == "static" else growing_layer(case)
    assert all(type(layer) is layer_type for layer in out.past_key_values.layers)
    assert torch.equal(out.sequences, generate(model, ids, **GREEDY).sequences)


@needs_compiler
def test_compiled_generation_as_the_readme_has_it():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, ids = tiny_model(num_hidden_layers=1), token_ids(2, 7)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    out = generate(model, ids, cache_implementation="static", compile_config=config, **GREEDY)
    assert torch.equal(out.sequences, generate(model, ids, **GREEDY).sequences)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["growing", "fixed", "stock dynamic"])
@pytest.mark.parametrize("name", CORE_CASES)
def test_chunked_prefill(name, kind):
    model, ids = tiny_model(name), token_ids(2, 11)
    cache = {
        "growing": lambda: EGMLACache(model.config),
        "fixed": lambda: EGMLACache(model.config, max_cache_len=30),
        "stock dynamic": lambda: DynamicCache(config=model.config),
    }[kind]()
    expected = generate(model, ids, **GREEDY).sequences
    out = generate(model, ids, past_key_values=cache, prefill_chunk_size=3, disable_compile=True, **GREEDY)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["input-gate", "no-rope"])
def test_chunked_prefill_of_embeddings_is_refused(name, options):
    """Transformers divides the ids, of which there are none: it would cut the mask to nothing."""
    model, ids = tiny_model(name), token_ids(2, 11)
    embeddings = model.get_input_embeddings()(ids)
    given = {"inputs_embeds": embeddings, "prefill_chunk_size": 4, "max_new_tokens": 2, **options}
    for more in ({}, {"input_ids": ids}):
        with pytest.raises(ValueError, match="prefill_chunk_size=4 with inputs_embeds"):
            model.generate(**given, **more)


def test_chunked_prefill_bounds_memory():
    """16,384 tokens in a process of its own: no mask, no scores, no copies of the cache on the way (formula there)."""
    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "qk_rope_head_dim": 16}
    script = Path(__file__).parents[1] / "benchmarks" / "chunked_prefill.py"
    command = [sys.executable, str(script), "--tokens", "16384", "--chunk", "256", "--config", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] == 16384 and result["cache_bytes"] == 16384 * 48 * 4
    assert result["peak_over_budget"] < 1.3, result


@pytest.mark.parametrize("name", CORE_CASES)
def test_assisted_decoding_by_early_exit(name):
    """The model's own first layers make the candidates."""
    model, ids = tiny_model(name), token_ids(1, 7)
    layers = model.config.num_hidden_layers
    expected = generate(model, ids, **GREEDY).sequences
    assert torch.equal(generate(model, ids, assistant_early_exit=1, **GREEDY).sequences, expected)
    assert model.config.num_hidden_layers == layers


@pytest.mark.parametrize("assistant", ["the same model", "another model"])
@pytest.mark.parametrize("name", CORE_CASES)
def test_assisted_decoding(name, assistant):
    """Rejected candidates are cropped off the cache."""
    model, ids = tiny_model(name), token_ids(1, 7)
    helper = model if assistant == "the same model" else tiny_model(name, seed=11)
    expected = greedy_loop(model, ids)
    out = generate(model, ids, assistant_model=helper, **GREEDY)
    assert torch.equal(out.sequences, expected)
    assert type(out.past_key_values) is EGMLACache
    fixed = EGMLACache(model.config, max_cache_len=60)
    out = generate(model, ids, assistant_model=helper, past_key_values=fixed, **GREEDY)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("name", CORE_CASES)
def test_prompt_lookup(name):
    model = tiny_model(name)
    ids = token_ids(1, 4).repeat(1, 3)  # repeats, so that there is something to look up
    out = generate(model, ids, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(out.sequences, greedy_loop(model, ids))


@pytest.mark.parametrize("kind", ["default", "growing", "fixed", "stock dynamic"])
@pytest.mark.parametrize("name", CORE_CASES)
def test_continuing_from_a_past(name, kind):
    """Message by message, as in a chat: the cache of one call goes into the next."""
    model = tiny_model(name)
    cache = {
        "default": lambda: None,
        "growing": lambda: EGMLACache(model.config),
        "fixed": lambda: EGMLACache(model.config, max_cache_len=60),
        "stock dynamic": lambda: DynamicCache(config=model.config),
    }[kind]()
    ids = token_ids(2, 5)
    for turn in range(3):
        mask = torch.ones_like(ids)  # a generated token 0 is no padding
        out = generate(model, ids, attention_mask=mask, past_key_values=cache, disable_compile=True, **GREEDY)
        assert torch.equal(out.sequences, greedy_loop(model, ids))
        cache = out.past_key_values
        ids = torch.cat((out.sequences, token_ids(2, 3, seed=turn)), dim=1)


# --- embeddings instead of ids ---


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, BEAMS], ids=str)
@pytest.mark.parametrize("name", ["input-gate", "table-gate", "gate-off", "rank-per-layer"])
def test_inputs_embeds(name, options):
    """They give what ids give; where gates have tables, the ids of the same tokens go along."""
    model, ids = tiny_model(name), token_ids(2, 7)
    expected = generate(model, ids, **options).sequences[:, 7:]
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if model.config.kv_gate_embedding_dim is not None:
        inputs["kv_gate_input_ids"] = ids
    for cache in (None, EGMLACache(model.config, max_cache_len=40)):
        given = generate(model, None, past_key_values=cache, disable_compile=True, **inputs, **options).sequences
        assert torch.equal(given, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["table-gate", "rank-per-layer", "no-rope"])
def test_gate_tables_need_ids(name):
    model, ids = tiny_model(name), token_ids(2, 7)
    embeddings = model.get_input_embeddings()(ids)
    together = model(inputs_embeds=embeddings, kv_gate_input_ids=ids).logits
    assert torch.equal(together, model(ids).logits)
    # The ids are used: other ids, other gates.
    assert difference(model(inputs_embeds=embeddings, kv_gate_input_ids=ids.flip(1)).logits, together) > 0.01
    for call in (lambda: model(inputs_embeds=embeddings), lambda: model.generate(inputs_embeds=embeddings, **GREEDY)):
        with pytest.raises(ValueError, match="Only inputs_embeds was given") as error:
            call()
        assert "kv_gate_embedding_dim=10" in str(error.value) and "kv_gate_input_ids=ids" in str(error.value)
    with pytest.raises(ValueError, match="kv_gate_input_ids covers 6 tokens and inputs_embeds 7"):
        model(inputs_embeds=embeddings, kv_gate_input_ids=ids[:, 1:])


@torch.no_grad()
def test_input_gate_reads_the_embedding_it_is_given():
    """Soft prompts work: an embedding that is no token's gates its own latent."""
    model, ids = tiny_model("input-gate"), token_ids(2, 7)
    embeddings = model.get_input_embeddings()(ids) + 0.1
    logits = model(inputs_embeds=embeddings).logits
    assert difference(logits, model(ids).logits) > 0.01
    cache = EGMLACache(model.config)
    parts = [model(inputs_embeds=embeddings[:, :4], past_key_values=cache).logits]
    parts += [model(inputs_embeds=embeddings[:, 4:], past_key_values=cache).logits]
    assert difference(torch.cat(parts, dim=1), logits) <= 1e-5


# --- returned scores ---


@pytest.mark.parametrize("name", CORE_CASES)
def test_logits_of_every_step(name):
    model, ids = tiny_model(name), token_ids(2, 7)
    out = generate(model, ids, output_logits=True, output_hidden_states=True, **GREEDY)
    with torch.no_grad():
        expected = model(out.sequences, use_cache=False).logits[:, 6:-1]
    assert difference(torch.stack(out.logits, dim=1), expected) <= 1e-5
    assert len(out.hidden_states) == NEW_TOKENS


@pytest.mark.parametrize("name", CORE_CASES)
def test_beam_scores_with_and_without_a_cache(name):
    model, ids = tiny_model(name), token_ids(2, 7)
    options = {**BEAMS, "output_scores": True}
    scores = [generate(model, ids, use_cache=use, **options).sequences_scores for use in (True, False)]
    assert difference(*scores) <= TOLERANCE


def test_bf16_generates():
    model, ids = tiny_model().to(torch.bfloat16), token_ids(2, 7)
    out = generate(model, ids, **GREEDY)
    assert out.past_key_values.layers[0].buffer.dtype == torch.bfloat16
    assert out.past_key_values.nbytes == 2 * (7 + NEW_TOKENS - 1) * model.config.cache_bytes_per_token()
