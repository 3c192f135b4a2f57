"""The tensors of an opened checkpoint, read one by one."""

import itertools
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig


# One expert's weights, as they are stored on the Hub.
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

# What safetensors makes of an interrupt that meets it in PyTorch.
INTERRUPTED = "could not determine the shape of object type 'torch.storage.UntypedStorage'"


@dataclass(frozen=True)
class TensorSlice:
    """Rows `start` to `stop` of the source's tensor `name`, times a number: what a tensor of the target is made of."""

    name: str
    start: int = 0
    stop: int | None = None
    scale: float = 1.0


@dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        label (`str`): what the user called it (a path or a hub id).
        config: its Transformers configuration.
        tokenizer: its tokenizer, or `None` when it has none that can be read.
        without_tokenizer (`str`): why it has none.
        generation_config: its generation settings, or `None`.
        files (`dict[str, Path]`): the safetensors file each tensor is in.
        tensors (`dict[str, torch.Tensor]`): tensors already in memory (GGUF).
        origin (`dict`): `license`, `languages` and `base_model` (hub id), as far as the source states them.
    """

    label: str
    config: PreTrainedConfig
    tokenizer: Any | None = None
    without_tokenizer: str = "it has no tokenizer files"
    generation_config: GenerationConfig | None = None
    files: dict[str, Path] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Names of all tensors, the experts of a layer as they are in its module: in one."""
        stored = self.files.keys() | self.tensors.keys()
        return stored - {name for names in self.experts.values() for name in names} | self.experts.keys()

    @cached_property
    def experts(self) -> dict[str, list[str]]:
        """For each tensor of experts side by side, the tensors of single ones that it is made of, in order.

        Raises:
            ValueError: when one of them is missing.
        """
        found: dict[str, list[tuple[int, str, str]]] = {}
        for name in self.files.keys() | self.tensors.keys():
            if match := EXPERT.fullmatch(name):
                module, number, part = match.groups()
                joined = "down_proj" if part == "down" else "gate_up_proj"
                found.setdefault(f"{module}.{joined}", []).append((int(number), part, name))
        for joined, members in found.items():
            module, _, parts = joined.rpartition(".")
            names = {name for *_, name in members}
            count = max(getattr(self.config, "n_routed_experts", None) or 0, 1 + max(number for number, *_ in members))
            for number, part in itertools.product(range(count), parts.removesuffix("_proj").split("_")):
                if (name := f"{module}.{number}.{part}_proj.weight") not in names:
                    raise ValueError(
                        f"{self.label} lacks {name}, of one of its {count} experts; the checkpoint is incomplete: "
                        "download it again."
                    )
        return {joined: [name for _, _, name in sorted(members)] for joined, members in found.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor in its stored dtype.

        Raises:
            ValueError: when it is missing, unreadable or not finite; the message names tensor and file.
        """
        if name in self.experts:
            members = [self.tensor(member) for member in self.experts[name]]
            if name.endswith("gate_up_proj"):
                members = [torch.cat(pair) for pair in zip(members[::2], members[1::2], strict=True)]
            return torch.stack(members)
        if name in self.tensors:
            tensor, where = self.tensors[name], self.label
        elif name in self.files:
            where = str(self.files[name])
            try:
                with safe_open(where, framework="pt") as file:
                    tensor = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{where} cannot be read ({error}): tensor {name}; download the file again."
                ) from error
            except ValueError as error:
                if INTERRUPTED not in str(error):
                    raise
                raise KeyboardInterrupt from error
        else:
            raise ValueError(
                f"{self.label} has no tensor {name}, which its config ({self.config.model_type}) requires; the "
                "checkpoint is incomplete or of another architecture than its config says."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"Tensor {name} in {where} has {int((~torch.isfinite(tensor)).sum())} values that are NaN or "
                "infinite; a conversion would spread them everywhere. Use an intact copy of the checkpoint."
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        if name in self.experts:
            members = self.experts[name]
            height, width = self.shape(members[0])
            pairs = 2 if name.endswith("gate_up_proj") else 1
            return len(members) // pairs, pairs * height, width
        if name in self.tensors:
            return tuple(self.tensors[name].shape)
        with safe_open(str(self.files[name]), framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def needed_tokenizer(self, purpose: str) -> Any:
        """The tokenizer.

        Raises:
            ValueError: without a tokenizer; the message says for what `purpose` it is needed, and why it is missing.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{self.label} has no tokenizer that can be read, which {purpose} needs ({self.without_tokenizer}); "
                "add its tokenizer files to the folder, or what they need to be read."
            )
        return self.tokenizer

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from others: its configuration, and names, sizes and times of its files."""
        files = sorted(set(self.files.values()) or {Path(self.label)})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return {"config": self.config.to_diff_dict(), "files": stats}

    def read(self, part: TensorSlice) -> torch.Tensor:
        """Read a slice of a tensor in its stored dtype; raises as `tensor` does."""
        rows = self.tensor(part.name)[part.start : part.stop]
        return rows if part.scale == 1.0 else (rows.double() * part.scale).to(rows.dtype)
