"""Retrieval from the context: passages, the judgement of answers, and models that do and do not remember."""

from types import SimpleNamespace

import pytest
import torch
from shapes import CharacterTokenizer

from egmla.samples import sample_text
from egmla.utils.retrieval import FORMS, Question, make_passages, measure_retrieval, summarise, wilson_interval


TEXT = "".join(character if character.isascii() else "'" for character in sample_text("evaluation"))


class Tokenizer(CharacterTokenizer):
    """One token per character, that is its code."""

    def __call__(self, text, **options):
        ids = [ord(character) for character in text]
        return {"input_ids": torch.tensor([ids]) if options.get("return_tensors") else ids}

    def decode(self, ids):
        return "".join(map(chr, ids))


class Induction:
    """A model that continues as the text did after the longest earlier match, in the last `memory` tokens it read."""

    device = torch.device("cpu")

    def __init__(self, memory: int):
        self.memory = memory

    def __call__(self, ids, past_key_values, **options):
        past_key_values.extend(ids[0].tolist())
        text = "".join(map(chr, past_key_values[-self.memory :]))
        for length in range(min(60, len(text) - 1), 0, -1):
            place = text.rfind(text[-length:], 0, len(text) - 1)
            if place >= 0:
                break
        logits = torch.zeros(1, 1, 128)
        logits[0, 0, ord(text[place + length])] = 1
        return SimpleNamespace(logits=logits)


def test_passages_hold_their_facts_once_and_are_of_the_length_asked_for():
    passages = make_passages(TEXT, 2000, passages=3, questions=6, count_tokens=len)
    for passage in passages:
        assert 1000 < len(passage.context) <= 2000
        assert {question.form for question in passage.questions} == set(FORMS)
        depths = [passage.context.index(question.prompt) / len(passage.context) for question in passage.questions]
        assert depths == sorted(depths)
        for question in passage.questions:
            assert passage.context.count(f"{question.prompt} {question.answer}.\n") == 1
            assert passage.context.count(question.prompt) == 1
    assert passages == make_passages(TEXT, 2000, passages=3, questions=6, count_tokens=len)
    assert passages != make_passages(TEXT, 2000, passages=3, questions=6, count_tokens=len, seed=1)


def test_a_model_that_remembers_finds_all_and_one_that_forgets_none_but_the_last():
    passages = make_passages(TEXT, 1500, passages=2, questions=5, count_tokens=len)
    seen = []
    hits = measure_retrieval(
        Induction(5000), Tokenizer(), passages, list, chunk=400, progress=lambda *state: seen.append(state)
    )
    assert hits == [True] * 10
    assert seen[-1] == (10, 10)
    forgetful = measure_retrieval(Induction(250), Tokenizer(), passages, list, chunk=400)
    assert not any(forgetful[0:4]) and not any(forgetful[5:9])
    report = summarise(passages, hits)
    assert (report["share"], report["hits"], report["questions"]) == (1.0, 10, 10)
    assert set(report["by_form"].values()) == {1.0}
    assert 0 < report["chance"] < 0.03


@pytest.mark.parametrize(
    ("continuation", "hit"),
    [(" 3824.", True), ("3824", True), (" 38241", False), (" 382", False), (" the 3824", False)],
)
def test_a_hit_is_the_whole_answer_first(continuation, hit):
    assert Question("The secret code for Harbor is", "3824", "code", 0.5).is_hit(continuation) is hit


def test_interval_by_hand():
    # Wilson 1927 for 8 of 10 at z = 2: centre (0.8 + 0.2) / 1.4, half sqrt(0.8 * 0.2 / 10 + 1 / 100) * 2 / 1.4.
    low, high = wilson_interval(8, 10, z=2.0)
    assert (low + high) / 2 == pytest.approx(1 / 1.4)
    assert (high - low) / 2 == pytest.approx(2 / 1.4 * 0.026**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 50}, "8 facts alone take"),
        ({"length": 5000, "questions": 0}, "give at least 1 of each"),
        ({"length": 5000, "questions": 21}, "at most 20 facts"),
        ({"length": 5000, "text": "\n \n"}, "no line that is not empty"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_passages(**{"text": TEXT, **arguments})
