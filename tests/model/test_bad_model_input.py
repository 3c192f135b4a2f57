"""Errors say what was given, what is required and what to do."""

import pytest
import torch
from cases import BASE, tiny_model, token_ids
from huggingface_hub.errors import StrictDataclassError

from egmla import EGMLAConfig, EGMLAModel


# Fields given; then what the message must contain: the value given, the requirement, the remedy.
BAD_CONFIGS = {
    "rank zero": ({"kv_lora_rank": 0}, ["kv_lora_rank=0", "must be a positive number", "use 64"]),
    "rank negative": ({"kv_lora_rank": -8}, ["kv_lora_rank=-8", "must be a positive number", "use 64"]),
    "one rank zero": ({"kv_lora_rank": [8, 0]}, ["kv_lora_rank=[8, 0]", "must be a positive number", "use 64"]),
    "ranks too many": (
        {"kv_lora_rank": [8, 8, 8]},
        [
            "kv_lora_rank has 3 entries",
            "num_hidden_layers=2",
            "give one number for all layers or a list of that length",
        ],
    ),
    "ranks empty": ({"kv_lora_rank": []}, ["kv_lora_rank has 0 entries", "num_hidden_layers=2", "give one number"]),
    "query rank zero": ({"q_lora_rank": 0}, ["q_lora_rank=0", "must be positive", "None for a full-rank"]),
    "key-value heads": (
        {"num_key_value_heads": 2},
        ["num_key_value_heads=2 and num_attention_heads=4", "made of one latent", "leave num_key_value_heads out"],
    ),
    "rope odd": ({"qk_rope_head_dim": 7}, ["qk_rope_head_dim=7", "must be even", "use 8 or 6"]),
    "rope negative": ({"qk_rope_head_dim": -2}, ["qk_rope_head_dim=-2", "must be even (0 for none)", "use 2 or 0"]),
    "nope negative": ({"qk_nope_head_dim": -1}, ["qk_nope_head_dim=-1", "must be at least 1, neither negative"]),
    "no query width": (
        {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0},
        ["qk_nope_head_dim=0 and qk_rope_head_dim=0", "must be at least 1"],
    ),
    "norm groups": (
        {"qk_norm_dim": 3},
        ["qk_norm_dim=3", "positive divisor of qk_rope_head_dim=8", "use None for no such norms"],
    ),
    "norm groups of nothing": ({"qk_norm_dim": 4, "qk_rope_head_dim": 0}, ["qk_norm_dim=4", "positive divisor"]),
    "encoder without groups": (
        {"kv_encoder_dim": 20},
        ["kv_encoder_dim=20, kv_encoder_norm_dim=None", "needs a width and positive groups", "for no encoder"],
    ),
    "groups without encoder": ({"kv_encoder_norm_groups": 2}, ["kv_encoder_dim=None", "kv_encoder_norm_groups=2"]),
    "groups wider than the encoder": (
        {"kv_encoder_dim": 20, "kv_encoder_norm_dim": 7, "kv_encoder_norm_groups": 3},
        ["kv_encoder_norm_dim=7 and kv_encoder_norm_groups=3", "together no wider"],
    ),
    "keys normed twice": (
        {"kv_encoder_dim": 20, "kv_encoder_norm_dim": 4, "qk_norm_dim": 4},
        ["kv_encoder_dim=20 with qk_norm_dim=4", "use qk_norm_dim=None"],
    ),
    "query groups": (
        {"query_norm_dim": 5, "rope_interleave": False},
        ["query_norm_dim=5", "positive divisor of num_attention_heads x qk_nope_head_dim=32"],
    ),
    "normed low-rank queries": (
        {"query_norm_dim": 8, "q_lora_rank": 20, "rope_interleave": False},
        ["query_norm_dim=8 with q_lora_rank=20", "use None for these two"],
    ),
    "normed queries, neighbouring pairs": (
        {"query_norm_dim": 8},
        ["query_norm_dim=8 with rope_interleave=True", "half the table apart"],
    ),
    "normed queries narrower than the table": (
        {"query_norm_dim": 8, "qk_rope_head_dim": 12, "rope_interleave": False},
        ["a rotary table of width 12 and qk_nope_head_dim=8", "no wider than qk_nope_head_dim"],
    ),
    "layer without rotation": ({"nope_layers": [0, 2]}, ["nope_layers=[0, 2]", "each from 0 to 1", "use None"]),
    "gate unknown": (
        {"kv_gate": "output"},
        ["kv_gate='output'", "known gates are 'latent', 'expanded', None", "use one of them"],
    ),
    "table without a gate": (
        {"kv_gate": None, "kv_gate_embedding_dim": 16},
        [
            "kv_gate_embedding_dim=16 with kv_gate=None",
            "needs a positive width and kv_gate='latent'",
            "use None to feed",
        ],
    ),
    "table of no width": (
        {"kv_gate_embedding_dim": 0},
        ["kv_gate_embedding_dim=0", "needs a positive width", "use None to feed the gate with the input embedding"],
    ),
    "slots too few": (
        {"rope_slots": [0, 1, 2]},
        ["rope_slots=[0, 1, 2]", "qk_rope_head_dim=8 needs 4 frequency numbers", "from 0 to 3"],
    ),
    "slot out of range": (
        {"rope_slots": [0, 1, 2, 4]},
        ["rope_slots=[0, 1, 2, 4]", "needs 4 frequency numbers", "from 0 to 3", "rope_table_dim=8"],
    ),
    "slot negative": ({"rope_slots": [0, 1, 2, -1]}, ["rope_slots=[0, 1, 2, -1]", "from 0 to 3"]),
    "slots for too few layers": (
        {"rope_slots": [[0, 1, 2, 3]]},
        ["rope_slots has 1 lists", "give one list for all layers or 2, one per layer"],
    ),
    "table width without slots": (
        {"rope_table_dim": 32},
        [
            "rope_table_dim=32 differs from qk_rope_head_dim=8",
            "rope_slots must then say which of the 16",
            "4 rotary pairs",
        ],
    ),
    "slots empty": ({"rope_slots": []}, ["rope_slots=[]", "needs 4 frequency numbers"]),
    **{
        f"{name} zero": ({name: 0}, [f"{name}=0: must be at least 1"])
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "v_head_dim",
        )
    },
}


