"""What lies beside the weights of a checkpoint: tokenizer, generation settings, licence and origin."""

import contextlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from egmla.utils.files import read_json


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


def read_tokenizer(path: Path, **kwargs) -> tuple[Any | None, str]:
    """A source's tokenizer, or `None` and the reason.

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
        return None, one_line(error)
    except Exception as error:  # the tokenizers library has no class of its own for what it cannot read
        raise ValueError(
            f"{path / kwargs.get('gguf_file', 'tokenizer.json')} holds no tokenizer that can be read "
            f"({one_line(error)}); download it again."
        ) from error


def read_generation_config(path: Path) -> GenerationConfig | None:
    file = path / "generation_config.json"
    if not file.is_file():
        return None
    read_json(file, "download it again")
    return GenerationConfig.from_pretrained(path)


def read_origin(card: Path, repository: str | None) -> dict[str, Any]:
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
