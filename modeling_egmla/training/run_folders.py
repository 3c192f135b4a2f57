"""Folders of a run: its target and its working folder, the identity of the run, its token files, room on the disk."""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from egmla.utils.files import write_json
from egmla.utils.folders import check_target
from egmla.utils.progress import Progress

from .data import TextSource, check_apart, read_sequences, reports, write_sequences
from .settings import CHECKPOINTS_KEPT, TrainingSettings
from .trainer import last_checkpoint


RUN_NAME = "run.json"
PART_NAME = f".{RUN_NAME}.partial"  # of `write_json`
LOCK_NAME = ".lock"
TRAIN_NAME, EVAL_NAME, TOKENIZER_NAME, TEACHER_NAME = "train.tokens", "eval.tokens", "tokenizer", "teacher.json"
# Files of an interrupted start, before `run.json` is written.
STARTED_NAMES = {TRAIN_NAME, EVAL_NAME, TOKENIZER_NAME, PART_NAME, LOCK_NAME}
# Settings that change neither the data nor the result beyond rounding.
NOT_IDENTITY = ("micro_batch_size", "dtype", "device")


@dataclass
class RunFolders:
    """Where a run works: its target, and the folder of its checkpoints and tokens.

    Attributes:
        target: the folder to write, new or empty.
        work: the folder of checkpoints and tokens.
        resume: resume from the newest checkpoint; otherwise start over and remove what an interrupted run left.
        keep: keep the working folder at the end.
    """

    target: Path
    work: Path
    resume: bool = True
    keep: bool = False

    @classmethod
    def of(
        cls, target: str | Path, checkpoints: str | Path | None = None, resume: bool = True, keep: bool = False
    ) -> "RunFolders":
        """Check the two folders; nothing is written.

        Args:
            target (`str` or `Path`): the folder to write.
            checkpoints (`str` or `Path`, *optional*): the working folder, `TARGET.checkpoints` by default.
            resume, keep (`bool`): see the attributes.

        Raises:
            FileExistsError: when the target is not empty, or the working folder holds files of something else.
            ValueError: when one folder is inside the other.
        """
        target = Path(target).resolve()
        check_target(target)
        work = target.parent / f"{target.name}.checkpoints" if checkpoints is None else Path(checkpoints).resolve()
        if work.is_relative_to(target) or target.is_relative_to(work):
            raise ValueError(
                f"The target {target} and the folder of checkpoints {work} cannot be one folder, nor one within the "
                "other: the latter is removed at the end. Name another folder (--checkpoints)."
            )
        if work.is_file() or (work.is_dir() and not _is_of_a_run(work)):
            raise FileExistsError(
                f"{work} holds files that no run of heal or train made; remove them, or name another folder "
                "(--checkpoints)."
            )
        return cls(target, work, resume, keep)

    @property
    def last(self) -> Path | None:
        """The checkpoint that the run will resume from, or `None` when it starts from the beginning."""
        return last_checkpoint(self.work) if self.resume else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the working folder, and empty it first where the run starts over.

        Raises:
            BlockingIOError: when another process works in it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / LOCK_NAME, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"Another process is training in {self.work}; wait for it, or choose another target."
            ) from None
        except NotImplementedError:  # some network file systems have no locks
            pass
        try:
            if not self.resume:
                self.clear()
            yield
        finally:
            lock.release()
            (self.work / LOCK_NAME).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # kept where a run can resume
                self.work.rmdir()

    def clear(self) -> None:
        """Remove everything in the working folder but the lock."""
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_NAME:
                path.unlink()

    def left_behind(self) -> str:
        """Say what an interrupted run has left, and what the same command does with it."""
        found = last_checkpoint(self.work)
        if found is not None:
            how = (
                "the same command resumes from there"
                if self.resume
                else "without --no-resume a run resumes from there"
            )
            return f"{found} is kept, and {how}."
        if (self.work / RUN_NAME).is_file():
            return "There is no checkpoint yet: the same command starts from step 0, with the tokens already prepared."
        return "There is no checkpoint yet: the same command starts from the beginning."


def _is_of_a_run(work: Path) -> bool:
    """Whether a folder is empty or holds a run of ours, so that the run may be resumed or removed."""
    names = {path.name for path in work.iterdir()}
    if RUN_NAME not in names:
        return names <= STARTED_NAMES
    try:
        return {"identity", "tokens"} <= json.loads((work / RUN_NAME).read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def check_files(sources: Sequence[TextSource], eval_sources: Sequence[TextSource]) -> None:
    """Raise `ValueError` when the same text is given for training and for evaluation."""
    trained_on = {source.report.sha256 or source.name: source.name for source in sources}
    for source in eval_sources:
        same = trained_on.get(source.report.sha256 or source.name)
        if same is not None:
            raise ValueError(
                f"{source.name} is to be evaluated on and trained on ({same}), so perplexity would measure memorised "
                "text. Leave it out of the training data, or leave eval_data out to hold out a part of the data."
            )


def run_identity(
    origin: Mapping[str, Any],
    settings: TrainingSettings,
    sources: Sequence[TextSource],
    eval_sources: Sequence[TextSource],
) -> dict[str, Any]:
    """Return everything that must be the same when a run is resumed, in JSON's types.

    Args:
        origin (`Mapping`): type of run, configuration and origins of the model.
        settings (`TrainingSettings`): settings, except for those in `NOT_IDENTITY`.
        sources, eval_sources (`Sequence[TextSource]`): the texts; files count by their hash.
    """
    same = {name: value for name, value in asdict(settings).items() if name not in NOT_IDENTITY}
    for name, found in (("data", sources), ("eval_data", eval_sources)):
        same[name] = [[source.report.name, source.report.sha256 if source.is_file else ""] for source in found]
    return json.loads(json.dumps({**same, **origin}, default=str))


def different_settings(work: Path, identity: Mapping[str, Any]) -> str:
    """Name the settings in which the run in a folder differs from this one; empty when it is the same run."""
    before = _flat(json.loads((work / RUN_NAME).read_text(encoding="utf-8"))["identity"])
    identity = _flat(identity)
    different = sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name))
    if not different:
        return ""
    name = different[0]
    return f"{', '.join(different)}; {name} was {before.get(name)!r} and is {identity.get(name)!r}"


