"""Retrieval from the context: facts hidden in a text, asked for after it. A small cache loses these first.

Perplexity hardly notices when a model no longer finds what stands in its context, so both are measured side by side.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .reading import read_in_chunks, write_greedily


PLACES = (
    *("Harbor", "Meadow", "Castle", "Valley", "Orchard", "Lantern", "Bridge", "Canyon", "Garden", "Temple"),
    *("Market", "Island", "Forest", "Tunnel", "Palace", "Museum", "Desert", "Lagoon", "Summit", "Village"),
)
NAMES = (
    *("Albert", "Bridget", "Clement", "Dorothy", "Edmund", "Florence", "Gilbert", "Harriet", "Ignatius", "Josephine"),
    *("Konrad", "Lucinda", "Matthew", "Nicolette", "Oswald", "Penelope", "Quentin", "Rosalind"),
    *("Sebastian", "Theodora"),
)
WORDS = (
    *("anchor", "basket", "candle", "dragon", "engine", "feather", "guitar", "hammer", "insect", "jacket", "kettle"),
    *("ladder", "magnet", "needle", "orange", "pepper", "quartz", "ribbon", "saddle", "ticket", "umbrella", "violin"),
)
# Without a tokenizer: characters of English text in a token.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class NeedleForm:
    """A kind of hidden fact.

    Attributes:
        sentence (`str`): the beginning of the fact, with `{subject}`; the answer and a full stop follow it.
        subjects (`tuple[str, ...]`): what facts are about; each occurs once in a passage.
        digits (`int`): decimal digits of the answer, 0 for a word of `WORDS`.
    """

    sentence: str
    subjects: tuple[str, ...]
    digits: int

    @property
    def chance(self) -> float:
        """Share of hits of a guess among all answers of this form."""
        return 1 / (9 * 10 ** (self.digits - 1) if self.digits else len(WORDS))

    def answer(self, generator: random.Random) -> str:
        """Draw an answer."""
        if self.digits:
            return str(generator.randrange(10 ** (self.digits - 1), 10**self.digits))
        return generator.choice(WORDS)


FORMS = {
    "code": NeedleForm("The secret code for {subject} is", PLACES, 4),
    "locker": NeedleForm("{subject} left the key in locker number", NAMES, 3),
    "password": NeedleForm("The password of {subject} is the word", NAMES, 0),
}


@dataclass(frozen=True)
class Question:
    """A fact hidden in a passage, as it is asked for.

    Attributes:
        prompt (`str`): the beginning of the fact, which the model is to continue.
        answer (`str`): what has to follow, after one space.
        form (`str`): a key of `FORMS`.
        depth (`float`): where in the passage the fact stands, from 0 (beginning) to 1 (end).
    """

    prompt: str
    answer: str
    form: str
    depth: float

    def is_hit(self, continuation: str) -> bool:
        """Whether a continuation begins with the answer, and with nothing longer."""
        text = continuation.lstrip()
        return text.startswith(self.answer) and not text[len(self.answer) : len(self.answer) + 1].isalnum()


@dataclass(frozen=True)
class Passage:
    """A text with facts hidden in it, and the questions about them."""

    context: str
    questions: tuple[Question, ...]


def make_passages(
    text: str,
    length: int,
    passages: int = 6,
    questions: int = 8,
    seed: int = 0,
    count_tokens: Callable[[str], int] | None = None,
) -> list[Passage]:
    """Make passages of running text with facts hidden at even depths, the forms one after another.

    Args:
        text (`str`): running text to hide facts in, paragraphs on lines, such as the evaluation sample.
        length (`int`): tokens of a passage, reached within a paragraph.
        passages (`int`): how many.
        questions (`int`): facts in each.
        seed (`int`): of everything that is drawn; the same seed gives the same passages.
        count_tokens (`Callable`, *optional*): tokens of a string; by default a token is four characters.

    Raises:
        ValueError: for a text without a line, a length that the facts alone exceed, or fewer than one passage or
            question.
    """
    if passages < 1 or questions < 1:
        raise ValueError(f"passages={passages}, questions={questions}: give at least 1 of each.")
    most = min(len(form.subjects) for form in FORMS.values())
    if questions > most:
        raise ValueError(f"questions={questions}: a passage holds at most {most} facts; ask for more passages.")
    count = count_tokens or (lambda string: math.ceil(len(string) / CHARACTERS_PER_TOKEN))
    paragraphs = [line for line in text.splitlines() if line.strip()]
    if not paragraphs:
        raise ValueError("text has no line that is not empty: give running text to hide the facts in.")
    sizes = [count(paragraph + "\n") for paragraph in paragraphs]
    generator = random.Random(seed)
    made = []
    for _ in range(passages):
        needles = _draw_needles(questions, generator)
        room = length - sum(count(sentence + "\n") for sentence, _ in needles)
        if room < 0:
            raise ValueError(
                f"length={length}: {questions} facts alone take {length - room} tokens; give a longer length or fewer "
                "questions."
            )
        made.append(_hide(needles, _running_text(paragraphs, sizes, room, generator)))
    return made


def token_counter(tokenizer) -> Callable[[str], int]:
    """Return a function that counts a tokenizer's tokens of a string, for `make_passages`."""
    return lambda string: len(tokenizer(string, add_special_tokens=False)["input_ids"])


