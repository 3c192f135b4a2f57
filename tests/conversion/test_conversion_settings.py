"""Settings of a conversion, and what it inherits from its source's configuration."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, pipeline

from egmla.conversion import ConversionSettings, Recipe, Refinement, convert_checkpoint


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("asked", [None, *DTYPES])
@pytest.mark.parametrize("configured", [None, *DTYPES])
@pytest.mark.parametrize("stored", DTYPES)
def test_a_conversion_loads_in_the_dtype_of_its_source(llama_folder, tmp_path, stored, configured, asked):
    source = shutil.copytree(llama_folder, tmp_path / "source")
    tensors = {name: tensor.to(DTYPES[stored]) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps(config | ({"dtype": configured} if configured else {})))
    report = convert_checkpoint(source, tmp_path / "t", exact=True, dtype=asked)
    expected = AutoModelForCausalLM.from_pretrained(source).dtype if asked is None else DTYPES[asked]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t").dtype == expected
    # The file keeps what the source stores, unless another dtype is asked for.
    written = {tensor.dtype for tensor in load_file(tmp_path / "t/model.safetensors").values()}
    assert written == {DTYPES[asked or stored]} and report["dtype"] == (asked or stored)


def test_settings_and_options_are_the_same(llama_folder, tmp_path):
    by_settings = convert_checkpoint(llama_folder, tmp_path / "t", ConversionSettings(exact=True, dry_run=True))
    assert by_settings == convert_checkpoint(llama_folder, tmp_path / "t", exact=True, dry_run=True)
    changed = convert_checkpoint(
        llama_folder, tmp_path / "t", ConversionSettings(exact=True), dry_run=True, dtype="bfloat16"
    )
    assert changed["settings"]["dtype"] == "bfloat16" and not (tmp_path / "t").exists()


def test_unknown_options_are_refused(llama_folder, tmp_path):
    with pytest.raises(TypeError, match=r"convert_checkpoint has no option rank; it has exact, kv_lora_rank, "):
        convert_checkpoint(llama_folder, tmp_path / "t", rank=3)


def test_a_folder_is_no_calibration_text(llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"Calibration text .* is a folder, .* give a plain text file"):
        convert_checkpoint(llama_folder, tmp_path / "t", cache=0.5, calibration=tmp_path)


def test_exports_rotate_neighbours(llama_folder, calibration, tmp_path):
    """Engines that know DeepSeek's class assume neighbours; the logits are those of halves."""
    source = shutil.copytree(llama_folder, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    options = {
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "recipe": Recipe(slots="uniform", freqfold=2, latent_norm=True),
        "refinement": Refinement(steps=0),
        "calibration": calibration,
        "calibration_tokens": 2048,
    }
    report = convert_checkpoint(source, tmp_path / "export", layout="deepseek_v3", **options)
    assert "config.json names TransformersForCausalLM" in report["serving"]
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architectures"] == [
        "TransformersForCausalLM"
    ]
    # Transformers goes by the type of the model.
    written = pipeline("text-generation", model=str(tmp_path / "export"))
    assert type(written.model) is DeepseekV3ForCausalLM and written("abc", max_new_tokens=3)[0]["generated_text"]
    own_report = convert_checkpoint(source, tmp_path / "own", **options)
    assert "serving" not in own_report
    assert "smaller by its rank" in own_report["rank"]
    assert "rank" not in convert_checkpoint(source, tmp_path / "exact", exact=True, dry_run=True)
    assert "rank" not in convert_checkpoint(source, tmp_path / "bits", cache=0.5, dry_run=True)
    export, own = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("export", "own"))
    assert export.config.rope_interleave and not own.config.rope_interleave
    ids = torch.randint(2, 128, (1, 60))
    with torch.no_grad():
        assert (export(ids).logits - own(ids).logits).abs().max() < 1e-4
    halves = own.state_dict()["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][-8:]
    neighbours = export.state_dict()["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][-8:]
    assert torch.equal(neighbours, halves[[0, 4, 1, 5, 2, 6, 3, 7]])
