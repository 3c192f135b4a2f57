"""Tests of serving run where vLLM is installed, in an environment of their own: it pins another Transformers."""

import os
from importlib.util import find_spec

import pytest


# vLLM reads these when it is imported. The engine runs in the test's process, except where a test starts a server.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
HAS_VLLM = find_spec("vllm") is not None


def pytest_collection_modifyitems(items):
    if HAS_VLLM:
        return
    skip = pytest.mark.skip(reason="vLLM is not installed; see modeling_egmla/serving/README.md")
    for item in items:
        if "tests/serving/" in item.path.as_posix():
            item.add_marker(skip)


if HAS_VLLM:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