def _draw_needles(questions: int, generator: random.Random) -> list[tuple[str, Question]]:
    names = list(FORMS)
    subjects = {name: generator.sample(FORMS[name].subjects, questions) for name in names}
    needles = []
    for number in range(questions):
        name = names[number % len(names)]
        prompt = FORMS[name].sentence.format(subject=subjects[name][number])
        needles.append((prompt, FORMS[name].answer(generator), name))
    generator.shuffle(needles)
    return [
        (f"{prompt} {answer}.", Question(prompt, answer, name, (number + 0.5) / questions))
        for number, (prompt, answer, name) in enumerate(needles)
    ]


def _running_text(paragraphs: Sequence[str], sizes: Sequence[int], room: int, generator: random.Random) -> list[str]:
    """Paragraphs from a random place on, as many as fit into `room` tokens; the text starts over at its end."""
    position, chosen, used = generator.randrange(len(paragraphs)), [], 0
    for _ in range(len(paragraphs) * (1 + room // max(1, sum(sizes)))):
        size = sizes[position % len(paragraphs)]
        if used + size <= room:
            chosen.append(paragraphs[position % len(paragraphs)])
            used += size
        position += 1
    return chosen


def _hide(needles: Sequence[tuple[str, Question]], paragraphs: Sequence[str]) -> Passage:
    lines, total = [], len(paragraphs)
    for number, (sentence, _) in enumerate(needles):
        start, end = number * total // len(needles), (number + 1) * total // len(needles)
        middle = (start + end) // 2
        lines += [*paragraphs[start:middle], sentence, *paragraphs[middle:end]]
    return Passage("\n".join(lines) + "\n", tuple(question for _, question in needles))


@torch.no_grad()
def measure_retrieval(
    model,
    tokenizer,
    passages: Sequence[Passage],
    make_cache: Callable[[], Any],
    chunk: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> list[bool]:
    """Ask every question after its passage, read once into a cache, and continue it greedily.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        passages (`Sequence[Passage]`): of `make_passages`.
        make_cache (`Callable`): makes the empty cache that is measured; each question gets a copy of the filled one.
        chunk (`int`): tokens of a passage that are read at a time.
        progress (`Callable`, *optional*): called with (questions done, questions in all).

    Returns:
        `list[bool]`: hits, all questions of the passages in order.
    """
    hits: list[bool] = []
    total = sum(len(passage.questions) for passage in passages)
    for passage in passages:
        context = tokenizer(passage.context, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
        filled = make_cache()
        read_in_chunks(model, context, filled, chunk)
        for question in passage.questions:
            hits.append(ask(model, tokenizer, copy.deepcopy(filled), question))
            if progress is not None:
                progress(len(hits), total)
    return hits


@torch.no_grad()
def ask(model, tokenizer, cache, question: Question) -> bool:
    """Ask a question behind what a cache holds, which takes it in; return whether the answer is right."""
    return question.is_hit(_continue(model, tokenizer, cache, question))


def _continue(model, tokenizer, cache, question: Question) -> str:
    """Text that a model continues a question with, as many tokens as the answer has, and one more."""
    ids = tokenizer(question.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    steps = len(tokenizer(f" {question.answer}.", add_special_tokens=False)["input_ids"])
    return tokenizer.decode(write_greedily(model, ids, cache, steps))


def wilson_interval(hits: int, questions: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of hits, 95 % by default.

    Raises:
        ValueError: without questions.
    """
    if questions < 1:
        raise ValueError(f"questions={questions}: an interval needs at least one question.")
    share, weight = hits / questions, z**2 / questions
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / questions + weight / (4 * questions))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(passages: Sequence[Passage], hits: Sequence[bool]) -> dict[str, Any]:
    """Share of hits with its interval, the chance level, and shares by form and by depth, for reports."""
    questions = [question for passage in passages for question in passage.questions]

    def share(chosen: list[bool]) -> float | None:
        return sum(chosen) / len(chosen) if chosen else None

    thirds = ("beginning", "middle", "end")
    return {
        "questions": len(questions),
        "hits": sum(hits),
        "share": share(list(hits)),
        "interval": list(wilson_interval(sum(hits), len(questions))),
        "chance": sum(FORMS[question.form].chance for question in questions) / len(questions),
        "by_form": {
            name: share([hit for question, hit in zip(questions, hits, strict=True) if question.form == name])
            for name in FORMS
        },
        "by_depth": {
            name: share(
                [hit for question, hit in zip(questions, hits, strict=True) if int(3 * question.depth) == number]
            )
            for number, name in enumerate(thirds)
        },
    }
