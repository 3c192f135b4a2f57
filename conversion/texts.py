"""Reading the texts of a conversion, and keeping calibration apart from evaluation by what the texts say.

A copy is caught when a tenth of either text is in the other, also with other line ends, spaces, punctuation or letter
case. So is any of 61 passages of WikiText-2's raw test split, one an article. Smaller shares, translations, retellings
and other evaluation sets are not caught.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from egmla.utils.perplexity import token_windows

from .source import Source


# More text than this per token asked for is not read: tokenising a whole corpus takes minutes.
MAX_CHARACTERS_PER_TOKEN = 16
WINDOW = 2048
PASSAGE_WORDS = 16
MIN_DISTINCT = 12  # tables and refrains occur everywhere
MAX_PASSAGES = 128
MAX_FOUND = 0.1
MIN_SEQUENCES = 4

WIKITEXT2_TEST_BYTES = 1_290_590
WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
# A passage of each of its articles: the first 16 digits of the SHA-256 of its words, as of `_words`.
WIKITEXT2_TEST_PASSAGES = """
9c34d909004b6380 604ad85faae4357b 41b4ddc48dba8290 b43aae786a2bdb4d ce701e9ef5117b51 6b4ce555467a3e10
f3294988cdf72564 145980fa283af30b 3bce73748c6711ef def25d956446818a cd91925c30d466f5 9fb2d42099e5c944
0bd081cd6d01b175 afc6d9c371de0fa4 0bc8fc9300d4af35 a83c0e864b713e58 a20a297c7edf04e6 f739f65782d780af
6f4a6c2d66ad58d9 eed8911c18dc8714 8b58e2200a221a1d f19057cac0ff4420 00169a691e74f5cb 6bf43b2f9196cb50
5e0423dba31c6b0d e5e8f648631811a6 ed7a6aa9876badab f58151d401fd5b59 d0110762f4d57553 7831aa77d3af5538
59fa7bca8260fd98 d78884d791c0acdf 5c815974ba0235b1 263a3b3edf1bd045 635121a8ba786cf3 6b1f9d744e11214e
2fe064a12b8339a1 9f84370f6de3cee9 681f57f7d7809802 45cbb0ffd7332348 41adc8d6299e202d 1dee9a2f73633121
a388fcfb7d06f1f7 f964efb4e89cda82 e045bf9fbedf16bf 3e40c3c68f550152 0f3ae7ff117f8cd1 082b5ac4915409a6
ed39a4533d84d8f6 10b93fd7043367d7 6dd12b67a271cb62 22fc57e0383d5194 a58497bb87ba7596 3da4644fed8e0589
7ecec32cce13a25a ebc017d72eaa6c01 fe219e746a4b6668 49f6314d47589a70 8974ee604c6529f5 80685e95b97d8da7
fad503ae26698713
"""


@dataclass(frozen=True)
class EvaluationText:
    """Text that perplexity is measured on.

    Attributes:
        name: file name, without folders.
        sha256: of the text read.
        windows: token ids `[windows, window]`.
        text: what the windows hold, up to a few words.
    """

    name: str
    sha256: str
    windows: torch.Tensor
    text: str

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        count, window = self.windows.shape
        return {"file": self.name, "sha256": self.sha256, "windows": count, "window": window}


def read_text(path: Path, purpose: str, characters: int | None = None) -> str:
    """The beginning of a plain text, or all of it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is empty, binary or no UTF-8.
    """
    if path.is_dir():
        raise ValueError(
            f"{purpose} text {path} is a folder, and a conversion reads one file; give a plain text file, such as one "
            "that joins those of the folder."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{purpose} text {path} does not exist; give a plain text file.")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(characters)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{purpose} text {path} is no UTF-8 text ({error.reason} at byte {error.start}); convert it, or choose "
            "another file."
        ) from error
    if "\0" in text:
        raise ValueError(f"{purpose} text {path} is a binary file (it has zero bytes); give a plain text file.")
    if not text.strip():
        raise ValueError(f"{purpose} text {path} is empty; give a plain text file.")
    return text


def open_evaluation(path: str | Path, tokenizer: Any, config: PreTrainedConfig, windows: int) -> EvaluationText:
    """Reads the first windows of an evaluation text.

    Args:
        path (`str` or `Path`): a plain text file.
        tokenizer: the source's.
        config (`PreTrainedConfig`): the source's; windows are no longer than its context.
        windows (`int`): how many to use at most.

    Raises:
        ValueError, FileNotFoundError: for a text that cannot be read or does not fill one window, or a tokenizer of
            another model.
    """
    if windows < 1:
        raise ValueError(f"evaluation_windows={windows}: at least 1 is needed.")
    path, window = Path(path), min(WINDOW, config.max_position_embeddings)
    text = read_text(path, "Evaluation", MAX_CHARACTERS_PER_TOKEN * windows * window)
    ids = token_windows(tokenizer, text, window)
    check_token_ids(ids, config)
    used = text[: math.ceil(len(text) * min(1.0, windows / len(ids)))]
    return EvaluationText(path.name, hashlib.sha256(text.encode()).hexdigest(), ids[:windows], used)


def open_calibration(
    source: Source,
    calibration: Sequence[Path],
    tokens: int,
    length: int,
    evaluation: EvaluationText | None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read the sequences of calibration texts, equally many of each, interleaved.

    Args:
        source (`Source`): gives the tokenizer and the context.
        calibration (`Sequence[Path]`): plain text files, one for each domain.
        tokens (`int`): most tokens to use of all of them together.
        length (`int`): tokens of a sequence, at most the source's context.
        evaluation (`EvaluationText`, *optional*): the text that they must have nothing in common with.

    Returns:
        Ids `[sequences, T]`, and what the report says of them.

    Raises:
        ValueError, FileNotFoundError: for a text that is missing, too short, or not apart from the evaluation text.
    """
    if not calibration:
        raise ValueError(
            "A smaller cache needs calibration text: pass calibration=FILE (--calibration FILE), a plain text file "
            f"of at least {MIN_SEQUENCES * length} tokens that is not your evaluation text."
        )
    length = min(length, source.config.max_position_embeddings)
    least = math.ceil(MIN_SEQUENCES / len(calibration))
    each = tokens // len(calibration)
    read = [_read_calibration(source, path, each, length, least, evaluation) for path in calibration]
    count = min(len(ids) for ids, _ in read)
    # Interleaved: the first sequences, which gradients are of, have all domains.
    sequences = torch.stack([ids[:count] for ids, _ in read], dim=1).flatten(0, 1)
    check_token_ids(sequences, source.config)
    texts = [text for _, text in read]
    return sequences, {
        **describe_texts(calibration, texts),
        "files": [describe_texts([path], [text]) for path, text in zip(calibration, texts, strict=True)],
        "tokens_asked": tokens,
        "sequences": len(sequences),
        "sequence_length": length,
    }


