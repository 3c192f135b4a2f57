"""Read and write JSON, write files atomically, and check that a path can be written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_json(path: Path, remedy: str = "write it again") -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path (`Path`): the file.
        remedy (`str`): what the user should do about a broken file; ends the error message.

    Raises:
        ValueError: when the file holds something else than a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; {remedy}.")
    return content


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically: an interruption leaves the earlier file as it was.

    Missing parent folders are created.

    Args:
        path (`str`): the file.
        text (`str`): its content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.partial")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON file atomically; see `write_text`.

    Args:
        path (`str`): the file.
        content: what it will hold.
        default (*optional*): converts a value that JSON does not have into one that it has, as in `json.dumps`.

    Raises:
        TypeError: for a value that JSON does not have. The file is left as it was.
    """
    # ASCII only: text with broken Unicode in it can be written too.
    write_text(path, json.dumps(content, indent=2, default=default) + "\n")


def check_writable(path: Path) -> None:
    """Check that a file or folder can be created at a path, before hours of work.

    Raises:
        PermissionError: when the nearest existing folder above the path takes no files.
    """
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    folder = existing.parent if existing == path.absolute() and existing.is_file() else existing
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is no folder with write permission.")
