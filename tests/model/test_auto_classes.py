"""Saving and loading through Transformers' Auto classes, with the package installed."""

import json

import pytest
import torch
from cases import CODE_FILES, tiny_config, tiny_model, token_ids
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from egmla import (
    EGMLAConfig,
    EGMLAForCausalLM,
    EGMLAForSequenceClassification,
    EGMLAForTokenClassification,
    EGMLAModel,
)


CLASSES = {
    "trunk": (AutoModel, EGMLAModel),
    "language model": (AutoModelForCausalLM, EGMLAForCausalLM),
    "sequence classifier": (AutoModelForSequenceClassification, EGMLAForSequenceClassification),
    "token classifier": (AutoModelForTokenClassification, EGMLAForTokenClassification),
}
FULL_AUTO_MAP = {
    "AutoConfig": "configuration_egmla.EGMLAConfig",
    "AutoModel": "modeling_egmla.EGMLAModel",
    "AutoModelForCausalLM": "modeling_egmla.EGMLAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_egmla.EGMLAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_egmla.EGMLAForTokenClassification",
}


def stored_tensors(folder) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                assert name not in tensors, f"{name} is in two shards"
                tensors[name] = file.get_tensor(name)
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("kind", list(CLASSES))
def test_round_trip(case, kind, tmp_path):
    auto_class, model_class = CLASSES[kind]
    model, ids = tiny_model(case, model_class), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and type(loaded.config) is EGMLAConfig
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", list(CLASSES))
def test_every_class_saves_the_full_auto_map_and_its_code(kind, tmp_path):
    """Engines look for `AutoModel` in a language model's map; the heads for each other's."""
    tiny_model(model_class=CLASSES[kind][1]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == FULL_AUTO_MAP
    assert saved["architectures"] == [CLASSES[kind][1].__name__]
    assert {path.name for path in tmp_path.glob("*.py")} == CODE_FILES
    for reference in FULL_AUTO_MAP.values():
        module, _, name = reference.partition(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


@torch.no_grad()
@pytest.mark.parametrize("kind", list(CLASSES))
def test_language_model_checkpoint_loads_as_any_class(kind, tmp_path):
    """The trunk's weights are found under the language model's names."""
    auto_class, model_class = CLASSES[kind]
    model, ids = tiny_model("table-gate"), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    trunk = loaded if model_class is EGMLAModel else loaded.model
    assert torch.equal(trunk(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_config_round_trip(case, tmp_path):
    """Through JSON and a folder, nothing is lost, derived widths included."""
    config = tiny_config(case)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is EGMLAConfig
    left, right = config.to_dict(), loaded.to_dict()
    for transient in ("architectures", "_name_or_path", "auto_map"):
        left.pop(transient, None), right.pop(transient, None)
    assert left == right
    assert loaded.layer_kv_lora_ranks == config.layer_kv_lora_ranks
    assert (loaded.head_dim, loaded.qk_head_dim) == (config.head_dim, config.qk_head_dim)
    assert EGMLAConfig(**json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_overrides_are_followed_and_checked(tmp_path):
    """`from_pretrained(..., field=value)` sets fields after construction: widths follow, bad values are refused."""
    tiny_config().save_pretrained(tmp_path)
    config = EGMLAConfig.from_pretrained(tmp_path, qk_nope_head_dim=6, qk_rope_head_dim=4)
    assert (config.head_dim, config.qk_head_dim) == (4, 10)
    EGMLAForCausalLM(config)(torch.tensor([[1, 2, 3]]))
    for field, value in {"kv_gate": "latnet", "kv_lora_rank": 0}.items():
        with pytest.raises(ValueError, match=f"{field}="):
            EGMLAForCausalLM(EGMLAConfig.from_pretrained(tmp_path, **{field: value}))


def test_derived_widths_follow_an_edited_config():
    """`head_dim` and `qk_head_dim` in a saved config do not win over the fields they derive from."""
    saved = json.loads(tiny_config().to_json_string(use_diff=False))
    saved.update(qk_rope_head_dim=4)
    edited = EGMLAConfig(**saved)
    assert (edited.head_dim, edited.qk_head_dim) == (4, 12)


def test_auto_classes_from_a_config(case):
    for auto_class, model_class in CLASSES.values():
        assert type(auto_class.from_config(tiny_config(case))) is model_class


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_save(tied, tmp_path):
    """Several safetensors files and their index; a tied head is stored once, as the embedding."""
    model, ids = tiny_model(tie_word_embeddings=tied), token_ids(2, 7)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    stored = stored_tensors(tmp_path)
    assert "model.embed_tokens.weight" in stored and ("lm_head.weight" in stored) is not tied
    assert stored.keys() | ({"lm_head.weight"} if tied else set()) == model.state_dict().keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    same = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert same is tied


@torch.no_grad()
def test_one_file_holds_exactly_the_weights(case, tmp_path):
    """No buffer of the rotary tables or slots is stored: they follow from the config."""
    model = tiny_model(case)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    stored = stored_tensors(tmp_path)
    parameters = dict(model.named_parameters())
    assert stored.keys() == parameters.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, parameters[name])


@torch.no_grad()
def test_dtype_is_kept(tmp_path):
    model, ids = tiny_model().to(torch.bfloat16), token_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded(ids).logits.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@torch.no_grad()
def test_rope_slots_survive_loading_on_the_meta_device(tmp_path):
    """Buffers that are not stored are made anew, not left uninitialised."""
    model = tiny_model("rope-slots-per-layer")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    for layer, slots in zip(loaded.model.layers, model.config.rope_slots, strict=True):
        assert layer.self_attn.rope_slots.tolist() == slots
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
