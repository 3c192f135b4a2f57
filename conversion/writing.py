"""Writing a checkpoint so that it is either whole or not there: shards as they fill, everything renamed at the end."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


MAX_SHARD_BYTES = 2 * 1024**3


def check_target(target: Path) -> None:
    """Raises `FileExistsError` when the target is a file, or a folder with something in it."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is not empty; a new or empty folder is needed. Choose another target or remove it."
        )


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes the target's name when the block ends without an error.

    On an error or an interruption the hidden folder is removed, so that nothing is left that looks like a model.
    """
    check_target(target)
    staging = target.parent / f".{target.name}.partial"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        if target.is_dir():
            # An empty folder may be the current one or a mount point, so it stays; config.json makes it a model and
            # comes last.
            for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
                file.rename(target / file.name)
            staging.rmdir()
        else:
            staging.rename(target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"Writing {target} failed ({error.strerror}); nothing was left there. Free space or choose another disk.",
        ) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


class ShardWriter:
    """Collects tensors and writes them as safetensors shards of at most `max_bytes`, or of one larger tensor.

    Args:
        folder (`Path`): where to write.
        max_bytes (`int`): size of a shard.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES):
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0
        self.shapes: dict[str, torch.Size] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor; writes the shard before it when it would grow too large."""
        if name in self.shapes:
            raise ValueError(f"Tensor {name} was written twice.")
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size
        self.shapes[name] = tensor.shape

    def finish(self) -> None:
        """Writes what is left, gives the shards their final names and writes the index when there are several."""
        self._flush()
        count = len(self.shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if self.pending:
            self.shards.append(list(self.pending))
            try:
                save_file(self.pending, str(self._part(len(self.shards))), metadata={"format": "pt"})
            except SafetensorError as error:  # how a full disk shows here
                raise OSError(errno.EIO, str(error)) from error
            self.pending, self.pending_bytes = {}, 0
