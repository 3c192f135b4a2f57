"""The trainer: its loss, accumulation, mixed precision, distillation, and checkpoints that are incomplete."""

import pytest
import torch
from cases import difference, tiny_model, token_ids
from tiny_training import ROUNDING, full_loss, losses_of, make_trainer
from torch import nn

from egmla.training import (
    set_trainable,
)
from egmla.training.trainer import last_checkpoint


def test_trainer_computes_the_loss_of_its_definition(tmp_path):
    student, teacher = tiny_model(), tiny_model("query-low-rank", seed=5)
    trainer = make_trainer(student, tmp_path, teacher=teacher, chunk=5)
    ids = token_ids(2, 17)
    head, teacher_head = student.lm_head, teacher.lm_head
    hidden, teacher_hidden = (model.base_model(ids).last_hidden_state for model in (student, teacher))
    whole = full_loss(head, hidden, ids, teacher_head, teacher_hidden, 1.0, 0.0, 1.0) / 32
    student.train()
    assert trainer.compute_loss(student, {"input_ids": ids, "labels": ids}).item() == pytest.approx(whole.item())
    # In evaluation it is the cross entropy that Transformers computes.
    student.eval()
    plain = trainer.compute_loss(student, {"input_ids": ids, "labels": ids})
    assert plain.item() == pytest.approx(student(ids, labels=ids).loss.item(), rel=ROUNDING)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("teacher_seed", [None, 5])
def test_accumulated_micro_batches_are_one_batch(tmp_path, teacher_seed):
    results = []
    for micro in (4, 1):
        model = tiny_model()
        teacher = None if teacher_seed is None else tiny_model(seed=teacher_seed)
        trainer = make_trainer(model, tmp_path, teacher, batch=micro, gradient_accumulation_steps=4 // micro)
        trainer.train()
        results.append((losses_of(trainer), model.state_dict()))
    (losses, weights), (other_losses, other_weights) = results
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights.items():
        assert difference(tensor, other_weights[name]) < 1e-4, name


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tiny_model(), tmp_path, tiny_model(seed=5), activation_checkpointing=checkpointing, max_grad_norm=1.0
        )
        trainer.train()
        assert trainer.model.is_activation_checkpointing == checkpointing
        runs.append(losses_of(trainer))
    assert runs[0] == runs[1]


def test_bf16_trains_fp32_weights(tmp_path):
    """Products are in bf16, those with the vocabulary too; weights stay in fp32."""
    runs = []
    for bf16 in (False, True):
        formats = set()
        trainer = make_trainer(tiny_model(), tmp_path, tiny_model(seed=5).to(torch.bfloat16), bf16=bf16, steps=6)
        trainer.model.lm_head.register_forward_hook(lambda module, args, output, seen=formats: seen.add(output.dtype))
        trainer.train()
        assert formats == {torch.bfloat16 if bf16 else torch.float32}
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        runs.append(losses_of(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=0.03)
    assert runs[0] != runs[1]
    assert runs[1][-1] < runs[1][0]


def test_distillation_learns_the_teacher(tmp_path):
    """A student that differs by its gates alone gets most of the way back to the teacher."""
    teacher, student = tiny_model(), tiny_model()
    for layer in student.model.layers:
        nn.init.zeros_(layer.self_attn.kv_gate_norm.weight)
        nn.init.ones_(layer.self_attn.kv_gate_norm.bias)
    set_trainable(student, "gate")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = make_trainer(student, tmp_path, teacher, steps=60, gate_learning_rate=0.05)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.2 * losses[0]
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("kv_gate_" in name for name in changed)


def test_trainer_refuses_another_vocabulary_and_no_loss(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 53 and the student one of 97"):
        make_trainer(tiny_model(), tmp_path, teacher=tiny_model(vocab_size=53))
    with pytest.raises(ValueError, match="one must be above 0"):
        make_trainer(tiny_model(), tmp_path, teacher=tiny_model(), kl_weight=0.0)


def test_unfinished_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, content in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global_'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
