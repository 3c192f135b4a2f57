"""What made a result and took, for the reports beside it: versions, commit, hash of weights, names, memory."""

import hashlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


HASH_BLOCK = 2**20
CONVERSION_REPORT, TRAINING_REPORT = "conversion_report.json", "training_report.json"
CONVERSION_FIGURE = "conversion_report.png"
PACKAGES = ("egmla", "torch", "transformers", "safetensors", "huggingface_hub")


def software_versions(*more: str) -> dict[str, str]:
    """Versions of the packages that every result depends on, and of `more` where they are installed."""
    versions = {}
    for name in (*PACKAGES, *more):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """What decides in which order a result's sums are taken: device, threads, the processor's instructions."""
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def source_commit() -> str | None:
    """The commit of this package's repository, with `+changes` after it where files differ; None outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may lie inside of a repository that is somebody else's.
        if git("ls-files", "--error-unmatch", Path(__file__).name):
            return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of a checkpoint's safetensors files, names included; None when it has none."""
    files = sorted(folder.glob("model*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest() if files else None


def peak_bytes() -> int:
    """The most memory this process has held, in bytes: of the accelerator where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    from .machine import peak_resident_bytes

    try:
        return peak_resident_bytes()
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def public_name(label: str) -> str:
    """A model's or file's name without the folders it lies in: reports are published."""
    # Not `resolve`: files of the hub's cache are links to names that tell nothing.
    return Path(os.path.abspath(label)).name or label if Path(label).exists() else label