def text_paths(given: str | Path | Sequence[str | Path] | None) -> tuple[Path, ...]:
    """Return the paths of one text, of several or of none."""
    texts = () if given is None else (given,) if isinstance(given, str | Path) else given
    return tuple(map(Path, texts))


def describe_texts(paths: Sequence[Path], texts: Sequence[str]) -> dict[str, str]:
    """Return what a report says of texts: the names of their files, and the SHA-256 of all that was read of them."""
    sha256 = hashlib.sha256("".join(texts).encode()).hexdigest()
    return {"file": ", ".join(path.name for path in paths), "sha256": sha256}


def _read_calibration(
    source: Source, path: Path, tokens: int, length: int, least: int, evaluation: EvaluationText | None
) -> tuple[torch.Tensor, str]:
    """Read the sequences `[sequences, length]` of one text, at least `least`, and what was read of it."""
    text = read_text(path, "Calibration", MAX_CHARACTERS_PER_TOKEN * tokens)
    tokenizer = source.needed_tokenizer("calibration")
    check_calibration_text(path, text, evaluation)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    # Where the tokenizer puts a first token before every text, that token draws the attention: it must be measured.
    first = tokenizer("a")["input_ids"][: -len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    first = [token for token in first if token == tokenizer.bos_token_id]
    own = length - len(first)
    count = min(ids.numel(), tokens) // own
    if count < least:
        raise ValueError(
            f"{path.name} gives {min(ids.numel(), tokens)} calibration tokens; at least {least * length} are required "
            f"of it ({least} sequences of {length}), {64 * length} are recommended. Use a longer text or more "
            "calibration_tokens."
        )
    sequences = ids[: count * own].view(count, own)
    if first:
        sequences = torch.cat((torch.full((count, 1), first[0]), sequences), dim=1)
    return sequences, text


def check_token_ids(ids: torch.Tensor, config: PreTrainedConfig) -> None:
    """Raises `ValueError` for token ids that the model has no embedding of."""
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"The tokenizer gives token id {int(ids.max())} and the source has embeddings of {config.vocab_size} "
            "tokens (vocab_size): it is another model's. Put the source's own tokenizer files into its folder."
        )