@pytest.mark.parametrize("name", list(BAD_CONFIGS))
def test_config_errors_name_value_requirement_and_remedy(name):
    fields, fragments = BAD_CONFIGS[name]
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        EGMLAConfig(**{**BASE, **fields})
    message = str(error.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_lora_rank", "64"),
        ("kv_lora_rank", 64.0),
        ("kv_lora_rank", None),
        ("kv_lora_rank", [8, "8"]),
        ("q_lora_rank", "20"),
        ("v_head_dim", 8.5),
        ("kv_gate", 1),
        ("kv_gate", True),
        ("kv_gate_embedding_dim", "256"),
        ("kv_latent_norm", "yes"),
        ("rope_interleave", 1.0),
        ("rope_slots", "0123"),
        ("rope_slots", [0.5, 1, 2, 3]),
        ("softmax_scale", "0.1"),
        ("num_hidden_layers", "2"),
    ],
)
def test_wrong_types_are_refused_by_name(field, value):
    """Not cast: a number in quotation marks is a mistake in a config."""
    with pytest.raises(StrictDataclassError, match=f"(?s)'{field}'.*") as error:
        EGMLAConfig(**{**BASE, field: value})
    assert "expected" in str(error.value) and repr(value).strip("[]") in str(error.value)


def test_wrong_types_are_refused_on_assignment():
    config = EGMLAConfig(**BASE)
    with pytest.raises(StrictDataclassError, match="'kv_lora_rank'"):
        config.kv_lora_rank = "64"


@pytest.mark.parametrize("field", ["qk_nope_head_dim", "qk_rope_head_dim"])
@pytest.mark.parametrize("value", ["8", None, 8.0])
def test_wrong_types_of_the_widths_others_derive_from(field, value):
    with pytest.raises(StrictDataclassError, match=f"'{field}'"):
        EGMLAConfig(**{**BASE, field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_lora_rank": 1},
        {"qk_rope_head_dim": 0},
        {"qk_nope_head_dim": 0},
        {"num_attention_heads": 1},
        {"num_hidden_layers": 1},
        {"v_head_dim": 1},
        {"kv_gate_embedding_dim": 1},
        {"qk_rope_head_dim": 2},
        {"vocab_size": 5},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_smallest_allowed_values_work(fields):
    """The limits in the messages are the true ones."""
    model = tiny_model(**fields)
    ids = token_ids(2, 4, vocab_size=5)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 7)
    assert torch.equal(out, model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False))


def test_partial_rotary_factor_is_refused():
    """The rotary width of this model is `qk_rope_head_dim`; another one hidden in rope_parameters would be ignored."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="partial_rotary_factor") as error:
        EGMLAModel(EGMLAConfig(**{**BASE, "rope_parameters": rope}))
    assert "leave partial_rotary_factor out" in str(error.value) and "2 frequencies" in str(error.value)
