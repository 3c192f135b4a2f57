"""The CPU kernel for tests: compiled once per test session, switched on per module or per test."""

import os
from collections import Counter

import pytest
import torch
from filelock import FileLock

from egmla import cpu_egmla, load_cpu_kernel
from egmla.cpu_kernel.build import compiled_library


@pytest.fixture(scope="session")
def extensions(tmp_path_factory):
    """Compile and load the kernel once for the session. Return PyTorch's folder of extensions.

    Workers of pytest-xdist share the library.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "extensions"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setattr(cpu_egmla, "OPERATORS", None)
        with FileLock(f"{folder}.lock"):
            compiled_library()
        load_cpu_kernel()
    torch.ops.egmla.interface = None  # code that other tests load from checkpoints runs without the kernel
    return folder


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