def check_calibration_text(path: Path, text: str, evaluation: EvaluationText | None) -> None:
    """Refuses a calibration text that is, holds, or is part of the evaluation text or a known evaluation set.

    Args:
        path (`Path`): its file.
        text (`str`): what is used of it.
        evaluation (`EvaluationText`, *optional*): what the conversion will be measured on.

    Raises:
        ValueError: when they are not apart.
    """
    words = _words(text)
    if _holds_known_passages(words) or _is_wikitext2_test(path):
        raise ValueError(
            f"Calibration text {path.name} is the test split of WikiText-2, or holds passages of it: a known "
            "evaluation set, on which figures would then measure memory. Calibrate on its train split or other text."
        )
    if evaluation is None:
        return
    other = _words(evaluation.text)
    for few, many in ((other, words), (words, other)):
        found, looked_for = _passages_in_common(few, many)
        if few == many or found > MAX_FOUND * looked_for:
            raise ValueError(
                f"Calibration text {path.name} and evaluation text {evaluation.name} have text in common ({found} of "
                f"{looked_for} passages looked for, word for word): perplexity would measure memory. Calibrate, or "
                "evaluate, on other text."
            )


def _words(text: str) -> list[str]:
    """Words without case, punctuation and spaces: what stays when a text is joined or tokenised anew."""
    return re.findall(r"\w+", text.casefold())


def _passages_in_common(words: list[str], other: list[str]) -> tuple[int, int]:
    """How many of at most 128 passages of `words`, spread evenly, occur in `other`, and how many were looked for."""
    last = len(words) - PASSAGE_WORDS
    step = max(PASSAGE_WORDS, last // MAX_PASSAGES + 1)
    passages = [words[start : start + PASSAGE_WORDS] for start in range(0, last + 1, step)]
    telling = [passage for passage in passages if len(set(passage)) >= MIN_DISTINCT]
    text = f" {' '.join(other)} "
    return sum(f" {' '.join(passage)} " in text for passage in telling), len(telling)


def _holds_known_passages(words: list[str]) -> bool:
    known = set(WIKITEXT2_TEST_PASSAGES.split())
    starts = range(len(words) - PASSAGE_WORDS + 1)
    passages = (" ".join(words[start : start + PASSAGE_WORDS]).encode() for start in starts)
    return any(hashlib.sha256(passage).hexdigest()[:16] in known for passage in passages)


def _is_wikitext2_test(path: Path) -> bool:
    if path.stat().st_size != WIKITEXT2_TEST_BYTES:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == WIKITEXT2_TEST_SHA256
