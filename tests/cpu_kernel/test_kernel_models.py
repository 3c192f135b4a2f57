"""Models that decode with the CPU kernel, against the same models without it."""

import pytest
import torch
from allocated import allocation_for
from cases import ALLOCATED_CASES, EXPANDED_CASES, difference, needs_compiler, tiny_model, token_ids
from torch._inductor.compile_fx import compile_fx

from egmla import EGMLACache, cpu_egmla


pytestmark = needs_compiler


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "fixed", "int8", "int4", "allocated"])
def test_generation_matches_pytorchs(calls, case, kind, monkeypatch):
    """The same tokens, and logits within rounding; with left padding."""
    if case in EXPANDED_CASES:
        pytest.skip("expanded gates are not absorbed")
    if case in ALLOCATED_CASES and kind == "fixed":
        pytest.skip("no cache of fixed size holds allocated bits")
    model, ids = tiny_model(case), token_ids(2, 80)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"fixed": {"max_cache_len": 96}, "growing": {}, "allocated": {"bits": allocation_for(model.config)}}
    options = options.get(kind, {"quantization": kind})

    def generate():
        return model.generate(
            ids,
            attention_mask=mask,
            past_key_values=EGMLACache(model.config, **options),
            max_new_tokens=8,
            do_sample=False,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )

    given = generate()
    used = sum(count for name, count in calls.items() if name.startswith("latent_attention"))
    assert used == 7 * model.config.num_hidden_layers
    monkeypatch.setattr(cpu_egmla, "OPERATORS", None)
    expected = generate()
    assert torch.equal(given.sequences, expected.sequences)
    # One code that is rounded differently is visible in the logits.
    tolerance = 1e-4 if kind in ("growing", "fixed") else 2e-2
    assert difference(torch.stack(given.logits), torch.stack(expected.logits)) <= tolerance


@torch.no_grad()
def test_compiled_steps_use_the_kernel(folder, monkeypatch):
    """One graph for all steps of a bucket, and the logits of eager steps."""
    model, ids = tiny_model(), token_ids(1, 40)
    monkeypatch.setattr(cpu_egmla, "OPERATORS", torch.ops.egmla)
    expected = model(ids, use_cache=False).logits
    cache = EGMLACache(model.config, max_cache_len=48)
    model(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(sum("latent_attention" in str(node.target) for node in graph.graph.nodes))
        return compile_fx(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for position in range(8, 40):
        step = compiled(ids[:, position : position + 1], past_key_values=cache).logits
        assert difference(step, expected[:, position : position + 1]) <= 1e-4
    assert 1 <= len(found) <= 2 and set(found) == {model.config.num_hidden_layers}
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("with_kernel", [True, False])
def test_steps_of_an_int8_cache_are_compiled_once(folder, monkeypatch, with_kernel):
    """Two graphs, one for a constant length and one for any length, however many steps follow."""
    model, ids = tiny_model(), token_ids(1, 40)
    monkeypatch.setattr(cpu_egmla, "OPERATORS", torch.ops.egmla if with_kernel else None)
    caches = [EGMLACache(model.config, quantization="int8") for _ in range(2)]
    for cache in caches:
        model(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(sum("write_int8" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=backend)
    for position in range(8, 20):
        step = ids[:, position : position + 1]
        expected = model(step, past_key_values=caches[0]).logits
        assert difference(compiled(step, past_key_values=caches[1]).logits, expected) <= 1e-4
    assert 1 <= len(found) <= 2 and set(found) == {model.config.num_hidden_layers if with_kernel else 0}
    torch._dynamo.reset()
