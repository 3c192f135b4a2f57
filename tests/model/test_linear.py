"""The linear layer is `nn.Linear` in all but the kernel it picks for inference on a CPU."""

import copy

import pytest
import torch
from cases import tiny_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from egmla import cpu_egmla
from egmla.cpu_egmla import FEW_ROWS, ONEDNN_LINEAR, linear


needs_onednn = pytest.mark.skipif(ONEDNN_LINEAR is None, reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(cpu_egmla, "ROWS_OF_MKL", 0)


class Operators(TorchDispatchMode):
    """Names of all operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(layer, inputs) -> list[str]:
    with Operators() as seen:
        layer(inputs)
    return seen.names


def uses_onednn(layer, inputs) -> bool:
    return any("_linear_pointwise" in name for name in operators(layer, inputs))


class Fast(nn.Module):
    """A layer called through `linear`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return linear(self.layer, inputs)


def pair(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Fast, nn.Linear]:
    """A layer 24 to 40 called through `linear`, and a copy called as PyTorch does."""
    plain = nn.Linear(24, 40, bias=bias, dtype=dtype)
    return Fast(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0), (torch.float64, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (3, 1, 24), (2, 5, 24), (0, 24), (2, 0, 24)])
@torch.no_grad()
def test_the_same_products_as_pytorchs_layer(shape, bias, dtype, tolerance):
    ours, plain = pair(bias, dtype)
    inputs = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(ours(inputs), plain(inputs), rtol=0, atol=tolerance)


@torch.no_grad()
def test_inputs_and_weights_that_are_views():
    ours, plain = pair()
    wide = torch.randn(2, 48, 6)
    for inputs in (wide[:, ::2].transpose(1, 2), wide[:, :24, ::2].transpose(1, 2), torch.randn(1, 24).expand(5, 24)):
        torch.testing.assert_close(ours(inputs), plain(inputs), rtol=0, atol=1e-6)
    for layer in (ours.layer, plain):
        layer.weight = nn.Parameter(torch.arange(24 * 40.0).view(24, 40).t() / 1000)
    torch.testing.assert_close(ours(wide[:, ::2].mT), plain(wide[:, ::2].mT), rtol=1e-6, atol=1e-6)
    for bias in (torch.arange(80.0)[::2], torch.ones(1).expand(40)):
        ours.layer.bias = plain.bias = nn.Parameter(bias)
        torch.testing.assert_close(ours(wide[:, ::2].mT), plain(wide[:, ::2].mT), rtol=1e-6, atol=1e-6)


