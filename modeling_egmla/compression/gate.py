# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""The eviction gate: a linear map per layer that predicts reconstruction scores of tokens from their hidden states.

It reads the prompt once. It is fitted by ridge regression, without a backward pass, and saved beside the weights.

Source: KVzap (arXiv 2601.07891), the linear form, on the scores of KVzip; Fast KVzip (arXiv 2601.17668) has gates of
the same kind with sinks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .press import Press, Reading
from .reconstruction import reconstruction_scores


GATE_FILE = "eviction_gate.safetensors"
RIDGE = 1e-2  # of the mean variance of the inputs, added to each
LEAST_CONTEXTS = 5  # of a domain
LEAST_SCORE = 1e-6  # below it a token is not looked at, and its logarithm would say by how much


@dataclass(frozen=True)
class EvictionGate:
    """A linear map per layer from normed inputs to log scores.

    Attributes:
        weight (`torch.Tensor`): `[layers, D]`, fp32.
        bias (`torch.Tensor`): `[layers]`.
        shares (`torch.Tensor`): of the tokens that each layer keeps when half of all are kept by one threshold,
            `[layers]`, measured while it was fitted.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    shares: torch.Tensor

    def __call__(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return log scores `[B, T]` of normed inputs `[B, T, D]`."""
        weight, bias = (each[layer_idx].to(hidden_states.device) for each in (self.weight, self.bias))
        return hidden_states.float() @ weight + bias

    def save(self, folder: str | Path) -> Path:
        """Write the gate beside a model's weights, and return the file's path."""
        path = Path(folder) / GATE_FILE
        save_file({"weight": self.weight, "bias": self.bias, "shares": self.shares}, path)
        return path

    @classmethod
    def load(cls, folder: str | Path, config: Any) -> "EvictionGate":
        """Read the gate of a model's folder.

        Args:
            folder (`str` or `Path`): the model's folder.
            config: the model's configuration.

        Raises:
            FileNotFoundError: without a gate in it.
            ValueError: for the gate of another model.
        """
        path = Path(folder) / GATE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {GATE_FILE}: fit one first, egmla gate {folder} --data TEXT.")
        tensors = load_file(path)
        wanted = (config.num_hidden_layers, config.hidden_size)
        found = tuple(tensors["weight"].shape) if tensors.keys() == {"weight", "bias", "shares"} else None
        if found != wanted:
            raise ValueError(
                f"{path} holds a gate of shape {found}, and the model has {wanted[0]} layers of width {wanted[1]}: it "
                "is another model's. Fit one for this model."
            )
        return cls(**tensors)


class GatePress(Press):
    """Keeps tokens that an eviction gate scores highest.

    Args:
        gate (`EvictionGate`): of the model.
        options: as of `Press`. By default one threshold for all layers.
    """

    default_layers = "global"

    def __init__(self, gate: EvictionGate, **options: Any):
        super().__init__(**options)
        self.gate = gate

    def score(self, reading: Reading) -> torch.Tensor:
        new = self.gate(reading.attention.layer_idx, reading.hidden_states)
        return torch.cat((reading.older, new), dim=1)


