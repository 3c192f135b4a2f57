"""Writing a checkpoint so that it is either whole or not there, and so that what was done can be taken up again.

Everything goes into a hidden staging folder beside the target: a part for each finished layer, the hidden states
behind the last one, and a journal that says what is done. At the end the parts become shards, and the folder the
target; the journal goes last, so that the same command finishes what was stopped at any point.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from egmla.utils.provenance import peak_bytes


MAX_SHARD_BYTES = 1024**3
LOCK = ".lock"
JOURNAL = "journal.json"
PARTS, STATES = "part-*.safetensors", "states-*.safetensors"


def check_target(target: Path, resume: bool = False) -> None:
    """Looks at a target before there is work to lose.

    Args:
        target (`Path`): the folder to write.
        resume (`bool`): allow one that is half published, by an earlier run whose journal is there.

    Raises:
        FileExistsError: when it is a file, or a folder with something in it.
        PermissionError: when it cannot be written.
    """
    content = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if target.is_file() or (content and not (resume and content <= _published(staging_path(target)))):
        raise FileExistsError(
            f"{target} exists and is not empty; a new or empty folder is needed. Choose another target or remove it."
        )
    existing = _folder_around(target)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(
            f"{target} cannot be written: {existing} is no folder with write permission; choose another target."
        )


def check_space(target: Path, needed: int) -> None:
    """Raises `OSError` when the disk has no room for `needed` bytes, of which an earlier run may have left some."""
    staging = staging_path(target)
    journal = _read_journal(staging)
    if journal is not None and journal.get("report") is not None:
        return  # all is written
    there = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    free = shutil.disk_usage(_folder_around(target)).free + there
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{target} has {free / 1e9:,.2f} GB free on its disk, and the conversion needs {needed / 1e9:,.2f} GB "
            "there while it works. Free space or choose another disk.",
        )


def _folder_around(target: Path) -> Path:
    """The nearest folder above the target that is there: what is written is renamed into place, so it counts."""
    return next(parent for parent in target.absolute().parents if parent.exists())


def staging_path(target: Path) -> Path:
    """Where an unfinished target lies."""
    return target.parent / f".{target.name}.partial"


def _read_journal(staging: Path) -> dict[str, Any] | None:
    file = staging / JOURNAL
    return json.loads(file.read_text()) if file.is_file() else None


def _published(staging: Path) -> set[str]:
    """Names of the files that an earlier run has moved from there to its target already."""
    journal = _read_journal(staging)
    if journal is None or journal.get("report") is None:
        return set()
    return set(journal["files"]) - {path.name for path in staging.iterdir()}


@contextmanager
def staged_folder(target: Path, keep: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes the target's name when the block ends without an error.

    On an error or an interruption the hidden folder is removed, so that nothing is left that looks like a model; with
    `keep` it is taken over if it is there, and stays once a journal in it has a finished layer. With a journal the
    files move one by one, `config.json` last, and a target where only some have arrived is finished.

    Raises:
        BlockingIOError: when another process is writing the same target.
        OSError: when the target cannot be written.
    """
    check_target(target, resume=keep)
    staging = staging_path(target)
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"Another process is writing {target}; wait for it or choose another target.") from None
    if not keep:
        _remove_content(staging)

    def leave() -> str:
        lock.release()
        if keep and (staging / JOURNAL).is_file():
            return f"the layers finished wait in {staging}, and the same command goes on from there"
        shutil.rmtree(staging, ignore_errors=True)
        return "nothing was left there"

    try:
        yield staging
        journal = staging / JOURNAL
        if target.is_dir() or journal.is_file():
            # An empty folder may be the current one or a mount point, so it stays; config.json makes it a model and
            # comes last.
            target.mkdir(exist_ok=True)
            files = [file for file in staging.iterdir() if file.name not in (JOURNAL, LOCK)]
            for file in sorted(files, key=lambda file: file.name == "config.json"):
                file.rename(target / file.name)
            journal.unlink(missing_ok=True)
            lock.release()
            shutil.rmtree(staging)
        else:
            lock.release()
            (staging / LOCK).unlink(missing_ok=True)
            staging.rename(target)
    except OSError as error:
        left = leave()
        if error.errno is None:
            raise
        raise OSError(
            error.errno, f"Writing {target} failed ({error.strerror}); {left}. Free space or choose another disk."
        ) from error
    except ValueError:  # bad input: going on from here would end in the same place
        lock.release()
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except BaseException:
        leave()
        raise


