"""EG-MLA checkpoints whose gates are trained: their channels get bits, and the function stays to the last place."""

import json

import pytest
import torch
from cases import difference, make_tokenizer, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from egmla import EGMLACache, EGMLAForCausalLM
from egmla.conversion import convert_checkpoint
from egmla.model_cards import write_card


CASES = [
    "input-gate",
    "table-gate",
    "query-low-rank",
    "biases",
    "no-latent-norm",
    "rank-per-layer",
    "rope-slots",
    "rope-slots-per-layer",
    "encoder, normed queries",
    "encoder of one group",
]


def gated_model(case: str, **options) -> EGMLAForCausalLM:
    """A random model whose gates differ from 1, and from channel to channel."""
    model = tiny_model(case, vocab_size=128, **options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "kv_gate_norm" in name or "layernorm.weight" in name:
            nn.init.normal_(parameter, 1.0, 0.4, generator=generator)
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def options(calibration):
    return {"calibration": calibration, "calibration_tokens": 1024, "shipped_text": False}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_channels_change_places_with_their_gates(case, options, tmp_path):
    model = gated_model(case)
    report = convert_checkpoint(saved(model, tmp_path / "source"), tmp_path / "target", cache=0.4, **options)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    ids = token_ids(2, 30)
    expected = model(ids, use_cache=False).logits
    assert difference(converted(ids, use_cache=False).logits, expected) < 2e-5 * expected.abs().max()
    moved = converted.state_dict()
    gates = [name for name in moved if "kv_gate_norm.weight" in name]
    for name in gates:
        before, after = model.state_dict()[name], moved[name]
        assert torch.equal(before.sort().values, after.sort().values)
    assert any(not torch.equal(model.state_dict()[name], moved[name]) for name in gates)
    # Nothing but the places and the allocation: a gate, an embedding, a norm have their shapes and numbers.
    assert moved.keys() == model.state_dict().keys()
    assert converted.config.kv_gate == "latent"
    assert converted.config.kv_gate_embedding_dim == model.config.kv_gate_embedding_dim
    assert 0.3 < report["cache"]["budgets"][0]["shares"]["32768"] <= 0.4


@torch.no_grad()
def test_important_channels_come_first(options, tmp_path):
    """A channel that the gate closes gets no bits."""
    model = gated_model("no-latent-norm")
    closed = [3, 11, 20]
    for layer in model.model.layers:
        layer.self_attn.kv_gate_norm.weight[closed] = 0
        layer.self_attn.kv_gate_norm.bias[closed] = 0
    convert_checkpoint(saved(model, tmp_path / "source"), tmp_path / "target", cache=0.4, **options)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    for layer, bits in zip(converted.model.layers, converted.config.bit_allocation().layers, strict=True):
        assert not layer.self_attn.kv_gate_norm.weight[-3:].any()
        assert bits.latent_channels <= 21


@torch.no_grad()
def test_it_generates_from_its_cache_and_has_a_card(options, tmp_path):
    model = gated_model("table-gate").to(torch.bfloat16)
    convert_checkpoint(saved(model, tmp_path / "source"), tmp_path / "target", cache=0.5, **options)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    assert converted.dtype == torch.bfloat16
    out = converted.generate(
        token_ids(2, 140), max_new_tokens=4, do_sample=False, use_cache=True, return_dict_in_generate=True
    )
    assert type(out.past_key_values) is EGMLACache and out.past_key_values.layers[0].groups
    assert write_card(tmp_path / "target", license="apache-2.0", base_model="someone/gated")
    assert "gives each channel bits by importance" in (tmp_path / "target" / "README.md").read_text()


def test_an_interrupted_conversion_goes_on(options, tmp_path):
    source = saved(gated_model("input-gate"), tmp_path / "source")

    def stop(stage, done, total):
        if stage == "convert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "target", cache=0.4, progress=stop, **options)
    convert_checkpoint(source, tmp_path / "target", cache=0.4, **options)
    convert_checkpoint(source, tmp_path / "whole", cache=0.4, **options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("target", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "asked", [{"kv_lora_rank": 12}, {"exact": True}, {"cache": 0.5, "cache_dtype": "bf16"}], ids=str
)
def test_another_latent_is_refused(options, tmp_path, asked):
    source = saved(gated_model("input-gate"), tmp_path / "source")
    given = {} if "exact" in asked else options
    with pytest.raises(
        ValueError, match=r"gate of layer 0 of .* is trained \(.*kv_gate_norm.* is not [01]\).*cache=0.25 alone"
    ):
        convert_checkpoint(source, tmp_path / "target", **asked, **given)
    assert not (tmp_path / "target").exists()


def test_normed_rotary_keys_are_refused(options, tmp_path):
    source = saved(gated_model("post-norm"), tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"trained gates and normed rotary keys \(qk_norm_dim=8\).*quantization='int4'"
    ):
        convert_checkpoint(source, tmp_path / "target", cache=0.4, **options)


def test_a_gate_on_expanded_keys_is_refused(options, tmp_path):
    source = saved(gated_model("expanded gate"), tmp_path / "source")
    with pytest.raises(ValueError, match=r"kv_gate='(expanded|latent)'"):
        convert_checkpoint(source, tmp_path / "target", cache=0.4, **options)
    config = json.loads((source / "config.json").read_text())
    assert config["kv_gate"] == "expanded"
