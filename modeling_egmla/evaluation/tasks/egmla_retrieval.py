"""Documents of the retrieval tasks, and how an answer is judged. lm-eval loads this file by path."""

import datasets

from egmla.samples import sample_text
from egmla.utils.retrieval import Question, make_passages


def documents(length: int) -> datasets.DatasetDict:
    """Return 48 questions about 6 passages of about `length` tokens, the same ones at every call."""
    rows = [
        {"context": passage.context, "prompt": question.prompt, "answer": question.answer, "form": question.form}
        for passage in make_passages(sample_text("evaluation"), length)
        for question in passage.questions
    ]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def documents_512(**_) -> datasets.DatasetDict:
    """Return questions about passages of 512 tokens."""
    return documents(512)


def documents_2048(**_) -> datasets.DatasetDict:
    """Return questions about passages of 2,048 tokens."""
    return documents(2048)


def documents_8192(**_) -> datasets.DatasetDict:
    """Return questions about passages of 8,192 tokens."""
    return documents(8192)


def process_results(document: dict, results: list[str]) -> dict[str, float]:
    """Return `acc` 1 for a continuation that begins with the answer, else 0."""
    question = Question(document["prompt"], document["answer"], document["form"], 0.0)
    return {"acc": float(question.is_hit(results[0]))}
