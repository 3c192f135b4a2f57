"""Packed text: documents, data sets, sequences held out, evaluation text in the training data."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from egmla.training.data import (
    PackedDataset,
    TextSource,
    check_apart,
    packed_sequences,
    passages_in_common,
    read_sequences,
    write_sequences,
)


def letters(begin: bool = False, end: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters: a is 3, b is 4, ...; <end> is 1, <begin> 2."""
    vocabulary = {"<unk>": 0, "<end>": 1, "<begin>": 2}
    vocabulary |= {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 2)])
    tokens = {"bos_token": "<begin>"} | ({"eos_token": "<end>"} if end else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **tokens)


def rows(source: TextSource, tokenizer, length: int) -> list[list[int]]:
    return [ids.tolist() for ids in packed_sequences(source, tokenizer, length)]


def test_documents_are_packed_with_an_end_between_them(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a b c"}\n\n{"text": "d", "id": 4}\n{"text": "e f g h"}\n')
    source = TextSource(str(file))
    assert rows(source, letters(), 4) == [[3, 4, 5, 1], [6, 1, 7, 8]]  # g, h and an end fill no third one
    assert source.report.documents == 3
    assert source.report.complete
    assert rows(TextSource(str(file)), letters(begin=True), 4) == [[2, 3, 4, 5], [2, 1, 6, 1], [2, 7, 8, 9]]
    assert rows(TextSource(str(file)), letters(end=False), 4) == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_a_text_file_is_one_document_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr("egmla.training.data.PIECE_CHARACTERS", 7)
    file = tmp_path / "text.txt"
    file.write_text("a b\nc d e f g h\ni\n")
    source = TextSource(str(file))
    assert rows(source, letters(), 5) == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 1]]
    assert source.report.documents == 1
    assert len(source.report.sha256) == 64


def test_data_sets_are_streamed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "a b"}\n{"body": "c"}\n')
    source = TextSource(str(folder), text_field="body")
    assert rows(source, letters(), 5) == [[3, 4, 1, 5, 1]]
    assert (source.report.name, source.report.documents) == ("set", 2)
    assert len(source.report.sha256) == 64
    with pytest.raises(ValueError, match="cannot be opened"):
        rows(TextSource(f"{folder}::test"), letters(), 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnonsense\n', "Line 2 of .* is not JSON"),
        ('{"body": "a"}\n', "no text in the field 'text' .it has body"),
        ('["a"]\n', "it has list"),
        (b'{"text": "\xff"}\n', "is not UTF-8 text"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    file = tmp_path / "texts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows(TextSource(str(file)), letters(), 2)


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "a/b/c", "a:b:c:d"])
def test_missing_text_is_named(name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextSource(name)


def test_sources_take_turns_and_what_is_held_out_is_not_trained_on(tmp_path):
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(f"{letter} " * 60)
    sources = [TextSource(str(tmp_path / f"{name}.txt")) for name in "ab"]
    train, held = tmp_path / "train", tmp_path / "held"
    assert write_sequences(sources, letters(), 3, train, 12, held, 0.25, 3) == (12, 3)
    training, evaluation = read_sequences(train, 3), read_sequences(held, 3)
    assert sorted(training[:, 0].tolist()) == [3] * 6 + [4] * 6
    assert evaluation[:, 0].tolist() == [3, 4, 3]  # the first and every fourth of each, three at most
    assert [source.report.complete for source in sources] == [False, False]
    assert sum(source.report.tokens for source in sources) == 3 * (12 + 3)
    item = PackedDataset(training)[0]
    assert item["input_ids"].tolist() == training[0].tolist()
    assert item["labels"].dtype == torch.int64


def test_evaluation_text_in_the_training_data_is_found(tmp_path):
    generator = np.random.default_rng(0)
    training, other = generator.integers(0, 50, (2, 30, 64), dtype=np.int32)
    file = tmp_path / "train.tokens"
    training.tofile(file)
    assert passages_in_common(file, other) == (0, 30)
    check_apart(file, other)
    shifted = training.reshape(-1)[5 : 5 + 10 * 64].reshape(10, 64)  # the same text, cut elsewhere
    assert passages_in_common(file, shifted) == (10, 10)
    with pytest.raises(ValueError, match="10 of 10 passages"):
        check_apart(file, shifted)
