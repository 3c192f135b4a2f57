"""vLLM's Transformers backend (`--model-impl transformers`) runs our model too, with keys and values in its pages."""

from serving import assert_served_as_by_transformers, prompts, saved_model, serve_in_another_process


# Each gate, and what vLLM's own class refuses. Its attention on CPUs takes few widths `N + P`; 32 is one.
CASES = ("input-gate", "table-gate", "encoder, normed queries", "rank-per-layer", "expanded gate, tables")
NO_LATENT_PAGES = {"VLLM_MLA_DISABLE": "1"}


def saved_models(tmp_path, cases):
    folders = [tmp_path / str(idx) for idx in range(len(cases))]
    return {
        folder: saved_model(folder, case, qk_nope_head_dim=24) for folder, case in zip(folders, cases, strict=True)
    }


def test_transformers_backend(tmp_path):
    models, given = saved_models(tmp_path, CASES), prompts(5, 17, 40, 3)
    answers = serve_in_another_process(tmp_path, models, given, NO_LATENT_PAGES, model_impl="transformers")
    for model, results in zip(models.values(), answers, strict=True):
        assert_served_as_by_transformers(model, given, results)


def test_compiled_and_without_the_plug_in(tmp_path):
    """The checkpoint's own code, where this package is not installed."""
    models, given = saved_models(tmp_path, ["table-gate"]), prompts(5, 17, 40, 3)
    environment = {**NO_LATENT_PAGES, "VLLM_PLUGINS": "", "VLLM_CPU_CI_ENV": "1", "VLLM_CACHE_ROOT": str(tmp_path)}
    options = {"model_impl": "transformers", "trust_remote_code": True, "enforce_eager": False}
    (results,) = serve_in_another_process(tmp_path, models, given, environment, **options)
    assert_served_as_by_transformers(models[tmp_path / "0"], given, results)
