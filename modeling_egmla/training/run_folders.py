"""The folder a run works in: which run it is of, its tokens, and whether there is room."""

import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from egmla.utils.folders import check_target

from .data import Progress, TextSource, check_apart, read_sequences, reports, write_sequences
from .settings import CHECKPOINTS_KEPT, TrainingSettings


RUN_NAME = "run.json"
PART_NAME = f".{RUN_NAME}"  # before it is whole
TRAIN_NAME, EVAL_NAME, TOKENIZER_NAME = "train.tokens", "eval.tokens", "tokenizer"


@dataclass
class Place:
    """Where a run works: its target, and the folder of its checkpoints and tokens.

    Attributes:
        target: the folder to write, new or empty.
        work: the folder of checkpoints.
        resume: go on from the newest checkpoint there.
        keep: leave it there at the end.
    """

    target: Path
    work: Path
    resume: bool = False
    keep: bool = False

    @classmethod
    def of(
        cls, target: str | Path, checkpoints: str | Path | None = None, resume: bool = False, keep: bool = False
    ) -> "Place":
        """Checks the two folders.

        Raises:
            FileExistsError: when the target is not empty, or there is an unfinished run and no `resume`.
        """
        target = Path(target).resolve()
        check_target(target)
        work = target.parent / f"{target.name}.checkpoints" if checkpoints is None else Path(checkpoints).resolve()
        if work.is_relative_to(target) or target.is_relative_to(work):
            raise ValueError(
                f"The target {target} and the folder of checkpoints {work} cannot be one folder, nor one within the "
                "other: the latter is removed at the end. Name another folder (--checkpoints)."
            )
        if work.is_file() or (work.is_dir() and any(work.iterdir()) and not resume):
            raise FileExistsError(
                f"{work} holds an interrupted run or other files; go on with resume=True (--resume), or remove it."
            )
        if resume and work.is_dir() and any(work.iterdir()) and not (work / RUN_NAME).is_file():
            left = {path.name for path in work.iterdir()} - {TRAIN_NAME, EVAL_NAME, TOKENIZER_NAME, PART_NAME}
            if left:
                raise FileExistsError(f"{work} holds files that are no run of this command; name another folder.")
        return cls(target, work, resume, keep)


def check_files(sources: Sequence[TextSource], eval_sources: Sequence[TextSource]) -> None:
    """Raises `ValueError` when the same text is to be trained and evaluated on."""
    trained_on = {source.report.sha256 or source.name: source.name for source in sources}
    for source in eval_sources:
        same = trained_on.get(source.report.sha256 or source.name)
        if same is not None:
            raise ValueError(
                f"{source.name} is to be evaluated on and trained on ({same}): its perplexity would measure memory. "
                "Leave it out of the training data, or leave eval_data out to hold a share of the data back."
            )


def run_identity(
    origin: Mapping[str, Any],
    settings: TrainingSettings,
    sources: Sequence[TextSource],
    eval_sources: Sequence[TextSource],
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run; JSON's types only.

    Args:
        origin (`Mapping`): kind of run, configuration and origins of the model.
        settings (`TrainingSettings`): settings; how a batch is divided is left out.
        sources, eval_sources (`Sequence[TextSource]`): the texts, files by their hash.
    """
    same = {name: value for name, value in asdict(settings).items() if name not in ("micro_batch_size", "dtype")}
    for name, found in (("data", sources), ("eval_data", eval_sources)):
        same[name] = [[source.report.name, source.report.sha256 if source.is_file else ""] for source in found]
    return json.loads(json.dumps({**same, **origin}, default=str))


def check_same_run(work: Path, identity: Mapping[str, Any]) -> None:
    """Raises `ValueError` when the run in a folder was started with other settings, data or models."""
    before = _flat(json.loads((work / RUN_NAME).read_text(encoding="utf-8"))["identity"])
    identity = _flat(identity)
    different = sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{work} was started with other settings ({', '.join(different)}; {name} was {before.get(name)!r} and is "
            f"{identity.get(name)!r}), so its run cannot be resumed with these. Give the same ones, or start anew in "
            "another folder."
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with the fields of the configuration as entries of their own, so that an error names the field."""
    fields = identity.get("configuration", {})
    rest = {name: value for name, value in identity.items() if name != "configuration"}
    return {**rest, **{f"configuration.{name}": value for name, value in fields.items()}}


def check_space(place: Place, planned: Mapping[str, Any], adapters: bool = False) -> None:
    """Raises `OSError` when checkpoints, of adapters or of all weights, and target will not fit on the disk."""
    memory = planned["memory_bytes"]
    trained = memory["gradients and optimizer"] // 3
    checkpoint = (trained if adapters else memory["weights"]) + 2 * trained
    needed = (CHECKPOINTS_KEPT + 1) * checkpoint + memory["weights"] + 4 * planned["tokens"]
    folder = next(path for path in (place.work, *place.work.parents) if path.exists())
    # What an interrupted run left counts as room: it goes on there.
    left = sum(path.stat().st_size for path in place.work.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + left < needed:
        raise OSError(
            errno.ENOSPC,
            f"The run needs about {needed / 2**30:.1f} GiB for checkpoints and its target, and {folder} has "
            f"{free / 2**30:.1f} GiB left; free space, or name another folder with checkpoints (--checkpoints).",
        )


def prepare_tokens(
    place: Place,
    make_tokenizer: Callable[[], Any],
    settings: TrainingSettings,
    sources: Sequence[TextSource],
    eval_sources: Sequence[TextSource],
    identity: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Writes tokenizer and token files and then `run.json`, unless an earlier start of the same run did.

    Args:
        place (`Place`): where.
        make_tokenizer (`Callable`): gives the tokenizer.
        settings (`TrainingSettings`): how many sequences, and of what length.
        sources, eval_sources (`Sequence[TextSource]`): texts; without the latter some of the former is held out.
        identity (`Mapping`): see `run_identity`.
        progress (*optional*): called with (stage, done, total).

    Raises:
        ValueError: for too little data, or evaluation text that occurs in what is trained on, held out or not; nothing
            is left in the folder.
    """
    work = place.work
    if place.resume and (work / RUN_NAME).is_file():
        check_same_run(work, identity)
        return
    work.mkdir(parents=True, exist_ok=True)
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
        shutil.rmtree(work, ignore_errors=True)
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
    # Written whole or not at all: its presence says that the token files are complete.
    part = work / PART_NAME
    part.write_text(json.dumps({"identity": identity, "tokens": tokens}, indent=2), encoding="utf-8")
    part.rename(work / RUN_NAME)


def _check_enough(settings: TrainingSettings, count: int, kept: int) -> None:
    if count < settings.batch_size or not kept:
        raise ValueError(
            f"The data gives {count} training sequences of {settings.sequence_length} tokens and {kept} for "
            f"evaluation; at least {settings.batch_size} (one batch) and 1 are required. Use more text, a smaller "
            "batch_size or a smaller sequence_length."
        )
