"""Writing safetensors: a part for each finished layer, joined to shards at the end."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


MAX_SHARD_BYTES = 1024**3
PARTS = "part-*.safetensors"


class ShardWriter:
    """Writes tensors as safetensors parts, and at the end as shards of at most `max_bytes`, or of one larger part.

    Args:
        folder (`Path`): where to write.
        parts (`int`): parts of an earlier run that are there and stay.
        max_bytes (`int`): size of a shard.
    """

    def __init__(self, folder: Path, parts: int = 0, max_bytes: int = MAX_SHARD_BYTES):
        self.folder, self.parts, self.max_bytes = folder, parts, max_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        for number in range(parts):
            with safe_open(str(self._part(number)), framework="pt") as file:
                self.shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor to the part being collected."""
        if name in self.shapes:
            raise ValueError(f"Tensor {name} was written twice.")
        self.pending[name] = tensor.contiguous()
        self.shapes[name] = tensor.shape

    def add_part(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write a part with these tensors."""
        for name, tensor in tensors.items():
            self.add(name, tensor)
        self.end_part()

    def end_part(self) -> None:
        """Writes what was added since the last part."""
        if self.pending:
            save_tensors(self.pending, self._part(self.parts))
            self.parts, self.pending = self.parts + 1, {}

    def finish(self) -> None:
        """Joins the parts to shards under their final names, and writes the index when there are several.

        Parts stay until all shards are there: an interruption here costs the joining only.
        """
        self.end_part()
        groups: list[list[_Part]] = [[]]
        for part in (_Part(self._part(number)) for number in range(self.parts)):
            size = sum(other.size for other in groups[-1])
            # A tensor must begin at a multiple of its elements' width.
            if groups[-1] and (size + part.size > self.max_bytes or size % 8):
                groups.append([])
            groups[-1].append(part)
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            many = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            shard = many if len(groups) > 1 else "model.safetensors"
            _join(group, self.folder / shard)
            weight_map |= dict.fromkeys((name for part in group for name in part.tensors), shard)
        if len(groups) > 1:
            total = sum(part.size for group in groups for part in group)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


class _Part:
    """A safetensors file: `tensors` is its header (type, shape and place of each), `size` the bytes of its data.

    Source: the format's description, https://github.com/huggingface/safetensors: eight bytes with the length of a JSON
    header, the header, the data.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.tensors = json.loads(file.read(length))
        self.tensors.pop("__metadata__", None)
        self.start = 8 + length
        self.size = path.stat().st_size - self.start


def _join(parts: list[_Part], path: Path) -> None:
    """One safetensors file of several, copied without holding a tensor in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        for name, tensor in part.tensors.items():
            header[name] = tensor | {"data_offsets": [offset + place for place in tensor["data_offsets"]]}
        offset += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as joined:
        joined.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            with part.path.open("rb") as file:
                file.seek(part.start)
                shutil.copyfileobj(file, joined, length=2**24)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: also where safetensors has an error of its own for a full disk.
    """
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error
