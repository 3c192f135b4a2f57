"""Pack text into sequences of token ids, and hold some of them out for evaluation.

Text comes from files, `.jsonl` files and data sets of the Hub. Tokens are written to one file of int32. The file is
mapped into memory, so a run of any length needs little memory. A resumed run reads exactly the same sequences.
"""

import contextlib
import hashlib
import importlib.util
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from egmla.utils.progress import Progress


PIECE_CHARACTERS = 2**20
# Tokens in the middle of an evaluation sequence that are searched for in the training data.
PROBE_TOKENS = 32
MAX_PROBES = 128
MIN_DISTINCT = 8  # a passage of fewer distinct tokens proves nothing: blank lines and tables occur everywhere
MAX_FOUND = 0.1


@dataclass
class DataReport:
    """Record of what was read from a source of text.

    Attributes:
        name: file name, or a data set's id with configuration and split; no folders.
        sha256: hash of the whole file, or of the text read from a data set.
        documents: documents read; a plain text file is one document.
        tokens: tokens in the sequences used.
        complete: whether the source was read to its end; reading stops when there are enough tokens.
    """

    name: str
    sha256: str = ""
    documents: int = 0
    tokens: int = 0
    complete: bool = False


class TextSource:
    """Documents of a text file, a `.jsonl` file, or a data set of the Hub or a folder (streamed).

    Args:
        name (`str`): path of a file, or a data set as `DATASET[:CONFIGURATION[:SPLIT]]`. A `.jsonl` file holds one
            JSON object per line; any other file is one plain text. `DATASET` is a Hub id or a folder that
            `datasets.load_dataset` reads. The split is `train` by default.
        text_field (`str`): field of the text in `.jsonl` and data sets.

    Raises:
        FileNotFoundError: when a path does not exist.
        ImportError: for a data set when the package `datasets` is missing.
    """

    def __init__(self, name: str, text_field: str = "text") -> None:
        self.name, self.text_field = name, text_field
        self.path = Path(name)
        self.is_file = self.path.is_file()
        parts = name.split(":")
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or self.path.suffix in (".txt", ".jsonl")
        if not self.is_file and not Path(parts[0]).is_dir() and (looks_local or len(parts) > 3):
            raise FileNotFoundError(
                f"Training text {name} does not exist; give a text file, a .jsonl file with a field {text_field!r}, "
                "or a data set as NAME[:CONFIGURATION[:SPLIT]]."
            )
        if not self.is_file:
            check_datasets()
        self.report = DataReport(self._public_name())
        if self.is_file:
            self.report.sha256 = _file_digest(self.path)

    def _public_name(self) -> str:
        if self.is_file:
            return self.path.name
        dataset, *rest = self.name.split(":")
        return ":".join([Path(dataset).name if Path(dataset).is_dir() else dataset, *rest])

    def documents(self) -> Iterator[Iterator[str]]:
        """Yield each document as an iterator of its pieces of text.

        Raises:
            ValueError: when a file is not UTF-8 text, a line is not JSON, or a row lacks the field.
        """
        if not self.is_file:
            yield from self._rows_of_data_set()
        elif self.path.suffix == ".jsonl":
            yield from self._rows_of_lines()
        else:
            self.report.documents += 1
            yield self._pieces()
        self.report.complete = True

    def _pieces(self) -> Iterator[str]:
        """Yield a file in pieces that end at line breaks, where tokenizers split anyway."""
        try:
            with self.path.open(encoding="utf-8") as file:
                while piece := file.read(PIECE_CHARACTERS):
                    yield piece + file.readline()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not UTF-8 text ({error}); convert it, or choose another file."
            ) from error

    def _rows_of_lines(self) -> Iterator[Iterator[str]]:
        try:
            with self.path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"Line {number} of {self.path} is not JSON ({error}).") from error
                    yield self._text(row, f"Line {number} of {self.path}")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not UTF-8 text ({error}); convert it, or choose another file."
            ) from error

    def _rows_of_data_set(self) -> Iterator[Iterator[str]]:
        from datasets import load_dataset

        name, configuration, split, *_ = [*self.name.split(":"), "", ""]
        try:
            rows = load_dataset(name, configuration or None, split=split or "train", streaming=True)
        except Exception as error:  # the library raises many types
            raise ValueError(
                f"The data set {self.name} cannot be opened ({type(error).__name__}: {error}); check its id, "
                "configuration and split: NAME[:CONFIGURATION[:SPLIT]]."
            ) from error
        digest = hashlib.sha256()
        for number, row in enumerate(rows, start=1):
            for text in self._text(row, f"Row {number} of {self.name}"):
                digest.update(text.encode())
                self.report.sha256 = digest.hexdigest()
                yield iter((text,))

    def _text(self, row: Any, where: str) -> Iterator[str]:
        text = row.get(self.text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{where} has no text in the field {self.text_field!r} (it has {fields}); name the right one with "
                "text_field (--text-field)."
            )
        self.report.documents += 1
        return iter((text,) if text else ())


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(PIECE_CHARACTERS):
            digest.update(block)
    return digest.hexdigest()


def check_datasets() -> None:
    """Raise `ImportError` with the command that installs `datasets` when it is missing."""
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            "Data sets need the package datasets, which is not installed; run: pip install 'egmla[train]'"
        )


