"""Exports in DeepSeek's layout: what vLLM makes of them without any flag."""

import json

import pytest
from cases import make_tokenizer
from serving import expected, prompts, serve_in_another_process
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from egmla.conversion import Recipe, Refinement, convert_checkpoint


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A converted Llama: means of its features went into biases."""
    folder = tmp_path_factory.mktemp("export")
    widths = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    config = LlamaConfig(head_dim=32, initializer_range=0.25, **widths, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    make_tokenizer().save_pretrained(folder / "source")
    words = ["abcd", "efgh", "ijkl", "mnop", "qrst"]
    (folder / "text.txt").write_text(" ".join(words[n * n % 5] for n in range(3000)))
    convert_checkpoint(
        folder / "source",
        folder / "export",
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        recipe=Recipe(slots="uniform", freqfold=2, latent_norm=True),
        refinement=Refinement(steps=0),
        calibration=folder / "text.txt",
        calibration_tokens=2048,
        layout="deepseek_v3",
    )
    return folder / "export"


def test_biases_are_read(export, tmp_path):
    model, given = AutoModelForCausalLM.from_pretrained(export).eval(), prompts(5, 17, 40)
    assert model.model.layers[0].self_attn.kv_a_proj_with_mqa.bias.abs().max() > 0.01
    (results,) = serve_in_another_process(tmp_path, [export], given, {"VLLM_MLA_DISABLE": "1"})
    for ids, (tokens, logprobs, _) in zip(given, results, strict=True):
        right, right_logprobs = expected(model, ids, len(tokens))
        assert tokens == right
        assert float((logprobs - right_logprobs).abs().max()) <= 1e-4


def test_vllms_own_class_would_not(export, tmp_path):
    """If this fails, vLLM reads biases now, and exports may name DeepSeek's class again."""
    settings = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**settings, "architectures": ["DeepseekV3ForCausalLM"]}))
    model, given = AutoModelForCausalLM.from_pretrained(export).eval(), prompts(40)
    (results,) = serve_in_another_process(tmp_path, [export], given, {"VLLM_MLA_DISABLE": "1"})
    (export / "config.json").write_text(json.dumps(settings))
    _, right_logprobs = expected(model, given[0], len(results[0][0]))
    assert float((results[0][1] - right_logprobs).abs().max()) > 0.1
