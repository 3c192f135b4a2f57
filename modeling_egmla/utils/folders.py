"""Folders written atomically, and finished by the next run where one was interrupted.

Everything is written into a hidden staging folder beside the target, which then takes the target's name. Work that can
resume keeps a journal there. Its files then move one by one and the journal goes last, so that the same command
finishes what was stopped at any point.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


LOCK = ".lock"
JOURNAL = "journal.json"


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
    journal = read_journal(staging)
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


def read_journal(staging: Path) -> dict[str, Any] | None:
    file = staging / JOURNAL
    return json.loads(file.read_text()) if file.is_file() else None


def _published(staging: Path) -> set[str]:
    """Names of the files that an earlier run has moved from there to its target already."""
    journal = read_journal(staging)
    if journal is None or journal.get("report") is None:
        return set()
    return set(journal["files"]) - {path.name for path in staging.iterdir()}


@contextmanager
def staged_folder(target: Path, keep: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; it takes the target's name when the block ends without an error.

    On an error or an interruption the hidden folder is removed, so that nothing is left that looks like a model. With
    `keep` it is taken over if it is there, and stays once a journal in it has a finished layer. With a journal the
    files move one by one, `config.json` last. A target where only some have arrived is finished.

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
        remove_content(staging)

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


def remove_content(folder: Path) -> None:
    """Empties a folder, except for the lock that is held."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
