"""Estimates of operations and time."""

import pytest
import torch
from cases import tiny_config, tiny_model

from egmla.commands.training import rough_time
from egmla.training import (
    TrainingSettings,
    set_trainable,
)
from egmla.training.estimates import OVERHEAD, matrix_parameters, run_plan, seconds_of, training_flops
from egmla.utils.matmul_speed import matmul_speed


def test_flops_are_counted_by_hand():
    config = tiny_config()
    model = tiny_model()
    D, H, R, N, P, V, inner, L = 48, 4, 24, 8, 8, 12, 56, 2
    layer = D * H * (N + P) + D * (R + P) + R * H * (N + V) + H * V * D + D * R + 3 * D * inner
    matrices = L * layer + config.vocab_size * D
    assert matrix_parameters(model) == matrices
    attention = L * H * (N + P + V) * 64
    assert training_flops(model, 10, 64) == 10 * (6 * matrices + 3 * attention)
    set_trainable(model, "gate")
    assert training_flops(model, 10, 64) == 10 * (4 * matrices + 2 * L * D * R + 3 * attention)
    with_teacher = training_flops(model, 10, 64, config, matrices)
    assert with_teacher == training_flops(model, 10, 64) + 10 * (2 * matrices + attention)


def test_time_follows_operations_and_the_speed_of_matmuls(monkeypatch):
    """A clock on which each reading is 0.25 s later: one matmul of 2 x 512^3 operations takes 0.25 s."""
    readings = iter(number / 4 for number in range(100))
    monkeypatch.setattr("egmla.utils.matmul_speed.time.process_time", lambda: next(readings))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    flops = 40 * 2 * 512**3
    matmul_speed.cache_clear()
    try:
        assert seconds_of(flops, torch.device("cpu")) == pytest.approx(OVERHEAD * 40 * 0.25)
    finally:
        matmul_speed.cache_clear()


def test_plans_share_the_time_among_processes(monkeypatch):
    monkeypatch.setattr("egmla.training.estimates.seconds_of", lambda flops, device, bf16: flops / 1e6)
    settings = TrainingSettings(["a"], 1000, sequence_length=10, batch_size=4)
    plans = [run_plan(tiny_model(), settings, 4, device=torch.device("cpu"), processes=count) for count in (1, 2)]
    assert plans[0]["estimated_seconds"] == plans[0]["flops"] / 1e6 == 2 * plans[1]["estimated_seconds"]
    assert run_plan(tiny_model(), settings, 4)["estimated_seconds"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "under a minute"),
        (59, "under a minute"),
        (61, "1 minute"),
        (7000, "117 minutes"),
        (7300, "2 hours"),
        (30 * 3600, "30 hours"),
        (50 * 3600, "2 days"),
    ],
)
def test_rough_times(seconds, text):
    assert rough_time(seconds) == text
