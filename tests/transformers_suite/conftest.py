"""Set-up of Transformers' own model tests: where they are imported from, and their markers."""

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
# Whatever the import mode of pytest; its default one does the same. Processes started by a test inherit it.
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

# Stand-ins for upstream's helper modules, some of them called `test_...` like the originals; no tests in there.
collect_ignore = ["upstream_tests"]

UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config):
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by Transformers' own tests")
