"""Fixtures of all tests: offline, one fixed seed, and uninitialised memory that cannot be mistaken for zeros."""

import os


# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from cases import MODEL_CASES


# Tiny tensors gain nothing from threads, and lose much of a test run to them where cores are shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=list(MODEL_CASES))
def case(request) -> str:
    """Each named configuration in turn."""
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills new uninitialised tensors with NaN, so that reading a slot never written shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
