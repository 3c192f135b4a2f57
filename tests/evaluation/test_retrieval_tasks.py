"""The retrieval tasks in lm-eval: questions, judgement, and a score through the whole harness."""

import pytest


pytest.importorskip("lm_eval")


from egmla.evaluation.local_tasks import EGMLATaskManager


def test_the_group_loads_and_asks_the_same_questions(lm_eval_reads_once):
    loaded = EGMLATaskManager().load(["egmla_retrieval"])["tasks"]
    assert set(loaded) == {f"egmla_retrieval_{length}" for length in (512, 2048, 8192)}
    for name, task in loaded.items():
        documents = list(task.test_docs())
        length = int(name.rpartition("_")[2])
        assert len(documents) == 48
        for document in documents:
            assert 3.2 * length < len(document["context"]) <= 4 * length
            text = task.doc_to_text(document)
            assert text.endswith(document["prompt"])
            assert f"{document['prompt']} {document['answer']}." in document["context"]
            assert task.process_results(document, [f" {document['answer']}, and so on"]) == {"acc": 1.0}
            assert task.process_results(document, [" something else"]) == {"acc": 0.0}


def test_a_score_through_the_harness(lm_eval_reads_once):
    from lm_eval import simple_evaluate
    from lm_eval.models.dummy import DummyLM

    results = simple_evaluate(
        model=DummyLM(), tasks=["egmla_retrieval_512"], task_manager=EGMLATaskManager(), limit=4, bootstrap_iters=0
    )
    assert results["results"]["egmla_retrieval_512"]["acc,none"] == 0
    assert [sample["target"] for sample in results["samples"]["egmla_retrieval_512"]] == [
        sample["doc"]["answer"] for sample in results["samples"]["egmla_retrieval_512"]
    ]
