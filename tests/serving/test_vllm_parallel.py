"""Tensor parallelism on two processes: heads are split, latents are held by both."""

import pytest
from serving import assert_served_as_by_transformers, prompts, saved_model, serve_in_another_process


@pytest.mark.parametrize("case", ["rank-per-layer", "encoder, normed queries"])
def test_two_processes(case, tmp_path):
    model, given = saved_model(tmp_path, case), prompts(5, 17, 40)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    (results,) = serve_in_another_process(tmp_path, [tmp_path], given, {"MASTER_ADDR": "127.0.0.1"}, **options)
    assert_served_as_by_transformers(model, given, results)
