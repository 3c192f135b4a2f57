"""Texts of a conversion: what cannot be read is said, and calibration is kept apart from evaluation by content."""

import hashlib
import re

import pytest
from cases import make_tokenizer

from egmla.conversion import convert_checkpoint, texts
from egmla.conversion.texts import EvaluationText, check_calibration_text, open_evaluation, read_text
from egmla.samples import sample_text


BOOK = sample_text("evaluation")[:60_000]
OTHER = sample_text("calibration")[:60_000]


def check(tmp_path, calibration: str, evaluation: str | None) -> None:
    path = tmp_path / "calibration.txt"
    path.write_text(calibration)
    given = None if evaluation is None else EvaluationText("evaluation.txt", "", None, evaluation)
    check_calibration_text(path, calibration, given)


@pytest.mark.parametrize(
    ("calibration", "evaluation"),
    [
        (BOOK, BOOK),
        (BOOK.upper().replace("\n", " ").replace(",", " @,@ "), BOOK),
        (OTHER[:9000] + BOOK + OTHER[9000:], BOOK),
        (BOOK[20_000:26_000], BOOK),
        (OTHER + BOOK[:20_000], BOOK),
        ("a text of few words", "A text... of few words!"),
    ],
    ids=["the same", "another layout", "holds it", "part of it", "overlaps", "short"],
)
def test_texts_with_much_in_common_are_refused(tmp_path, calibration, evaluation):
    with pytest.raises(ValueError, match=r"calibration.txt and evaluation text evaluation.txt have text in common"):
        check(tmp_path, calibration, evaluation)


@pytest.mark.parametrize("calibration", [OTHER, OTHER + BOOK[:1500]], ids=["other text", "a quotation"])
def test_texts_apart_are_accepted(tmp_path, calibration):
    check(tmp_path, calibration, BOOK)
    check(tmp_path, calibration, None)


def test_known_evaluation_sets_are_refused(tmp_path, monkeypatch):
    """By a passage, wherever it stands and however it is laid out; by the file's hash."""
    passage = re.findall(r"\w+", BOOK.casefold())[500 : 500 + texts.PASSAGE_WORDS]
    digest = hashlib.sha256(" ".join(passage).encode()).hexdigest()[:16]
    check(tmp_path, BOOK, None)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "WIKITEXT2_TEST_PASSAGES", f"0123456789abcdef {digest}")
        with pytest.raises(ValueError, match=r"calibration.txt is the test split of WikiText-2, or holds passages"):
            check(tmp_path, OTHER + BOOK.replace(" ", "  ").upper(), None)
        check(tmp_path, OTHER, None)
    monkeypatch.setattr(texts, "WIKITEXT2_TEST_BYTES", len(OTHER.encode()))
    monkeypatch.setattr(texts, "WIKITEXT2_TEST_SHA256", hashlib.sha256(OTHER.encode()).hexdigest())
    with pytest.raises(ValueError, match="test split of WikiText-2"):
        check(tmp_path, OTHER, None)


def test_stored_passages_are_digests():
    stored = texts.WIKITEXT2_TEST_PASSAGES.split()
    assert len(stored) == len(set(stored)) == 61
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in stored)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"Calibration text .* is empty"),
        (b" \n\t\n", r"is empty; give a plain text file"),
        (b"\x7fELF\x02\x01\x00\x00", r"is a binary file \(it has zero bytes\)"),
        ("Größe".encode("latin-1"), r"is no UTF-8 text \(invalid start byte at byte 2\); convert it"),
    ],
    ids=["empty", "blank", "binary", "latin-1"],
)
def test_what_is_no_text(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "text", "Calibration")
    with pytest.raises(ValueError, match=r"Evaluation text .* is a folder, and a conversion reads one file"):
        read_text(tmp_path, "Evaluation")
    with pytest.raises(FileNotFoundError, match=r"Evaluation text .* does not exist"):
        read_text(tmp_path / "absent", "Evaluation")


def test_evaluation_takes_the_first_windows(llama_folder, tmp_path):
    from transformers import AutoConfig

    (tmp_path / "text.txt").write_text(BOOK)
    config = AutoConfig.from_pretrained(llama_folder)
    opened = open_evaluation(tmp_path / "text.txt", make_tokenizer(), config, 3)
    assert opened.windows.shape == (3, 256)
    assert BOOK.startswith(opened.text) and 768 <= len(opened.text) < 800  # about a token per character
    assert opened.describe()["file"] == "text.txt"


def test_conversion_refuses_its_evaluation_text(llama_folder, calibration, tmp_path):
    widths = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "calibration": calibration}
    with pytest.raises(ValueError, match=r"calibration.txt and evaluation text calibration.txt have text in common"):
        convert_checkpoint(llama_folder, tmp_path / "t", **widths, evaluate=calibration)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"has 9 tokens and one window needs 256"):
        convert_checkpoint(llama_folder, tmp_path / "t", **widths, evaluate=tmp_path / "short.txt")
    with pytest.raises(ValueError, match=r"evaluation_windows=0: at least 1"):
        convert_checkpoint(llama_folder, tmp_path / "t", **widths, evaluate=calibration, evaluation_windows=0)
    assert not (tmp_path / "t").exists()
