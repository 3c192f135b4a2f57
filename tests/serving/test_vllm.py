"""vLLM serves every variant of the model with latents in its pages: the ids and bytes that Transformers has."""

from pathlib import Path

import pytest
import torch
from cases import EXPANDED_CASES, EXPERTS, MODEL_CASES
from serving import assert_served_as_by_transformers, engine, prompts, saved_model, serve


LENGTHS = (5, 17, 40, 3)


def paged_layers(served) -> dict:
    """The layers that keep something in vLLM's pages, by name."""
    return served.llm_engine.vllm_config.compilation_config.static_forward_context


@pytest.mark.parametrize("case", [name for name in MODEL_CASES if name not in EXPANDED_CASES])
def test_same_ids_and_bytes(case, tmp_path):
    model = saved_model(tmp_path, case)
    given = prompts(*LENGTHS)
    with engine(tmp_path) as served:
        results = serve(served, given)
        layers = paged_layers(served)
        specs = [layer.get_kv_cache_spec(served.llm_engine.vllm_config) for layer in layers.values()]
        widths = [layer.kv_cache.shape[-1] for layer in layers.values()]
        item_sizes = {layer.kv_cache.element_size() for layer in layers.values()}
    assert_served_as_by_transformers(model, given, results)
    assert item_sizes == {4}
    assert widths == list(model.config.cache_elements_per_layer)
    per_token = sum(spec.page_size_bytes / spec.block_size for spec in specs)
    assert per_token == 4 * model.config.cache_elements_per_token


@pytest.mark.parametrize("table", [None, 10])
def test_experts(table, tmp_path):
    model = saved_model(tmp_path, "input-gate", **EXPERTS, kv_gate_embedding_dim=table)
    given = prompts(*LENGTHS)
    with engine(tmp_path) as served:
        results = serve(served, given)
    assert_served_as_by_transformers(model, given, results)


def test_bfloat16(tmp_path):
    """Log-probabilities within 0.1 of those in fp32; ids may differ where two are that close."""
    model = saved_model(tmp_path, "input-gate")
    given = prompts(*LENGTHS)
    with engine(tmp_path, dtype="bfloat16") as served:
        results = serve(served, given, tokens=1)
        assert {layer.kv_cache.element_size() for layer in paged_layers(served).values()} == {2}
    for ids, (tokens, logprobs, _) in zip(given, results, strict=True):
        with torch.no_grad():
            right = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        assert abs(float(logprobs[0] - right[tokens[0]])) <= 0.1


@pytest.mark.parametrize("case", ["table-gate", "rank-per-layer"])
def test_prefixes_and_chunks(case, tmp_path):
    """A prompt is read in chunks of 16; a second one that begins alike finds its beginning in the cache."""
    model = saved_model(tmp_path, case)
    (ids,) = prompts(40)
    diverging = ids[:35] + [(token + 1) % 90 + 3 for token in ids[35:]]
    with engine(tmp_path, block_size=16, max_num_batched_tokens=16, enable_prefix_caching=True) as served:
        first, again, other = (serve(served, [given])[0] for given in (ids, ids, diverging))
    assert_served_as_by_transformers(model, [ids, ids, diverging], [first, again, other])
    assert (first[2] or 0, again[2], other[2]) == (0, 32, 32)


def test_preemption(tmp_path):
    """Pages for fewer tokens than the requests need: some requests wait or start over, and no answer changes."""
    model = saved_model(tmp_path, "input-gate")
    given = prompts(20, 21, 22, 23, 24, 25)
    with engine(tmp_path, block_size=16, num_gpu_blocks_override=7, max_model_len=64) as served:
        results = serve(served, given, tokens=30)
    assert_served_as_by_transformers(model, given, results)


REFUSED = {
    "expanded gate": ({"case": "expanded gate"}, {}, "kv_gate='expanded'"),
    "dynamic rope": (
        {"case": "input-gate", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        {},
        "rope_type='dynamic'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, tmp_path):
    fields, options, message = REFUSED[name]
    saved_model(tmp_path, **fields)
    with pytest.raises(ValueError, match=message), engine(tmp_path, **options):
        pass


def test_smollm2_at_half_its_cache(tmp_path):
    """Real weights, converted here: text continued as by Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from egmla.conversion import Refinement, convert_checkpoint, smollm2_source
    from egmla.samples import sample_path, sample_text

    source = smollm2_source(Path(__file__).parents[2] / ".cache" / "smollm2")
    convert_checkpoint(
        source,
        tmp_path / "half",
        kv_lora_rank=128,
        qk_rope_head_dim=64,
        calibration=sample_path("calibration"),
        calibration_tokens=4096,
        refinement=Refinement(steps=0),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    ids = tokenizer(sample_text("evaluation"), verbose=False)["input_ids"]
    given = [ids[start : start + length] for start, length in ((0, 300), (1000, 64), (2000, 7))]
    with engine(tmp_path / "half", max_model_len=512) as served:
        results = serve(served, given, tokens=16)
    assert_served_as_by_transformers(model, given, results)
