"""The CPU kernel for tests: loaded once per test session, switched on per module or per test."""

from collections import Counter

import pytest
import torch

from egmla import cpu_egmla, load_cpu_kernel


@pytest.fixture(scope="session")
def extensions(kernel_extensions):
    """Load the kernel once for the session. Return PyTorch's folder of extensions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(kernel_extensions))
        patch.setattr(cpu_egmla, "OPERATORS", None)
        load_cpu_kernel()
    torch.ops.egmla.interface = None  # code that other tests load from checkpoints runs without the kernel
    return kernel_extensions


@pytest.fixture(scope="module")
def folder(extensions):
    """Switch the kernel on for one module. Return the library's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        patch.setattr(cpu_egmla, "OPERATORS", torch.ops.egmla)
        patch.setattr(torch.ops.egmla, "interface", cpu_egmla.INTERFACE)
        yield extensions / "egmla"


@pytest.fixture
def calls(folder, monkeypatch):
    """Count calls by operator, for one test."""
    counts = Counter()

    class Counting:
        def __getattr__(self, name):
            counts[name] += 1
            return getattr(torch.ops.egmla, name)

    monkeypatch.setattr(cpu_egmla, "OPERATORS", Counting())
    return counts