class _Regression:
    """Sums for a ridge regression per layer, fp64: inputs `[n, D]` with a constant, targets `[n]`."""

    def __init__(self, layers: int, width: int):
        self.gram = torch.zeros(layers, width + 1, width + 1, dtype=torch.float64)
        self.moment = torch.zeros(layers, width + 1, dtype=torch.float64)

    def add(self, layer_idx: int, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        rows = torch.cat((inputs.double().cpu(), torch.ones(len(inputs), 1, dtype=torch.float64)), dim=1)
        self.gram[layer_idx] += rows.T @ rows
        self.moment[layer_idx] += rows.T @ targets.double().cpu()

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights `[layers, D]` and biases `[layers]`; the constant is not shrunk."""
        squares = self.gram.diagonal(dim1=1, dim2=2)
        damping = torch.zeros_like(squares)
        damping[:, :-1] = RIDGE * squares[:, :-1].mean(dim=1, keepdim=True)
        solved = torch.linalg.solve(self.gram + torch.diag_embed(damping), self.moment)
        return solved[:, :-1].float().contiguous(), solved[:, -1].float()


@torch.no_grad()
def fit_gate(
    model: Any,
    contexts: Mapping[str, Sequence[torch.Tensor]],
    instruction: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[EvictionGate, dict[str, dict[str, float]]]:
    """Fit a gate to the reconstruction scores of contexts.

    The last fifth of each domain's contexts, at least one, is held out for the figures.

    Args:
        model: an EG-MLA model.
        contexts (`Mapping[str, Sequence[torch.Tensor]]`): ids `[1, T]` of at least five texts of each domain that the
            gate will serve, by the domain's name.
        instruction (`torch.Tensor`): ids `[1, I]` of `INSTRUCTION`.
        progress (`Callable`, *optional*): called with (contexts done, contexts in all).

    Returns:
        The gate, and figures of each domain on its held-out contexts: "r2", the mean over layers, and "recall". The
        latter is the share of the best-scored half of the tokens that is in the gate's best half, all layers
        together. A random half has 0.5.

    Raises:
        ValueError: for fewer than five contexts of a domain.
    """
    for domain, own in contexts.items():
        if len(own) < LEAST_CONTEXTS:
            raise ValueError(
                f"{domain} gives {len(own)} contexts, and at least {LEAST_CONTEXTS} are needed, some of them held "
                "out: give a longer text, or shorter contexts."
            )
    if not contexts:
        raise ValueError("A gate is fitted to texts: give contexts of each domain that it will serve.")
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    total, done = sum(map(len, contexts.values())), 0
    inputs: list[list[torch.Tensor]] = []

    def observe(layer_idx: int, hidden: torch.Tensor) -> None:
        inputs[layer_idx].append(hidden)

    def measure(ids: torch.Tensor) -> torch.Tensor:
        nonlocal done
        inputs[:] = [[] for _ in range(layers)]
        scores = reconstruction_scores(model, ids, instruction, observe=observe).clamp_min(LEAST_SCORE).log()
        done += 1
        if progress is not None:
            progress(done, total)
        return scores.cpu()

    regression = _Regression(layers, width)
    held_out = {domain: max(1, len(own) // 5) for domain, own in contexts.items()}
    for domain, own in contexts.items():
        for ids in own[: -held_out[domain]]:
            for layer_idx, targets in enumerate(measure(ids)):
                regression.add(layer_idx, torch.cat(inputs[layer_idx]), targets)
    weight, bias = regression.solve()
    gate = EvictionGate(weight, bias, torch.ones(layers))
    figures, shares = {}, torch.zeros(layers)
    for domain, own in contexts.items():
        found = []
        for ids in own[-held_out[domain] :]:
            targets = measure(ids)
            guesses = torch.stack([gate(idx, torch.cat(inputs[idx])).cpu() for idx in range(layers)])
            found.append(_compare(targets, guesses))
            shares += _best_half(guesses).float().mean(dim=1)
        r2, recall = (sum(each) / len(found) for each in zip(*found, strict=True))
        figures[domain] = {"r2": r2, "recall": recall}
    return EvictionGate(weight, bias, shares / sum(held_out.values())), figures


def _best_half(scores: torch.Tensor) -> torch.Tensor:
    """Tell which half of the scores `[layers, T]` of all layers together are the largest."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().topk(scores.numel() // 2).indices] = True
    return chosen.view(scores.shape)


def _compare(targets: torch.Tensor, guesses: torch.Tensor) -> tuple[float, float]:
    """Return the mean R2 of the layers, and how much of the best half is found."""
    spread = (targets - targets.mean(dim=1, keepdim=True)).square().sum(dim=1).clamp_min(1e-9)
    r2 = 1 - (targets - guesses).square().sum(dim=1) / spread
    found = (_best_half(targets) & _best_half(guesses)).sum() / (targets.numel() // 2)
    return float(r2.mean()), float(found)
