"""How much a converted model's output depends on each number of its cache: one pass backwards over calibration text.

Rounding is noise `e` on the entries, independent from token to token. To second order it costs the output
`1/2 tr(F E[e e^T])` nats of KL divergence a token. `F = E[g g^T]` is Fisher's information, `g` the gradient of
`log p(y)` at the entry, all later predictions together. Labels `y` are drawn from the model's own predictions: with
those of the text it would be another matrix (Kunstner et al., arXiv 1905.12558). As the gradient passes through all
that comes behind, layers and keys and values are weighed against one another without any further choice.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from egmla.utils.head import states_for_head
from egmla.utils.progress import StageProgress


POSITIONS = 256  # whose logits exist at a time


@dataclass
class Sensitivity:
    """What rounding the entries of one layer costs, and what they are like; fp64, latent before rotary key.

    Attributes:
        gradient: Fisher's information `E[g g^T]` `[R + P, R + P]`.
        mean: mean entry `[R + P]`.
        covariance: of entries, `[R + P, R + P]`.
        spread: the same about the mean of each group of tokens in a row: what codes with a zero point have to hold.
    """

    gradient: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    spread: torch.Tensor


class _Sums:
    """Running sums behind `Sensitivity`, in fp64."""

    def __init__(self, width: int, group: int):
        self.group = group
        self.gradient, self.moment, self.spread = (torch.zeros(width, width, dtype=torch.float64) for _ in range(3))
        self.total = torch.zeros(width, dtype=torch.float64)
        self.tokens = self.grouped = 0

    def add(self, entries: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add a sequence: entries and gradients `[T, R + P]`."""
        self.tokens += len(entries)
        self.gradient += (gradients.T @ gradients).double().cpu()
        self.moment += (entries.T @ entries).double().cpu()
        self.total += entries.sum(dim=0).double().cpu()
        group = min(self.group, len(entries))  # a source's whole context may be shorter than a group
        whole = len(entries) // group * group
        groups = entries[:whole].view(-1, group, entries.shape[1])
        apart = (groups - groups.mean(dim=1, keepdim=True)).flatten(0, 1)
        self.grouped += whole
        self.spread += (apart.T @ apart).double().cpu()

    def finish(self) -> Sensitivity:
        mean = self.total / self.tokens
        covariance = self.moment / self.tokens - torch.outer(mean, mean)
        return Sensitivity(self.gradient / self.tokens, mean, covariance, self.spread / self.grouped)


def measure_sensitivity(
    model: Any,
    sequences: torch.Tensor,
    group_tokens: int,
    first_tokens: int,
    progress: StageProgress | None = None,
    seed: int = 0,
) -> list[Sensitivity]:
    """Measure what rounding the cache of a model costs its output.

    Args:
        model (`EGMLAForCausalLM`): in fp32, on its device.
        sequences (`torch.Tensor`): calibration ids `[sequences, T]`, `T` above the first tokens.
        group_tokens (`int`): tokens that a cache quantises together.
        first_tokens (`int`): tokens at the beginning that it keeps exact, which are left out.
        progress (*optional*): called with (sequences done, all).
        seed (`int`): of the labels drawn.

    Returns:
        `list[Sensitivity]`: one per layer.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    config = model.config
    sums = [_Sums(rank + config.qk_rope_head_dim, group_tokens) for rank in config.layer_kv_lora_ranks]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # only entries need gradients
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), _recorded_entries(model) as recorded:
            for number, ids in enumerate(sequences, start=1):
                states = states_for_head(model, ids[None].to(model.device))
                states.backward(_gradient_of_drawn_labels(model.get_output_embeddings(), states, generator))
                for layer_idx, entries in recorded.items():
                    found = (tensor[0, 0, first_tokens:] for tensor in (entries.detach(), entries.grad))
                    sums[layer_idx].add(*found)
                recorded.clear()
                if progress is not None:
                    progress(number, len(sequences))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return [each.finish() for each in sums]


def _gradient_of_drawn_labels(head, states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient, at the states `[1, T, D]`, of the likelihood of labels that are drawn from the predictions."""
    states = states.detach().requires_grad_()
    states.grad = torch.zeros_like(states)
    for part in states.split(POSITIONS, dim=1):
        logits = head(part)[0].float()
        labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
        cross_entropy(logits, labels, reduction="sum").backward()
    return states.grad


@contextlib.contextmanager
def _recorded_entries(model) -> Iterator[dict[int, Any]]:
    """Make every layer keep its entries `[1, 1, T, R + P]`, with their gradient, by its number."""
    recorded: dict[int, Any] = {}
    layers = [layer.self_attn for layer in model.model.layers]

    def recording(attention):
        project = attention.project

        def record(*args, **kwargs):
            nope, rope, latents, rope_keys = project(*args, **kwargs)
            entries = torch.cat((latents, rope_keys), dim=-1)
            if not entries.requires_grad:
                entries.requires_grad_()
            entries.retain_grad()
            recorded[attention.layer_idx] = entries
            return nope, rope, *attention.split(entries)

        return record

    for attention in layers:
        attention.project = recording(attention)
    try:
        yield recorded
    finally:
        for attention in layers:
            del attention.project
