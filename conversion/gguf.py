"""Opening a GGUF file, which Transformers reads and de-quantises."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .companions import one_line, read_tokenizer
from .source import Source


PATCHING = threading.Lock()


def open_gguf(path: Path) -> Source:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a .gguf file.")
    reader = _reader(path)
    _check_rotation(path, reader)
    with _parsed_once(path, reader):
        model = _load(path)
        tokenizer, without = read_tokenizer(path.parent, gguf_file=path.name)
    config = model.config
    # The weights are plain floats now; the note that they were quantised would stop every save.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return Source(
        label=str(path),
        config=config,
        tokenizer=tokenizer,
        without_tokenizer=without,
        generation_config=model.generation_config,
        tensors=model.state_dict(),
        origin=_origin(reader),
    )


def _reader(path: Path) -> Any:
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
            f"{path} is truncated, no GGUF file, or of a newer kind than the gguf package knows ({one_line(error)}); "
            "download it again."
        ) from error


def _load(path: Path) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (ImportError, NotImplementedError, ValueError, KeyError) as error:
        # An architecture or a format of numbers that its reader does not know, ...
        raise ValueError(
            f"Transformers cannot read {path} ({one_line(error)}); use the safetensors checkpoint that it was made of."
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"{path} lacks {len(info['missing_keys'])} tensors of its architecture, first "
            f"{min(info['missing_keys'])}; download it again."
        )
    return model


@contextlib.contextmanager
def _parsed_once(path: Path, reader: Any) -> Iterator[None]:
    """Let Transformers use what is parsed already.

    Its reader of older architectures parses the file three times: for the configuration, the weights and the
    tokenizer. That takes five seconds each for a vocabulary of 49,152 words. It also derives the names of all tensors
    for every module of the model.
    """
    import gguf

    package: Any = gguf
    with PATCHING:
        parse, name_map = package.GGUFReader, package.get_tensor_name_map

        def parsed(given: Any, *rest: Any, **options: Any) -> Any:
            """Another thread may read another file meanwhile."""
            return reader if Path(given) == path and not rest and not options else parse(given, *rest, **options)

        package.GGUFReader, package.get_tensor_name_map = parsed, functools.cache(name_map)
        try:
            yield
        finally:
            package.GGUFReader, package.get_tensor_name_map = parse, name_map


def _check_rotation(path: Path, reader: Any) -> None:
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


def _origin(reader: Any) -> dict[str, Any]:
    names = {"license": "general.license", "languages": "general.languages"}
    return {name: reader.fields[key].contents() for name, key in names.items() if key in reader.fields}
