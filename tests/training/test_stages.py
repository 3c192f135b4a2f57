"""Stages, parameter groups of the optimiser, and adapters."""

import importlib.util

import pytest
import torch
from cases import difference, tiny_model, token_ids
from tiny_training import make_trainer

from egmla.training import (
    add_lora,
    lora_targets,
    merge_lora,
    set_trainable,
)
from egmla.training.stages import parameter_groups


@pytest.mark.parametrize("case", ["input-gate", "table-gate", "query-low-rank"])
def test_stages_train_what_they_say(case):
    model = tiny_model(case)

    def trained(stage):
        set_trainable(model, stage)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    every = {name for name, _ in model.named_parameters()}
    gates = {name for name in every if "kv_gate_" in name}
    assert trained("gate") == gates
    attention = trained("attention")
    assert gates < attention
    assert every - attention == {
        name for name in every if "mlp." in name or "embed_tokens" in name or "lm_head" in name
    }
    assert trained("all") == every


@pytest.mark.parametrize(("stage", "message"), [("gate", "has none"), ("atention", "did you mean attention")])
def test_stages_refuse(stage, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(tiny_model("gate-off"), stage)


def test_gates_have_a_rate_of_their_own_and_no_decay(tmp_path):
    model = tiny_model("table-gate")
    trainer = make_trainer(model, tmp_path, weight_decay=0.1, gate_learning_rate=0.01)
    trainer.create_optimizer()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert groups["gate"]["lr"] == 0.01
    assert groups["gate"]["weight_decay"] == groups["not decayed"]["weight_decay"] == 0
    assert groups["decayed"]["weight_decay"] == 0.1
    assert groups["decayed"]["lr"] == groups["not decayed"]["lr"] == 1e-3
    assert all("kv_gate_" in names[id(parameter)] for parameter in groups["gate"]["params"])
    # Tables are matrices, which would decay otherwise.
    assert any("kv_gate_embedding" in names[id(parameter)] for parameter in groups["gate"]["params"])
    found = sorted(names[id(parameter)] for group in groups.values() for parameter in group["params"])
    assert found == sorted(names.values())
    assert list(groups)[-1] == "gate"  # Trainer logs the rate of the first
    set_trainable(model, "gate")
    assert [group["name"] for group in parameter_groups(model, set(), 0.1, 1.0, 1.0)] == ["gate"]


@pytest.mark.parametrize("case", ["input-gate", "table-gate", "query-low-rank", "gate-off"])
@pytest.mark.parametrize("stage", ["attention", "all"])
def test_merged_adapters_are_the_adapted_model(tmp_path, case, stage):
    plain = tiny_model(case)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = add_lora(plain, stage, rank=3)
    trainer = make_trainer(model, tmp_path, teacher=tiny_model(case, seed=5), steps=4, gate_learning_rate=0.05)
    trainer.train()
    ids = token_ids(2, 11)
    model.eval()
    with torch.no_grad():
        adapted = model(ids).logits
        merged = merge_lora(model)
        # Merging adds two products in another order, which rounds by parts of the largest logits.
        assert difference(merged(ids).logits, adapted) < 1e-5 * adapted.abs().max()
        assert merged.state_dict().keys() == before.keys()
        changed = {
            name.split(".")[-2]
            for name, tensor in merged.state_dict().items()
            if not torch.equal(tensor, before[name])
        }
        plain_again = tiny_model(case)
        assert difference(plain_again(ids).logits, adapted) > 1e-3
    gate_norm = {"kv_gate_norm"} if case != "gate-off" else set()
    assert changed == set(lora_targets(plain_again, stage)) | gate_norm
    assert ("down_proj" in changed) == (stage == "all")


def test_adapters_are_small():
    model = add_lora(tiny_model(), "attention", rank=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name or "kv_gate_norm" in name for name in trained)


def test_lora_without_peft(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'egmla\[train\]'"):
        add_lora(tiny_model(), "attention", rank=2)
