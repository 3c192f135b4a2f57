"""What a model runs: one graph when compiled, PyTorch's fused kernel, flexible attention; the same logits by each."""

import pytest
import torch
from cases import difference, needs_compiler, tiny_model, token_ids

from egmla import EGMLACache


pytestmark = pytest.mark.long  # in front, see conftest.py


# fp32 sums in another order, logits up to 6: measured 5e-6 or less against fp64 after two layers.
TOLERANCE = 1e-5


@torch.no_grad()
@needs_compiler
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_decode_step_does_not_recompile(batch):
    """One graph, no breaks, over twelve steps of a fixed cache, with the logits of the uncompiled model.

    A single sequence has linear layers of its own: sums instead of products. Two sequences are compiled to machine
    code in `test_generation.py`.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, ids = tiny_model("table-gate", num_hidden_layers=1), token_ids(batch, 20)
    expected = model(ids, use_cache=False).logits
    cache = EGMLACache(model.config, max_cache_len=32)
    model(ids[:, :8], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="inductor" if batch == 1 else "eager")
    for position in range(8, 20):
        positions = torch.tensor([[position]])
        logits = step(ids[:, position : position + 1], position_ids=positions, past_key_values=cache).logits
        assert difference(logits[:, 0], expected[:, position]) <= TOLERANCE
    assert cache.get_seq_length() == 20
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


@torch.no_grad()
@needs_compiler
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_growing_caches_compile(quantization):
    """As a model compiled whole makes and fills one."""
    torch._dynamo.reset()
    model, ids = tiny_model("table-gate", num_hidden_layers=1), token_ids(2, 12)
    cache, reference = (EGMLACache(model.config, quantization=quantization) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(compiled(ids).logits, model(ids).logits) <= TOLERANCE
    for chunk in ids.split([8, 1, 1, 1, 1], dim=1):
        given = compiled(chunk, past_key_values=cache).logits
        assert difference(given, model(chunk, past_key_values=reference).logits) <= TOLERANCE
    torch._dynamo.reset()


@torch.no_grad()
def test_prefill_uses_the_fused_kernel_where_widths_differ(monkeypatch):
    """Values narrower than keys are padded for SDPA on CPU: its other kernel makes all scores."""
    model, ids = tiny_model(v_head_dim=8), token_ids(1, 40)
    widths = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spied(query, key, value, **kwargs):
        widths.append((query.shape[-1], value.shape[-1]))
        return attend(query, key, value, **kwargs)

    expected = tiny_model(v_head_dim=8, attn_implementation="eager")(ids).logits
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    assert difference(model(ids, use_cache=False).logits, expected) <= TOLERANCE
    assert widths and all(query == value for query, value in widths)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("name", ["input-gate", "expanded gate"])
def test_flex_attention_with_either_cache(name):
    """Block masks: uncached, prefill into a growing and a fixed cache, and decoding behind it.

    Fewer than 24 tokens. Without AVX-512, PyTorch 2.13's compiled kernel is wrong for heads of 16 elements and 24 or
    40 keys. It is 0.4 off by itself, without a model; heads of 32 to 128 elements are right.
    """
    model, ids = tiny_model(name, attn_implementation="flex_attention"), token_ids(1, 23)
    expected = tiny_model(name)(ids, use_cache=False).logits
    for cache in (EGMLACache(model.config), EGMLACache(model.config, max_cache_len=128)):
        logits = [model(ids[:, :20], past_key_values=cache).logits]
        logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 23)]
        assert difference(torch.cat(logits, dim=1), expected) <= TOLERANCE
