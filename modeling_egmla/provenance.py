"""What made a result: versions of the software, and the commit where the package runs from its repository."""

import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


HASH_BLOCK = 2**20
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
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest() if files else None
