"""Settings: TrainingArguments, numbers of tokens, batches, devices."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from egmla.training import (
    TrainingSettings,
)
from egmla.training.settings import (
    check_device,
    micro_batch,
    parse_count,
    parse_training_arguments,
    training_arguments,
)


def test_any_training_argument_can_be_set():
    found = parse_training_arguments(["lr_scheduler_type=linear", "adam-beta2=0.9", "report_to=none", "tf32=false"])
    assert found == {"lr_scheduler_type": "linear", "adam_beta2": 0.9, "report_to": "none", "tf32": False}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("adam_beta2", "written key=value"),
        ("adam_beta=1", "not an argument of Transformers' TrainingArguments; there is adam_beta"),
        ("max_steps=3", "max_steps follows from other options here: --tokens"),
        ("load_best_model_at_end=true", "load_best_model_at_end follows .*: the last weights are written"),
        ("eval_delay=10", "eval_delay follows from other options here: --eval-every"),
        ("label_smoothing_factor=0.1", "label_smoothing_factor follows"),
        ("hub_token=secret", "hub_token follows from other options here: egmla push"),
    ],
)
def test_training_arguments_refuse(pair, message):
    with pytest.raises(ValueError, match=message):
        parse_training_arguments([pair])


@pytest.mark.parametrize(("text", "count"), [("500", 500), ("5M", 5_000_000), ("0.5b", 500_000_000), ("2k", 2000)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "many", "-5", "inf", "nanM"])
def test_counts_refuse(text):
    with pytest.raises(ValueError, match="a number of tokens is written"):
        parse_count(text)


def test_batch_is_the_same_however_it_is_divided(monkeypatch, tmp_path):
    settings = TrainingSettings(data=["a"], tokens=10_000, sequence_length=100, batch_size=12, micro_batch_size=3)
    assert settings.steps == 9
    assert micro_batch(settings, 2) == 3
    assert micro_batch(dataclasses.replace(settings, micro_batch_size=None), 2) == 6
    with pytest.raises(ValueError, match="choose a multiple of 15"):
        micro_batch(settings, 5)
    defaults = {"learning_rate": 1e-4, "weight_decay": 0.0}
    arguments = training_arguments(settings, tmp_path, defaults)
    assert arguments.gradient_accumulation_steps == 4
    assert arguments.per_device_eval_batch_size == 3
    monkeypatch.setenv("WORLD_SIZE", "2")  # sequences that fill up a last batch would count in its mean
    made = lambda **values: SimpleNamespace(**values, n_gpu=0)  # noqa: E731
    monkeypatch.setattr("egmla.training.settings.TrainingArguments", made)
    assert training_arguments(settings, tmp_path, defaults).per_device_eval_batch_size == 1
    assert arguments.save_steps % arguments.logging_steps == 0


def test_report_survives_json():
    assert json.loads(json.dumps(dataclasses.asdict(TrainingSettings(["a"], 5))))["tokens"] == 5
    assert math.isfinite(TrainingSettings(["a"], 5).steps)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_device_of_a_run(tmp_path, device):
    settings = TrainingSettings(data=["a"], tokens=10_000, device=device)
    arguments = training_arguments(settings, tmp_path, {"learning_rate": 1e-4, "weight_decay": 0.0})
    expected = "cpu" if device == "cpu" or not torch.accelerator.is_available() else torch.device(0).type
    assert arguments.device.type == expected


@pytest.mark.parametrize(
    ("device", "message"), [("cpu:1", "give 'cpu' and set CUDA_VISIBLE_DEVICES=1"), ("gpu", "this machine has cpu")]
)
def test_devices_that_are_refused(device, message):
    with pytest.raises(ValueError, match=message):
        check_device(device)


def test_a_device_of_this_machine_is_taken(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    check_device("cuda")
    with pytest.raises(ValueError, match="this machine has cpu and cuda"):
        check_device("mps")
