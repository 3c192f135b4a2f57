"""Exports in the layout deepseek_v3, served by vLLM without our model: its own DeepSeek class, or Transformers'."""

import torch
from cases import make_tokenizer, perturb
from serving import assert_served_as_by_transformers, engine, prompts, serve, serve_in_another_process
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from egmla.conversion import Recipe, Refinement, convert_checkpoint


SHAPE = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
LENGTHS = (5, 17, 40, 3)
EXPANDED_PAGES = {"VLLM_MLA_DISABLE": "1"}


def saved_source(folder, config):
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config)
    perturb(source)
    source.save_pretrained(folder)


def deepseek_export(tmp_path, rank: int, rope: int):
    """The export of a small DeepSeek model, as Transformers has it."""
    config = DeepseekV3Config(
        **SHAPE,
        q_lora_rank=None,
        kv_lora_rank=rank,
        qk_nope_head_dim=32 - rope % 32,
        qk_rope_head_dim=rope,
        v_head_dim=12,
        first_k_dense_replace=SHAPE["num_hidden_layers"],
    )
    saved_source(tmp_path / "source", config)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "export", exact=True, layout="deepseek_v3")
    assert "serving" not in report
    return AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()


def test_latents_in_deepseeks_own_widths(tmp_path):
    """Custom operators are off: vLLM 0.32's rotation on CPUs is wrong for its own DeepSeek class."""
    model, given = deepseek_export(tmp_path, 512, 64), prompts(*LENGTHS)
    with engine(tmp_path / "export", compilation_config={"custom_ops": ["none"]}) as served:
        results = serve(served, given)
        specs = [
            layer.get_kv_cache_spec(served.llm_engine.vllm_config)
            for layer in served.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        ]
    assert [spec.page_size_bytes // spec.block_size for spec in specs] == [4 * (512 + 64)] * 2
    assert_served_as_by_transformers(model, given, results)


def test_other_widths_with_expanded_pages(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    model, given = deepseek_export(tmp_path, 24, 8), prompts(*LENGTHS)
    with engine(tmp_path / "export", compilation_config={"custom_ops": ["none"]}) as served:
        results = serve(served, given)
    assert_served_as_by_transformers(model, given, results)


def test_biases_are_served_by_the_flag_that_the_report_names(tmp_path):
    """Every calibrated export has biases, which vLLM's own class drops silently."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n) for n in range(3000)), encoding="utf-8")
    saved_source(tmp_path / "source", LlamaConfig(**SHAPE, head_dim=32, num_key_value_heads=2))
    make_tokenizer().save_pretrained(tmp_path / "source")
    report = convert_checkpoint(
        tmp_path / "source",
        tmp_path / "export",
        layout="deepseek_v3",
        kv_lora_rank=32,
        qk_rope_head_dim=32,
        recipe=Recipe(slots="uniform", freqfold=1, latent_norm=True),
        refinement=Refinement(steps=0),
        calibration=text,
        calibration_tokens=2048,
    )
    assert "--model-impl transformers" in report["serving"]
    model, given = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval(), prompts(*LENGTHS)
    (results,) = serve_in_another_process(
        tmp_path, [tmp_path / "export"], given, EXPANDED_PAGES, model_impl="transformers"
    )
    assert_served_as_by_transformers(model, given, results)
