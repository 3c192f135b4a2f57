"""Facts about the machine: memory of the process and of the control group, bf16, descriptions."""

import mmap
from pathlib import Path

import pytest
import torch

from egmla.utils import machine


@pytest.fixture
def files(monkeypatch):
    """Replaces files of the system by texts; other files do not exist."""
    texts: dict[str, str] = {}

    def read(path, *_, **__):
        try:
            return texts[str(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(Path, "read_text", read)
    return texts


def test_free_memory_is_the_smaller_limit(files):
    files["/proc/meminfo"] = "MemTotal: 900 kB\nMemAvailable: 500 kB\n"
    assert machine.available_bytes() == 500 * 1024
    files["/sys/fs/cgroup/memory.max"], files["/sys/fs/cgroup/memory.current"] = "400000\n", "100000\n"
    assert machine.available_bytes() == 300_000
    files["/sys/fs/cgroup/memory.current"] = "500000\n"
    assert machine.available_bytes() == 0
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.available_bytes() == 500 * 1024


def test_free_memory_where_the_system_does_not_tell(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name])
    assert machine.available_bytes() == 20_480

    def refuse(name):
        raise ValueError

    monkeypatch.setattr(machine.os, "sysconf", refuse)
    assert machine.available_bytes() == machine.UNKNOWN_MACHINE_BYTES


def test_memory_of_the_process_from_the_systems_files(files):
    files["/proc/self/smaps_rollup"] = "7f [rollup]\nRss: 12 kB\nPss: 9 kB\n"
    files["/proc/self/status"] = "Name: x\nVmHWM:\t   34 kB\n"
    assert machine.resident_bytes() == 12 * 1024
    assert machine.peak_resident_bytes() == 34 * 1024
    files["/proc/self/smaps_rollup"] = files["/proc/self/status"] = "nothing\n"
    with pytest.raises(OSError, match="has no line Rss"):
        machine.resident_bytes()
    with pytest.raises(OSError, match="has no line VmHWM"):
        machine.peak_resident_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_is_seen_and_reset():
    machine.reset_peak_resident()
    before = machine.peak_resident_bytes()
    size = 64 * 2**20
    # Not a tensor: the C library may have free memory for it that is resident already.
    with mmap.mmap(-1, size) as block:
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
        assert machine.resident_bytes() >= size
        assert machine.peak_resident_bytes() - before > size // 2
    machine.reset_peak_resident()
    assert machine.peak_resident_bytes() < before + 32 * 2**20


def test_a_description_names_the_processor(files):
    files["/proc/cpuinfo"] = "processor: 0\nmodel name\t: A Processor @ 1 GHz\n"
    files["/proc/meminfo"] = "MemAvailable: 500 kB\n"
    found = machine.describe_machine(torch.device("cpu"))
    assert found["processor"] == "A Processor @ 1 GHz"
    assert (found["device"], found["available_bytes"]) == ("cpu", 500 * 1024)
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1
    del files["/proc/cpuinfo"]
    assert machine.processor_name()


@pytest.mark.parametrize(
    ("onednn", "avx512", "avx512_bf16", "fast"),
    [(False, True, True, False), (True, True, True, True), (True, True, False, False), (True, False, False, True)],
)
def test_which_processors_multiply_bf16(monkeypatch, onednn, avx512, avx512_bf16, fast):
    """With AVX-512 alone oneDNN converts. On ARM there is no AVX-512, and oneDNN's answer is right."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert machine.multiplies_bf16() == fast
