"""What this machine is and can do: memory left, this process's memory, processor, speed of reading and products."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from egmla.linear_egmla import inference_product

from .timing import Timer


# Bytes of the matrices that bandwidth is measured on: more than the last cache of any processor.
SWEEP_BYTES = 512 * 2**20
# Side of one of them, when there is room: larger gives no more.
SIDE = 4096
# Side of those that are multiplied with each other, doubled until one product takes PRODUCT_SECONDS: without
# instructions for it, bf16 is slower by a factor of hundreds.
PRODUCT_SIDE = 256
PRODUCT_SECONDS = 0.02
# Of matrix-vector products and of plain reading; no step beats the higher one.
BANDWIDTHS = ("gemv_bytes_per_second", "read_bytes_per_second")
UNKNOWN_MACHINE_BYTES = 4 * 2**30


def available_bytes() -> int:
    """Memory this process can still take, in bytes: the machine's, or its control group's where that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        amount = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            amount = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (ValueError, OSError, AttributeError):
            return UNKNOWN_MACHINE_BYTES
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return amount if limit == "max" else max(0, min(amount, int(limit) - int(used)))
    except (OSError, ValueError):
        return amount


def device_bytes(device: torch.device) -> int:
    """Memory that tensors on a device can still take, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_bytes()


def processor_name(device: torch.device | None = None) -> str:
    """Name of the processor, or of the GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Whether products of bf16 matrices are faster than those of fp32 on this processor; else they are far slower."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # With AVX-512 alone oneDNN says yes too, and converts: three times as long as fp32.
    return not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported()


def resident_bytes() -> int:
    """Bytes of this process in memory now (Linux).

    Raises:
        OSError: where the system does not say.
    """
    # `statm` lags behind by what the kernel has counted per processor; this one is exact.
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/smaps_rollup has no line Rss.")


def peak_resident_bytes() -> int:
    """The most bytes of this process in memory, since its start or the last `reset_peak_resident` (Linux).

    Not `ru_maxrss`, which a new process inherits from the one that started it.

    Raises:
        OSError: where the system does not say.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no line VmHWM.")


def reset_peak_resident() -> None:
    """Starts a new maximum for `peak_resident_bytes` (Linux).

    Raises:
        OSError: where the system does not let this process.
    """
    Path("/proc/self/clear_refs").write_text("5")


class Limits:
    """Bytes per second of sweeping matrices once each, and operations per second of products of large matrices.

    The product of a matrix with a vector is what decoding at batch 1 does with weights, in the kernel of `nn.Linear`
    or, where EG-MLA's layers have another, the faster of the two. A plain sum may read faster than either, and what is
    compiled comes near it. Attention of all heads over one latent may be bound by arithmetic instead.

    Args:
        dtype (`torch.dtype`): number format of the matrices.
        device (`torch.device`): where they lie.
        nbytes (`int`): their bytes together.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", nbytes: int = SWEEP_BYTES):
        side = max(2, min(SIDE, int((nbytes // dtype.itemsize) ** 0.5)) // 2 * 2)  # even, to be read as fp32 too
        count = max(1, nbytes // (side * side * dtype.itemsize))
        self.matrices = [torch.full((side, side), 0.01, dtype=dtype, device=device) for _ in range(count)]
        self.nbytes = sum(matrix.nbytes for matrix in self.matrices)
        self._vector = torch.full((1, side), 0.01, dtype=dtype, device=device)
        self._timer = Timer(device)

    @torch.no_grad()
    def gemv(self) -> float:
        """Bytes per second of one sweep of products with a vector."""

        def sweep(product: Callable[..., torch.Tensor]) -> float:
            return self._timer.measure(lambda: [product(self._vector, matrix) for matrix in self.matrices])[1]

        seconds = sweep(nn.functional.linear)
        if self._vector.dtype == torch.float32 and self._vector.device.type == "cpu":
            seconds = min(seconds, sweep(inference_product))
        return self.nbytes / seconds

    @torch.no_grad()
    def read(self) -> float:
        """Bytes per second of one sweep of sums."""
        _, seconds = self._timer.measure(lambda: [matrix.view(torch.float32).sum() for matrix in self.matrices])
        return self.nbytes / seconds

    def multiply(self) -> float:
        """Floating point operations per second of one product of square matrices, multiply and add being two.

        On a CPU of fp32 ones where that is faster: attention kernels may sum in another format than weights have.
        """
        dtypes = {self._vector.dtype}
        if self._vector.device.type == "cpu":
            dtypes.add(torch.float32)
        return max(self._multiply(dtype) for dtype in dtypes)

    @torch.no_grad()
    def _multiply(self, dtype: torch.dtype) -> float:
        largest = self.matrices[0].shape[0]
        side = min(PRODUCT_SIDE, largest)
        while True:
            matrix = self.matrices[0][:side, :side].to(dtype).contiguous()
            _, seconds = self._timer.measure(partial(torch.matmul, matrix, matrix))
            if seconds > PRODUCT_SECONDS or 2 * side > largest:
                return 2 * side**3 / seconds
            side *= 2

    def measure(self) -> dict[str, float]:
        """All three, by the names they have in reports."""
        return {
            "gemv_bytes_per_second": self.gemv(),
            "read_bytes_per_second": self.read(),
            "product_flops_per_second": self.multiply(),
        }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads and memory, for reports."""
    return {
        "processor": processor_name(device),
        "device": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "available_bytes": device_bytes(device),
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Processes that want to run, averaged over a minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def median_limits(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The medians of what `Limits.measure` gave several times."""
    return {name: statistics.median(row[name] for row in measured) for name in measured[0]}


def bandwidth(limits: Mapping[str, float]) -> float:
    """The higher one of the bandwidths in what `Limits.measure` gave, bytes per second."""
    return max(limits[name] for name in BANDWIDTHS)