def check_same_run(work: Path, identity: Mapping[str, Any]) -> None:
    """Raise `ValueError` when the run in a folder was started with other settings, data or models."""
    if different := different_settings(work, identity):
        raise ValueError(
            f"{work} holds checkpoints of a run with other settings ({different}), so this run cannot resume from "
            "them. Give the same settings, choose another target, or start over with resume=False (--no-resume), "
            "which removes the checkpoints."
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with each field of the configuration as its own entry, which an error can then name."""
    fields = identity.get("configuration", {})
    rest = {name: value for name, value in identity.items() if name != "configuration"}
    return {**rest, **{f"configuration.{name}": value for name, value in fields.items()}}


def check_space(folders: RunFolders, planned: Mapping[str, Any], adapters: bool = False) -> None:
    """Raise `OSError` when checkpoints (of adapters, or of all weights) and the target will not fit on the disk."""
    memory = planned["memory_bytes"]
    trained = memory["gradients and optimizer"] // 3
    checkpoint = (trained if adapters else memory["weights"]) + 2 * trained
    needed = (CHECKPOINTS_KEPT + 1) * checkpoint + memory["weights"] + 4 * planned["tokens"]
    folder = next(path for path in (folders.work, *folders.work.parents) if path.exists())
    # Files of an interrupted run count as room: this run uses or replaces them.
    left = sum(path.stat().st_size for path in folders.work.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + left < needed:
        raise OSError(
            errno.ENOSPC,
            f"The run needs about {needed / 2**30:.1f} GiB for checkpoints and its target, and {folder} has "
            f"{free / 2**30:.1f} GiB left; free space, or name another folder with checkpoints (--checkpoints).",
        )


def prepare_tokens(
    folders: RunFolders,
    make_tokenizer: Callable[[], Any],
    settings: TrainingSettings,
    sources: Sequence[TextSource],
    eval_sources: Sequence[TextSource],
    identity: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write tokenizer, token files and then `run.json`, unless an earlier start of the same run did.

    Files of another run are replaced if that run has no checkpoint.

    Args:
        folders (`RunFolders`): where.
        make_tokenizer (`Callable`): returns the tokenizer.
        settings (`TrainingSettings`): number and length of the sequences.
        sources, eval_sources (`Sequence[TextSource]`): texts; without the latter a part of the former is held out.
        identity (`Mapping`): see `run_identity`.
        progress (*optional*): called with (stage, done, total).

    Raises:
        ValueError: for too little data, or when evaluation text occurs in the training data. Nothing is left in the
            folder.
    """
    work = folders.work
    if (work / RUN_NAME).is_file():
        if folders.last is not None:
            check_same_run(work, identity)
            return
        if not different_settings(work, identity):
            return
    folders.clear()
    length, wanted = settings.sequence_length, settings.steps * settings.batch_size
    limit = settings.eval_tokens // length
    train, evaluation = work / TRAIN_NAME, work / EVAL_NAME
    try:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(work / TOKENIZER_NAME)
        if eval_sources:
            kept, _ = write_sequences(eval_sources, tokenizer, length, evaluation, limit)
            count, _ = write_sequences(sources, tokenizer, length, train, wanted, progress=progress)
        else:
            count, kept = write_sequences(
                sources, tokenizer, length, train, wanted, evaluation, settings.eval_share, limit, progress
            )
        _check_enough(settings, count, kept)
        check_apart(train, read_sequences(evaluation, length))
    except BaseException:
        folders.clear()
        raise
    tokens = {
        "sequences": count // settings.batch_size * settings.batch_size,
        "data": reports(sources),
        "evaluation": {
            "held_out": not eval_sources,
            "text": [{"name": item.report.name, "sha256": item.report.sha256} for item in eval_sources or sources],
            "sequences": kept,
            "tokens": kept * length,
        },
    }
    # Written last and atomically: the presence of this file says that the token files are complete.
    write_json(work / RUN_NAME, {"identity": identity, "tokens": tokens})


def _check_enough(settings: TrainingSettings, count: int, kept: int) -> None:
    if count < settings.batch_size or not kept:
        raise ValueError(
            f"The data gives {count} training sequences of {settings.sequence_length} tokens and {kept} for "
            f"evaluation; at least {settings.batch_size} (one batch) and 1 are required. Use more text, a smaller "
            "batch_size or a smaller sequence_length."
        )
