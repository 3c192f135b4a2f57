"""What the CPU kernel leaves to PyTorch: gradients, several tokens, tracing, fp64."""

import pytest
import torch
from cases import difference, needs_compiler, plain_attention, tiny_model, token_ids
from kernel_cases import LAYERS, attend

from egmla import EGMLACache, cpu_egmla
from egmla.quantized_cache_egmla import Int8LatentLayer


pytestmark = needs_compiler


@torch.no_grad()
@pytest.mark.parametrize("scaling", [0.0, -0.1])
def test_scaling_of_zero_or_below_is_pytorchs(calls, scaling):
    query, entries = torch.randn(1, 12, 1, 128), torch.randn(1, 1, 300, 128)
    expected = plain_attention(query, entries, None, scaling)[..., :64]
    assert difference(attend(query, entries, None, scaling, 64), expected) <= 1e-5
    assert not calls
    with pytest.raises(RuntimeError, match="scaling must be positive"):
        torch.ops.egmla.latent_attention(query, entries, None, scaling, 64)


def test_gradients_several_tokens_and_additive_masks_are_pytorchs(calls):
    query, entries = torch.randn(2, 4, 1, 24, requires_grad=True), torch.randn(2, 1, 50, 24)
    attend(query, entries, None, 0.3, 16).sum().backward()
    assert query.grad.abs().max() > 0
    with torch.no_grad():
        attend(query, entries, torch.zeros(2, 1, 1, 50), 0.3, 16)
        attend(query.expand(-1, -1, 2, -1), entries, torch.ones(1, 1, 2, 50, dtype=torch.bool), 0.3, 16)
        attend(query.double(), entries.double(), None, 0.3, 16)
        torch.jit.trace(lambda *inputs: attend(*inputs, None, 0.3, 16), (query.detach(), entries), check_trace=False)
    assert not calls


@torch.no_grad()
def test_forward_derivatives_are_not_lost(calls):
    query, entries = torch.randn(2, 4, 1, 24), torch.randn(2, 1, 50, 24)
    with pytest.raises(NotImplementedError):  # the same as PyTorch's fused kernel
        torch.func.jvp(lambda query: attend(query, entries, None, 0.3, 16), (query,), (query,))
    assert not calls


@torch.no_grad()
def test_traced_and_exported_programs_quantise_in_pytorch(calls):
    class Append(torch.nn.Module):
        def forward(self, latent, rope_key):
            layer = Int8LatentLayer(16, 8)
            layer.append(latent, rope_key)
            return layer.buffer, layer.scales

    given = torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 8)
    torch.jit.trace(Append(), given, check_trace=False)
    program = torch.export.export(Append(), given)
    assert not calls and "egmla" not in str(program.graph)
    assert program.module()(*given)[0].dtype == torch.int8


@torch.no_grad()
def test_exported_programs_attend_in_pytorch(folder, monkeypatch):
    monkeypatch.setattr(cpu_egmla, "OPERATORS", torch.ops.egmla)

    class Attention(torch.nn.Module):
        def forward(self, query, entries):
            return attend(query, entries, None, 0.3, 16)

    program = torch.export.export(Attention(), (torch.randn(2, 4, 1, 24), torch.randn(2, 1, 50, 24)))
    assert "attention" in str(program.graph) and "egmla" not in str(program.graph)


@torch.no_grad()
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_models_in_fp64_work(calls, quantization):
    model, ids = tiny_model().double(), token_ids(2, 9)
    cache = EGMLACache(model.config, quantization=quantization)
    model(ids[:, :8], past_key_values=cache)
    step = model(ids[:, 8:], past_key_values=cache).logits
    assert difference(step, model(ids, use_cache=False).logits[:, 8:]) <= (5e-2 if quantization else 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_changes_nothing_in_fp32(calls, kind):
    """Entries are quantised and attended to as without autocast."""
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = LAYERS[kind](16, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            layer.append(torch.randn(2, 1, 90, 16), torch.randn(2, 1, 90, 8))
            results.append(layer.entries.attend(torch.randn(2, 4, 1, 24), None, 0.3))
    assert torch.equal(*results)
