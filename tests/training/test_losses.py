"""Losses in chunks against the definition, and that the logits of a batch never exist."""

import pytest
import torch
from cases import BASE, difference, tiny_model, token_ids
from tiny_training import ROUNDING, full_loss, make_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from egmla.training import (
    distillation_loss,
    set_trainable,
)


@pytest.mark.parametrize(("kl", "ce", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.2, 2.5)])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("ignored", [0, 5])
def test_chunked_loss_and_gradients_equal_the_whole(kl, ce, temperature, chunk, ignored):
    head, teacher_head = nn.Linear(12, 40), nn.Linear(20, 40, bias=False)
    hidden, teacher_hidden = torch.randn(3, 9, 12, requires_grad=True), torch.randn(3, 9, 20)
    labels = token_ids(3, 9, vocab_size=40)
    labels[1, :ignored] = -100
    options = {"kl_weight": kl, "ce_weight": ce, "temperature": temperature}
    inputs = (hidden, *head.parameters())

    whole = full_loss(head, hidden, labels, teacher_head, teacher_hidden, **options)
    wanted = torch.autograd.grad(3 * whole, inputs)
    loss = distillation_loss(head, hidden, labels, teacher_head, teacher_hidden, chunk=chunk, **options)
    got = torch.autograd.grad(3 * loss, inputs)
    assert loss.item() == pytest.approx(whole.item(), rel=ROUNDING)
    for left, right in zip(got, wanted, strict=True):
        assert difference(left, right) < 1e-4 * right.abs().max()
    with torch.no_grad():
        again = distillation_loss(head, hidden, labels, teacher_head, teacher_hidden, chunk=chunk, **options)
    assert again.item() == pytest.approx(whole.item(), rel=ROUNDING)
    assert not again.requires_grad


class WidestLogits(TorchDispatchMode):
    """Record the most rows of any tensor as wide as the vocabulary, except for the output embedding transposed."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                if tensor.shape[-2] == BASE["hidden_size"]:
                    continue
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


def test_logits_of_a_batch_never_exist(tmp_path):
    """Forward and backward of a training step: no tensor of the vocabulary's width has more rows than a chunk."""
    student, teacher = tiny_model(vocab_size=509), tiny_model(vocab_size=509, seed=5)
    set_trainable(student, "attention")  # the embedding's own gradient is as wide, and no logits
    trainer = make_trainer(student, tmp_path, teacher=teacher, chunk=8)
    ids = token_ids(3, 33)
    with WidestLogits(509) as seen:
        student.train()
        trainer.compute_loss(student, {"input_ids": ids, "labels": ids}).backward()
    assert seen.rows == 8
    with WidestLogits(509) as seen:
        student(ids)
    assert seen.rows == 3 * 33
