"""The parts of training: losses in chunks, what is trained, adapters, packed text, settings, estimates."""

import dataclasses
import importlib.util
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import BASE, difference, tiny_config, tiny_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, TrainingArguments

from egmla.training import (
    DistillationTrainer,
    TrainingSettings,
    add_lora,
    distillation_loss,
    lora_targets,
    merge_lora,
    set_trainable,
)
from egmla.training.data import (
    PackedDataset,
    TextSource,
    check_apart,
    packed_sequences,
    passages_in_common,
    read_sequences,
    write_sequences,
)
from egmla.training.estimates import matrix_parameters, training_flops
from egmla.training.settings import (
    micro_batch,
    parse_count,
    parse_training_arguments,
    training_arguments,
)
from egmla.training.stages import parameter_groups
from egmla.training.trainer import last_checkpoint


# fp32 sums of some hundred terms in another order
ROUNDING = 2e-6


# losses


def full_loss(head, hidden, labels, teacher_head, teacher_hidden, kl_weight, ce_weight, temperature):
    """The loss from its definition, with the logits of everything at once."""
    scored = labels[:, 1:] != -100
    logits = head(hidden)[:, :-1][scored]
    expected = (teacher_head(teacher_hidden)[:, :-1][scored] / temperature).softmax(-1)
    divergence = (expected * (expected.log() - (logits / temperature).log_softmax(-1))).sum()
    nll = -logits.log_softmax(-1)[torch.arange(len(logits)), labels[:, 1:][scored]].sum()
    return kl_weight * temperature**2 * divergence + ce_weight * nll


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
    """Notes the most rows of any tensor as wide as the vocabulary, the head's own weight turned round apart."""

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


# the trainer


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


# stages, groups, adapters


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


# data


def letters(begin: bool = False, end: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters: a is 3, b is 4, ...; <end> is 1, <begin> 2."""
    vocabulary = {"<unk>": 0, "<end>": 1, "<begin>": 2}
    vocabulary |= {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 2)])
    tokens = {"bos_token": "<begin>"} | ({"eos_token": "<end>"} if end else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **tokens)


def rows(source: TextSource, tokenizer, length: int) -> list[list[int]]:
    return [ids.tolist() for ids in packed_sequences(source, tokenizer, length)]


def test_documents_are_packed_with_an_end_between_them(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a b c"}\n\n{"text": "d", "id": 4}\n{"text": "e f g h"}\n')
    source = TextSource(str(file))
    assert rows(source, letters(), 4) == [[3, 4, 5, 1], [6, 1, 7, 8]]  # g, h and an end fill no third one
    assert source.report.documents == 3
    assert source.report.complete
    assert rows(TextSource(str(file)), letters(begin=True), 4) == [[2, 3, 4, 5], [2, 1, 6, 1], [2, 7, 8, 9]]
    assert rows(TextSource(str(file)), letters(end=False), 4) == [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_a_text_file_is_one_document_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr("egmla.training.data.PIECE_CHARACTERS", 7)
    file = tmp_path / "text.txt"
    file.write_text("a b\nc d e f g h\ni\n")
    source = TextSource(str(file))
    assert rows(source, letters(), 5) == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 1]]
    assert source.report.documents == 1
    assert len(source.report.sha256) == 64


def test_data_sets_are_streamed(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "a b"}\n{"body": "c"}\n')
    source = TextSource(str(folder), text_field="body")
    assert rows(source, letters(), 5) == [[3, 4, 1, 5, 1]]
    assert (source.report.name, source.report.documents) == ("set", 2)
    assert len(source.report.sha256) == 64
    with pytest.raises(ValueError, match="cannot be opened"):
        rows(TextSource(f"{folder}::test"), letters(), 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnonsense\n', "Line 2 of .* is no JSON"),
        ('{"body": "a"}\n', "no text in the field 'text' .it has body"),
        ('["a"]\n', "it has list"),
        (b'{"text": "\xff"}\n', "is no UTF-8 text"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    file = tmp_path / "texts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows(TextSource(str(file)), letters(), 2)


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "a/b/c", "a:b:c:d"])
def test_missing_text_is_named(name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextSource(name)


def test_sources_take_turns_and_what_is_held_out_is_not_trained_on(tmp_path):
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(f"{letter} " * 60)
    sources = [TextSource(str(tmp_path / f"{name}.txt")) for name in "ab"]
    train, held = tmp_path / "train", tmp_path / "held"
    assert write_sequences(sources, letters(), 3, train, 12, held, 0.25, 3) == (12, 3)
    training, evaluation = read_sequences(train, 3), read_sequences(held, 3)
    assert sorted(training[:, 0].tolist()) == [3] * 6 + [4] * 6
    assert evaluation[:, 0].tolist() == [3, 4, 3]  # the first and every fourth of each, three at most
    assert [source.report.complete for source in sources] == [False, False]
    assert sum(source.report.tokens for source in sources) == 3 * (12 + 3)
    item = PackedDataset(training)[0]
    assert item["input_ids"].tolist() == training[0].tolist()
    assert item["labels"].dtype == torch.int64


def test_evaluation_text_in_the_training_data_is_found(tmp_path):
    generator = np.random.default_rng(0)
    training, other = generator.integers(0, 50, (2, 30, 64), dtype=np.int32)
    file = tmp_path / "train.tokens"
    training.tofile(file)
    assert passages_in_common(file, other) == (0, 30)
    check_apart(file, other)
    shifted = training.reshape(-1)[5 : 5 + 10 * 64].reshape(10, 64)  # the same text, cut elsewhere
    assert passages_in_common(file, shifted) == (10, 10)
    with pytest.raises(ValueError, match="10 of 10 passages"):
        check_apart(file, shifted)


# settings


def test_any_training_argument_can_be_set():
    found = parse_training_arguments(["lr_scheduler_type=linear", "adam-beta2=0.9", "report_to=none", "tf32=false"])
    assert found == {"lr_scheduler_type": "linear", "adam_beta2": 0.9, "report_to": "none", "tf32": False}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("adam_beta2", "written key=value"),
        ("adam_beta=1", "no argument of Transformers' TrainingArguments; there is adam_beta"),
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


def test_unfinished_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, content in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global_'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# estimates


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


def test_report_survives_json():
    assert json.loads(json.dumps(dataclasses.asdict(TrainingSettings(["a"], 5))))["tokens"] == 5
    assert math.isfinite(TrainingSettings(["a"], 5).steps)
