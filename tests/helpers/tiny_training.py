"""Shared by tests of training: the loss from its definition, and a trainer of three steps on a tiny model."""

import numpy as np
import torch
from cases import token_ids
from transformers import TrainingArguments

from egmla.training import (
    DistillationTrainer,
)
from egmla.training.data import (
    PackedDataset,
)


# fp32 sums of some hundred terms in another order
ROUNDING = 2e-6


def full_loss(head, hidden, labels, teacher_head, teacher_hidden, kl_weight, ce_weight, temperature):
    """Compute the loss from its definition, with all logits at once."""
    scored = labels[:, 1:] != -100
    logits = head(hidden)[:, :-1][scored]
    expected = (teacher_head(teacher_hidden)[:, :-1][scored] / temperature).softmax(-1)
    divergence = (expected * (expected.log() - (logits / temperature).log_softmax(-1))).sum()
    nll = -logits.log_softmax(-1)[torch.arange(len(logits)), labels[:, 1:][scored]].sum()
    return kl_weight * temperature**2 * divergence + ce_weight * nll


def make_trainer(model, folder, teacher=None, steps=3, batch=4, data=None, **more) -> DistillationTrainer:
    settings = {"kl_weight": 0.0, "ce_weight": 1.0} if teacher is None else {}
    options = {key: more.pop(key) for key in list(more) if key in {"chunk", "gate_learning_rate", "kl_weight"}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"learning_rate": 1e-3, **more},
    )
    data = PackedDataset(token_ids(32, 17).numpy().astype(np.int32)) if data is None else data
    return DistillationTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, teacher=teacher, **settings, **options
    )


def losses_of(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
