"""Record how a result was made, for reports: versions, commit, hash of the weights, public names, peak memory."""

import functools
import hashlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .machine import peak_resident_bytes


HASH_BLOCK = 2**20
CONVERSION_REPORT, TRAINING_REPORT = "conversion_report.json", "training_report.json"
CONVERSION_FIGURE = "conversion_report.png"
PACKAGES = ("egmla", "torch", "transformers", "safetensors", "huggingface_hub")


def software_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that every result depends on, and of `more` if they are installed."""
    versions = {name: _version(name) for name in (*PACKAGES, *more)}
    return {name: number for name, number in versions.items() if number is not None}


@functools.cache  # each look-up reads all folders of installed packages
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Properties of the machine that change rounding: device, threads, the processor's vector instructions.

    They decide in which order sums are taken, so a run that resumes elsewhere would give other numbers.
    See `machine.describe_machine` for the machine as a reader of a report knows it.
    """
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def source_commit() -> str | None:
    """The commit of this package's repository, followed by `+changes` if files differ; None outside of it."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may lie inside of another project's repository.
        if git("ls-files", "--error-unmatch", Path(__file__).name):
            return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of a checkpoint's safetensors files and their names; None if there are none."""
    files = sorted(folder.glob("model*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest() if files else None


def peak_bytes() -> int:
    """Peak memory of this process in bytes: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return peak_resident_bytes()
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def public_name(label: str) -> str:
    """Name of a model or file without its folders, as reports are published."""
    # Not `resolve`: files in the Hub's cache are links to names that are hashes.
    return Path(os.path.abspath(label)).name or label if Path(label).exists() else label
