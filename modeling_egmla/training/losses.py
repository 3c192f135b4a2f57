"""Losses over the vocabulary in chunks of positions, so that the logits of a whole batch never exist."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


# Positions whose logits exist at one time: 50 MB per copy in fp32 at a vocabulary of 49,152.
CHUNK = 256


def distillation_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    teacher_head: nn.Module | None = None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Sum the forward KL divergence to a teacher and the cross entropy to the next token over positions.

        kl_weight * temperature^2 * KL(teacher || student) + ce_weight * CE, in nats

    Source: Hinton et al., arXiv 1503.02531. The square keeps gradients comparable between temperatures.

    Args:
        head (`nn.Module`): the student's output embedding, a map from `[..., D]` to `[..., vocabulary]`.
        hidden (`torch.Tensor`): the student's last hidden states `[B, T, D]`.
        labels (`torch.Tensor`): token ids `[B, T]`, not shifted. The first position and labels of -100 are not scored.
        teacher_head, teacher_hidden (*optional*): the same of the teacher, whose width may differ. Required unless
            `kl_weight` is 0. They get no gradient.
        kl_weight, ce_weight (`float`): weights of the two terms.
        temperature (`float`): divides both models' logits in the KL term.
        chunk (`int`): positions whose logits exist at one time.

    Returns:
        `torch.Tensor`: the sum over scored positions, a scalar in fp32. Divide by their number for a mean.
    """
    scored = labels[:, 1:] != -100
    targets = labels[:, 1:][scored]
    hidden = hidden[:, :-1][scored]
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden[:, :-1][scored]

    def chunk_loss(states: torch.Tensor, start: int) -> torch.Tensor:
        stop = start + states.shape[0]
        logits = head(states).float()
        loss = logits.new_zeros(())
        if kl_weight:
            with torch.no_grad():
                expected = teacher_head(teacher_hidden[start:stop]).float()  # type: ignore[misc, index]
                expected = nn.functional.log_softmax(expected / temperature, dim=-1)
            log_probabilities = nn.functional.log_softmax(logits / temperature, dim=-1)
            divergence = nn.functional.kl_div(log_probabilities, expected, reduction="sum", log_target=True)
            loss = loss + kl_weight * temperature**2 * divergence
        if ce_weight:
            loss = loss + ce_weight * nn.functional.cross_entropy(logits, targets[start:stop], reduction="sum")
        return loss

    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedSum.apply(chunk_loss, chunk, hidden, *parameters)


def _chunks(states: torch.Tensor, chunk: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, states.shape[0], chunk):
        yield start, states[start : start + chunk]


class _ChunkedSum(torch.autograd.Function):
    """Sum a loss over chunks, and compute the gradients of each chunk in the forward pass.

    Recomputing the logits in the backward pass would save as much memory, but cost one more matmul with the output
    embedding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        chunk_loss: Callable[[torch.Tensor, int], torch.Tensor],
        chunk: int,
        hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if not any(ctx.needs_input_grad[2:]):
            for start, states in _chunks(hidden, chunk):
                total += chunk_loss(states, start)
            return total
        hidden_gradient = torch.empty_like(hidden)
        gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for start, states in _chunks(hidden, chunk):
            states = states.detach().requires_grad_()
            with torch.enable_grad():
                loss = chunk_loss(states, start)
            # `autograd.grad` writes no `.grad`, so hooks of DDP do not run too early.
            own, *others = torch.autograd.grad(loss, (states, *parameters))
            hidden_gradient[start : start + states.shape[0]] = own
            for gradient, other in zip(gradients, others, strict=True):
                gradient += other
            total += loss.detach()
        ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        scale = outputs[0]
        hidden_gradient, *gradients = ctx.saved_tensors
        scaled = [(scale * gradient).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, (scale * hidden_gradient).to(hidden_gradient.dtype), *scaled