@needs_onednn
def test_only_plain_inference_in_fp32_takes_the_other_kernel():
    ours, _ = pair()
    inputs = torch.randn(2, 24)
    with torch.no_grad():
        assert uses_onednn(ours, inputs) and uses_onednn(ours, torch.randn(FEW_ROWS, 24))
        assert not uses_onednn(ours, torch.randn(FEW_ROWS + 1, 24))
        assert not uses_onednn(pair(dtype=torch.bfloat16)[0], inputs.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not uses_onednn(ours, inputs)
            assert ours(inputs).dtype == torch.bfloat16
        masked = copy.deepcopy(ours)
        masked.layer.weight = nn.Parameter(Wrapped(ours.layer.weight.detach()))
        assert not uses_onednn(masked, inputs)
    with torch.inference_mode():
        assert uses_onednn(ours, inputs)
    assert not uses_onednn(ours, inputs)
    with pytest.raises(RuntimeError, match="same dtype"), torch.no_grad():
        ours(inputs.double())


@needs_onednn
@torch.no_grad()
def test_few_rows_are_pytorchs_on_intels_processors(monkeypatch):
    ours, _ = pair()
    monkeypatch.setattr(cpu_egmla, "ROWS_OF_MKL", 4)
    assert [uses_onednn(ours, torch.randn(rows, 24)) for rows in (1, 4, 5, FEW_ROWS)] == [False, False, True, True]


@pytest.mark.parametrize("vendor, intel", [("GenuineIntel", True), ("AuthenticAMD", False), (None, True)])
def test_intels_processors_are_known_by_their_name(vendor, intel, monkeypatch, tmp_path):
    """`None`: no such file, as on Windows."""
    file = tmp_path / "cpuinfo"
    if vendor is not None:
        file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(cpu_egmla, "Path", lambda _: file)
    monkeypatch.setattr(cpu_egmla.platform, "processor", lambda: "Intel64 Family 6 Model 85, GenuineIntel")
    assert cpu_egmla._is_intel() == intel


@needs_onednn
@torch.no_grad()
def test_forward_derivatives_tracing_and_sparse_weights_are_pytorchs():
    """`no_grad` leaves forward-mode derivatives on, and the kernel has none."""
    ours, plain = pair()
    inputs, direction = torch.randn(2, 24), torch.randn(2, 24)
    for mine, theirs in zip(*(torch.func.jvp(layer, (inputs,), (direction,)) for layer in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.func.jvp(ours, (inputs,), (direction,))[1].abs().max() > 0
    torch.testing.assert_close(torch.jit.trace(ours, inputs)(direction), plain(direction))
    torch.testing.assert_close(torch.func.vmap(ours)(inputs), plain(inputs), rtol=0, atol=1e-6)
    ours.layer.weight = nn.Parameter(plain.weight.to_sparse_csr())
    torch.testing.assert_close(ours(inputs), plain(inputs), rtol=0, atol=1e-6)


class Wrapped(torch.Tensor):
    """A weight that is more than a tensor, as of a quantised or distributed model."""


def test_gradients_are_pytorchs():
    ours, plain = pair()
    inputs = torch.randn(3, 24, requires_grad=True)
    ours(inputs).square().sum().backward()
    found = inputs.grad, ours.layer.weight.grad, ours.layer.bias.grad
    inputs.grad = None
    plain(inputs).square().sum().backward()
    for mine, theirs in zip(found, (inputs.grad, plain.weight.grad, plain.bias.grad), strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float64, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_single_rows_are_sums(dtype, tolerance, bias):
    ours, plain = pair(bias, dtype)
    graphs = []

    def capture(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(ours, backend=capture, fullgraph=True)
    for rows, products in ((1, False), (3, True)):
        torch._dynamo.reset()
        graphs.clear()
        inputs = torch.randn(rows, 1, 24, dtype=dtype)
        output = compiled(inputs)
        assert output.dtype == dtype
        torch.testing.assert_close(output, plain(inputs), rtol=0, atol=tolerance)
        assert any("linear" in target for target in graphs[0]) is (products or dtype == torch.float64)


@torch.no_grad()
def test_exported_programs_have_the_plain_operator():
    ours, _ = pair()
    for strict in (False, True):
        program = torch.export.export(ours, (torch.randn(1, 24),), strict=strict)
        assert any("linear" in str(node.target) for node in program.graph.nodes)


@needs_onednn
@torch.no_grad()
def test_every_matrix_of_a_model_is_exactly_pytorchs_linear_layer():
    """Tools that quantise look for the very type. All of them run on the faster kernel."""
    model = tiny_model("query-low-rank")
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear}
    seen = operators(model, token_ids(1, 5))
    assert not any(name.startswith(("aten.addmm", "aten.mm", "aten.linear")) for name in seen)


@torch.no_grad()
def test_what_is_put_around_a_layer_is_called():
    """Hooks of the layer and of all modules, a replaced forward, a subclass: none is bypassed."""
    inputs, calls = torch.randn(2, 24), []

    def hook(*arguments):
        calls.append(None)

    for register in (nn.Linear.register_forward_hook, nn.Linear.register_forward_pre_hook):
        ours, _ = pair()
        register(ours.layer, hook)
        ours(inputs)
    assert len(calls) == 2
    handle = nn.modules.module.register_module_forward_hook(hook)
    linear(pair()[0].layer, inputs)
    handle.remove()
    assert len(calls) == 3
    ours, plain = pair()
    ours.layer.forward = lambda x: plain(x) + 1
    assert torch.equal(ours(inputs), plain(inputs) + 1)

    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 2

    layer = Shifted(24, 40)
    assert torch.equal(linear(layer, inputs), nn.functional.linear(inputs, layer.weight, layer.bias) + 2)
