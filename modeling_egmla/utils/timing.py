"""Time work on a CPU, a CUDA device or another accelerator. All measurements use this clock."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch


Result = TypeVar("Result")


class Timer:
    """Times work on one device.

    A GPU runs asynchronously, so a clock read without waiting for it would time the launches only. On CUDA, events are
    recorded before and after the work, once all earlier work is done. Elsewhere the device is synchronised before both
    readings of the clock.

    Args:
        device (`torch.device`): where the work runs.
        cuda: replaces `torch.cuda` in tests without a GPU.
        clock: returns seconds as a float.
    """

    def __init__(
        self, device: torch.device | str, *, cuda: Any = torch.cuda, clock: Callable[[], float] = time.perf_counter
    ):
        self.device = torch.device(device)
        self._cuda = cuda
        self._clock = clock

    def measure(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """Run `work()`; return its result and the seconds until everything that it started on the device is done."""
        if self.device.type == "cuda":
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            self._cuda.synchronize(self.device)
            start.record()
            result = work()
            end.record()
            self._cuda.synchronize(self.device)
            return result, start.elapsed_time(end) / 1e3  # of milliseconds
        self._wait()
        begin = self._clock()
        result = work()
        self._wait()
        return result, self._clock() - begin

    def reset_peak(self) -> None:
        """Reset the peak of the memory allocated on a CUDA device; does nothing elsewhere."""
        if self.device.type == "cuda":
            self._cuda.synchronize(self.device)
            self._cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Peak bytes of tensors on a CUDA device since `reset_peak`; None elsewhere."""
        if self.device.type != "cuda":
            return None
        self._cuda.synchronize(self.device)
        return self._cuda.max_memory_allocated(self.device)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
