"""JSON files, written atomically, and folders that can be written to."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path, remedy: str = "write it again") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: when there is none; the message ends with `remedy`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as a whole or not at all: who is interrupted leaves the earlier one."""
    part = path.with_name(f".{path.name}.partial")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def check_writable(path: Path) -> None:
    """Raises `PermissionError` when nothing can be made at a path: the nearest of its folders takes no files."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    folder = existing.parent if existing == path.absolute() and existing.is_file() else existing
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is no folder with write permission.")
