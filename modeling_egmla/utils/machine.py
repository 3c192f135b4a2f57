"""Describe this machine: free memory, memory of this process, processor, load."""

import os
import platform
from pathlib import Path
from typing import Any

import torch


UNKNOWN_MACHINE_BYTES = 4 * 2**30


def available_bytes() -> int:
    """Bytes of memory that this process can still allocate: the machine's, or its control group's if that is less."""
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
    """Bytes of memory that tensors on a device can still take."""
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
    """Whether this processor multiplies bf16 matrices faster than fp32 ones. If not, bf16 is far slower."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # With AVX-512 alone oneDNN also says yes, but converts to fp32: that takes three times as long.
    return not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported()


def resident_bytes() -> int:
    """Resident bytes of this process (Linux).

    Raises:
        OSError: when the system does not tell.
    """
    # `statm` lags behind, as the kernel counts per processor. This file is exact.
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/smaps_rollup has no line Rss.")


def peak_resident_bytes() -> int:
    """Largest number of resident bytes since the start or the last `reset_peak_resident` (Linux).

    Not `ru_maxrss`: a new process inherits that from its parent.

    Raises:
        OSError: where the system does not say.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no line VmHWM.")


def reset_peak_resident() -> None:
    """Reset the maximum of `peak_resident_bytes` (Linux).

    Raises:
        OSError: when the system refuses.
    """
    Path("/proc/self/clear_refs").write_text("5")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe processor, cores, threads, memory and load, for reports."""
    return {
        "processor": processor_name(device),
        "device": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "available_bytes": device_bytes(device),
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Runnable processes, averaged over a minute; None when the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None