class Journal:
    """What of a conversion is done: its settings, what is known of each finished layer, the hidden states behind it.

    A layer counts as finished once the journal says so: its part and the states are written before. So does the whole
    model, whose report the journal then holds: only moving it to its place is left.

    Args:
        folder (`Path`): the staging folder.
        settings (`dict`): everything the result depends on, in types that JSON keeps.
        resume (`bool`): take up what is there; otherwise start over.
        started (`float`, *optional*): when this run began, seconds as of `time.time`; now by default.

    Attributes:
        layers: what is known of each finished layer.
        ranks: ranks dealt out before the first layer, where that is asked for.
        report: the report of the whole model once it is written, else `None`.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool = True, started: float | None = None):
        self.folder, self.settings = folder, settings
        self.started = time.time() if started is None else started
        self.earlier = {"runs": 0, "seconds": 0.0, "peak_bytes": 0}
        self.layers: list[dict[str, Any]] = []
        self.ranks: list[int] | None = None
        self.report: dict[str, Any] | None = None
        found = _read_journal(folder) if resume else None
        if found is None:
            _remove_content(folder)
        else:
            self.layers, self.ranks, self.report = found["layers"], found.get("ranks"), found.get("report")
            self.earlier = found.get("spent", self.earlier)
            self._remove_stale()

    def states(self) -> dict[str, torch.Tensor]:
        """The hidden states behind the last finished layer; empty before the first and where none were needed."""
        file = self._states(len(self.layers))
        return load_file(file) if file.is_file() else {}

    def note_ranks(self, ranks: list[int]) -> None:
        """Notes the ranks of all layers."""
        self.ranks = ranks
        self._write()

    def finish_layer(self, layer: dict[str, Any], states: dict[str, torch.Tensor]) -> None:
        """Notes that the tensors of one more layer are written, and what `states` it leaves to the next."""
        count = len(self.layers) + 1
        if states:
            save_tensors(states, self._states(count))
        self.layers.append(layer)
        self._write()
        self._remove_stale()

    def finish(self, report: dict[str, Any]) -> None:
        """Notes that the whole model is written beside the journal, and what its report says."""
        self.report = report
        self._write()
        self._remove_stale()

    def spent(self) -> dict[str, Any]:
        """Of all runs: how many, their seconds (earlier ones up to the journal's last note), the most bytes held."""
        return {
            "runs": self.earlier["runs"] + 1,
            "seconds": round(self.earlier["seconds"] + time.time() - self.started, 1),
            "peak_bytes": max(self.earlier["peak_bytes"], peak_bytes()),
        }

    def _write(self) -> None:
        content: dict[str, Any] = {
            "settings": self.settings,
            "layers": self.layers,
            "ranks": self.ranks,
            "report": self.report,
            "spent": self.spent(),
        }
        if self.report is not None:
            content["files"] = [path.name for path in self.folder.iterdir()]
        waiting = self.folder / f"{JOURNAL}.waiting"
        waiting.write_text(json.dumps(content))
        waiting.replace(self.folder / JOURNAL)

    def _remove_stale(self) -> None:
        """Removes states that no layer starts from any more, and all that is not part of a model once it is whole."""
        stale = set(self.folder.glob(STATES)) - {self._states(len(self.layers))}
        if self.report is not None:
            stale = {path for pattern in (PARTS, STATES) for path in self.folder.glob(pattern)}
        for path in stale:
            path.unlink()

    def _states(self, count: int) -> Path:
        return self.folder / f"states-{count:05d}.safetensors"


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


def _remove_content(folder: Path) -> None:
    """Empties a folder, except for the lock that is held."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def check_unfinished(target: Path, settings: dict[str, Any]) -> None:
    """Raises `ValueError` where an unfinished conversion into `target` was begun under other settings."""
    folder = staging_path(target)
    journal = _read_journal(folder)
    if journal is None:
        return
    found = journal["settings"]
    if different := [name for name in settings if settings[name] != found.get(name)]:
        raise ValueError(
            f"{folder} holds an unfinished conversion with other settings: "
            + "; ".join(f"{name} was {found.get(name)} and is {settings[name]}" for name in different)
            + ". Give the same ones to finish it"
            + (" (OMP_NUM_THREADS sets the threads)" if "machine" in different else "")
            + ", or remove it to start over (as convert does with --no-resume, resume=False)."
        )
