"""How fast this machine multiplies matrices, which estimates of long work rest on."""

import time
from functools import cache

import torch


MEASURED_SECONDS = 0.2
# Without bf16 instructions a product of this size takes a CPU 0.2 s, one twice as wide 2.5 s.
CPU_SIZE, ACCELERATOR_SIZE = 512, 4096


@cache
def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure multiplications with an addition per second, for a fifth of a second and once a process.

    Args:
        device (`torch.device`): where. On a CPU, processor time counts, so that other work does not.
        dtype (`torch.dtype`): of the matrices.
    """
    size = CPU_SIZE if device.type == "cpu" else ACCELERATOR_SIZE
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    left @ right
    runs, started, spent = 0, now(), 0.0
    while spent < MEASURED_SECONDS:
        left @ right
        runs, spent = runs + 1, now() - started
    return runs * size**3 / spent
