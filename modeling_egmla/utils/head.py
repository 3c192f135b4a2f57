"""Hooks on a model's output embedding: the hidden states that reach it, and a loss in place of its logits.

Both keep the logits of a whole batch from existing. They hook the module for one call of the model.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


def states_for_head(model, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    """Return the hidden states `[B, T, D]` that a model gives to its output embedding; no logits are made.

    They differ from the last hidden states of the base model in some families: MiniCPM3 scales them.
    """
    states = []

    def take(module, args):
        states.append(args[0])
        return (args[0][:, :0],)

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(input_ids, use_cache=False, **inputs)
    finally:
        hook.remove()
    return states[0]


@contextlib.contextmanager
def loss_in_place_of_logits(
    head: nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Make an output embedding return `loss_of(hidden states [B, T, D])` at the model's next call.

    The loss is computed inside the call of the model. There FSDP has gathered the weights and mixed precision is on.
    DDP and FSDP start the backward pass at the model's outputs, so the loss has to be one of them.

    Yields:
        `list[torch.Tensor]`: after the call it holds the loss, detached.
    """
    states: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []

    def take(module, args):
        before.remove()  # the loss calls the module itself, for logits
        states.append(args[0])
        return (args[0][:, :0],)

    def give(module, args, output):
        after.remove()
        loss = loss_of(states.pop())
        losses.append(loss.detach())
        return loss

    before, after = head.register_forward_pre_hook(take), head.register_forward_hook(give)
    try:
        yield losses
    finally:
        before.remove()
        after.remove()