def token_stream(source: TextSource, tokenizer: Any) -> Iterator[list[int]]:
    """Yield a source's token ids in pieces; each document ends with the tokenizer's end token, if it has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in source.documents():
        for piece in document:
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield end


def first_tokens(tokenizer: Any) -> list[int]:
    """Return the begin token if the tokenizer puts it before every text, else nothing; attention relies on it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return [token for token in tokenizer("a")["input_ids"][: -len(plain)] if token == tokenizer.bos_token_id]


def packed_sequences(source: TextSource, tokenizer: Any, length: int) -> Iterator[np.ndarray]:
    """Yield sequences of exactly `length` tokens from documents one after another; an incomplete last one is dropped.

    Args:
        source (`TextSource`): the text.
        tokenizer: a Transformers tokenizer.
        length (`int`): tokens in a sequence, including the begin token if the tokenizer uses one.

    Yields:
        `np.ndarray`: ids `[length]`, int32.
    """
    first = first_tokens(tokenizer)
    own = length - len(first)
    left: list[int] = []
    for ids in token_stream(source, tokenizer):
        left += ids
        whole = len(left) // own
        for number in range(whole):
            yield np.array(first + left[number * own : (number + 1) * own], dtype=np.int32)
        left = left[whole * own :]


class PackedDataset(torch.utils.data.Dataset):
    """Data set of token ids `[count, length]` in the form that Trainer expects.

    Args:
        ids (`np.ndarray`): int32 ids `[count, length]`; may be mapped from a file.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.ids[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def write_sequences(
    sources: Sequence[TextSource],
    tokenizer: Any,
    length: int,
    training: Path,
    sequences: int,
    held_out: Path | None = None,
    held_out_share: float = 0.0,
    held_out_sequences: int = 0,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Write packed sequences, one from each source after another, until there are enough or the sources end.

    Args:
        sources (`Sequence[TextSource]`): the texts; their reports are updated.
        tokenizer: a Transformers tokenizer.
        length (`int`): tokens in a sequence.
        training (`Path`): file for the training sequences, int32.
        sequences (`int`): number of training sequences to write.
        held_out (`Path`, *optional*): file for evaluation sequences, which are never trained on.
        held_out_share (`float`): fraction of each source's sequences to hold out, evenly spaced, from the first on.
        held_out_sequences (`int`): largest number of sequences to hold out.
        progress (*optional*): called with (stage, done, total).

    Returns:
        `tuple[int, int]`: number of training sequences and of held-out sequences written.
    """
    every = round(1 / held_out_share) if held_out is not None and held_out_share else 0
    count = kept = 0
    streams = [(source, packed_sequences(source, tokenizer, length)) for source in sources]
    with contextlib.ExitStack() as stack:
        train_file = stack.enter_context(training.open("wb"))
        eval_file = stack.enter_context(held_out.open("wb")) if held_out is not None else None
        while streams and count < sequences:
            for source, stream in list(streams):
                if count == sequences:
                    break
                ids = next(stream, None)
                if ids is None:
                    streams.remove((source, stream))
                    continue
                number = source.report.tokens // length
                source.report.tokens += length
                if every and eval_file is not None and kept < held_out_sequences and number % every == 0:
                    eval_file.write(ids.tobytes())
                    kept += 1
                else:
                    train_file.write(ids.tobytes())
                    count += 1
            if progress is not None:
                progress("tokens", count, sequences)
    return count, kept


def read_sequences(path: Path, length: int) -> np.ndarray:
    """Map the sequences `[count, length]` of a file that `write_sequences` wrote."""
    if path.stat().st_size == 0:
        return np.empty((0, length), dtype=np.int32)
    return np.memmap(path, dtype=np.int32, mode="r").reshape(-1, length)


def passages_in_common(training: Path, evaluation: np.ndarray) -> tuple[int, int]:
    """Count the evaluation passages that occur word for word in the training data.

    A passage is the middle of an evaluation sequence, 32 tokens.

    Args:
        training (`Path`): file that `write_sequences` wrote.
        evaluation (`np.ndarray`): int32 ids `[count, length]`; at most 128 of them, spread evenly, are searched for.

    Returns:
        `tuple[int, int]`: passages found, and passages searched for.
    """
    probes = evaluation[np.linspace(0, len(evaluation) - 1, min(MAX_PROBES, len(evaluation))).astype(int)]
    start = max(0, probes.shape[1] // 2 - PROBE_TOKENS // 2)
    passages = [probe[start : start + PROBE_TOKENS] for probe in probes]
    telling = [passage for passage in passages if len(np.unique(passage)) >= min(MIN_DISTINCT, len(passage))]
    with training.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = sum(_occurs(text, passage) for passage in telling)
    return found, len(telling)


def _occurs(text: mmap.mmap, probe: np.ndarray) -> bool:
    wanted = probe.tobytes()
    at = text.find(wanted)
    while at >= 0 and at % probe.itemsize:
        at = text.find(wanted, at + 1)
    return at >= 0


def check_apart(training: Path, evaluation: np.ndarray) -> None:
    """Raise `ValueError` when more than a tenth of the evaluation passages occur in the training data."""
    found, looked_for = passages_in_common(training, evaluation)
    if found > MAX_FOUND * looked_for:
        raise ValueError(
            f"{found} of {looked_for} passages of the evaluation text occur word for word in the training data, so "
            "perplexity would measure memorised text. Train on other text, or evaluate on other text (--eval-data)."
        )


def reports(sources: Sequence[TextSource]) -> list[dict[str, Any]]:
    """Return the reports of sources as dictionaries."""
    return [asdict(source.report) for source in sources]
