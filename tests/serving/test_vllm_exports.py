"""Exports in DeepSeek's layout: what vLLM makes of them without any flag."""

import json
import shutil

import pytest
from cases import make_tokenizer
from safetensors.torch import load_file, save_file
from serving import assert_served_as_by_transformers, expected, prompts, serve_in_another_process
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


# Rotation by vLLM's own operator for CPUs is wrong for DeepSeek's class in eager mode.
NO_CUSTOM_OPERATORS = {"compilation_config": {"custom_ops": ["none"]}}


def served(folder, tmp_path, **options):
    """The model, prompts, and what vLLM in a process of its own makes of them."""
    model, given = AutoModelForCausalLM.from_pretrained(folder).eval(), prompts(5, 40)
    (results,) = serve_in_another_process(tmp_path, [folder], given, {"VLLM_MLA_DISABLE": "1"}, **options)
    return model, given, results


def test_biases_are_read(export, tmp_path):
    assert_served_as_by_transformers(*served(export, tmp_path))


def in_vllms_own_class(export, folder):
    shutil.copytree(export, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": ["DeepseekV3ForCausalLM"]}))
    return folder


def test_vllms_own_class_would_drop_them(export, tmp_path):
    """If this fails, vLLM reads biases now, and exports may name DeepSeek's class again."""
    folder = in_vllms_own_class(export, tmp_path / "own")
    model, given, results = served(folder, tmp_path, **NO_CUSTOM_OPERATORS)
    for ids, (tokens, logprobs, _) in zip(given, results, strict=True):
        assert float((logprobs - expected(model, ids, len(tokens))[1]).abs().max()) > 0.1


def test_vllms_own_class_serves_exports_without_biases(export, tmp_path):
    folder = in_vllms_own_class(export, tmp_path / "own")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_served_as_by_transformers(*served(folder, tmp_path, **NO_CUSTOM_OPERATORS))
