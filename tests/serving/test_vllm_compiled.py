"""vLLM compiles the model by default (`enforce_eager=False`): the ids that Transformers has."""

import pytest
from cases import EXPERTS
from serving import assert_served_as_by_transformers, engine, prompts, saved_model, serve


@pytest.mark.parametrize(
    ("case", "fields", "backend"),
    [
        ("table-gate", EXPERTS, "inductor"),
        ("rank-per-layer", {}, "eager"),
        ("no-rope", {}, "eager"),
        ("encoder, normed queries", {}, "eager"),
    ],
)
def test_compiled(case, fields, backend, tmp_path, monkeypatch):
    """One graph for all batches, by vLLM's own compiler; others are captured only, as compiling takes a minute."""
    from vllm.compilation.counter import compilation_counter

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "compiled"))
    if backend == "eager":
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    model, given = saved_model(tmp_path, case, **fields), prompts(5, 17, 40, 3)
    before = compilation_counter.num_models_seen
    with engine(tmp_path, enforce_eager=False) as served:
        results = serve(served, given)
        assert served.llm_engine.vllm_config.compilation_config.backend == backend
    assert compilation_counter.num_models_seen == before + 1
    assert_served_as_by_transformers(model, given, results)
