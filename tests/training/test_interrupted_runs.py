"""Interrupted runs: kills, full disks, losses that are not finite, other settings, room on the disk."""

import errno
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import run
from runs import SMALL, heal, same_weights, weights
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from egmla import EGMLAConfig
from egmla.training import DivergedError
from egmla.training.run_folders import RunFolders, check_space
from egmla.training.trainer import DistillationTrainer


pytestmark = pytest.mark.long  # in front, see conftest.py


pytest.importorskip("matplotlib")

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from egmla.training.trainer import ProgressReport
from runs import heal

def kill(self, args, state, control, **kwargs):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

ProgressReport.on_step_end = kill
heal(Path({models!r}), Path({target!r}), **{changes!r})
"""


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 3, "micro_batch_size": 2}], ids=["weights", "adapters"])
def test_a_killed_run_resumes_bit_for_bit(models, healed, loaded_python, tmp_path, changes):
    uninterrupted, whole = healed
    if changes:
        uninterrupted = tmp_path / "whole"
        whole = heal(models, uninterrupted, **changes)
    target = tmp_path / "killed"
    script = KILLED.format(
        tests=str(Path(__file__).parents[1] / "helpers"),
        models=str(models),
        target=str(target),
        changes=changes,
        step=10,
    )
    done = loaded_python.run(script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    work = tmp_path / "killed.checkpoints"
    assert not target.exists()
    assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    # A kill in the middle of a save leaves an incomplete checkpoint.
    (work / "checkpoint-12").mkdir()
    (work / "checkpoint-12" / "model.safetensors").write_bytes(b"half of it")
    report = heal(models, target, **changes)
    assert report["resumed_at_step"] == 8
    assert report["losses"] == whole["losses"]
    assert report["evaluations"] == whole["evaluations"]
    assert report["perplexity"] == whole["perplexity"]
    assert same_weights(target, uninterrupted)


def test_resume_wants_the_same_run(models, tmp_path, monkeypatch):
    target, work = tmp_path / "healed", tmp_path / "healed.checkpoints"
    monkeypatch.setattr("egmla.training.run.write_target", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        heal(models, target)
    assert {path.name for path in work.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}
    with pytest.raises(ValueError, match=r"other settings \(seed; seed was 0 and is 1\).*--no-resume"):
        heal(models, target, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(data"):
        heal(models, target, data=[str(models / "other.txt")])
    monkeypatch.undo()
    report = heal(models, target)  # all steps were done; writing the target was left
    assert report["resumed_at_step"] == 12
    assert len(report["losses"]) == 12
    assert not work.exists()


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_resume_wants_the_same_model(models, tmp_path, monkeypatch, lora_rank):
    """A model of another rank is refused, and so are other weights of the same shapes under the same name."""
    half = shutil.copytree(models / "half", tmp_path / "half")
    monkeypatch.setattr("egmla.training.run.write_target", fail_with(KeyboardInterrupt()))

    def start():
        heal(models, tmp_path / "healed", model=str(half), lora_rank=lora_rank)

    with pytest.raises(KeyboardInterrupt):
        start()
    config = EGMLAConfig.from_pretrained(half)
    saved = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**saved, "kv_lora_rank": config.kv_lora_rank - 4}))
    expected = f"kv_lora_rank was {config.kv_lora_rank} and is {config.kv_lora_rank - 4}"
    with pytest.raises(ValueError, match=rf"other settings \(configuration.kv_lora_rank; configuration.{expected}\)"):
        start()
    (half / "config.json").write_text(json.dumps(saved))
    tensors = load_file(half / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] += 0.01
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other settings \(weights_sha256; weights_sha256 was '"):
        start()
    shutil.copyfile(models / "half" / "model.safetensors", half / "model.safetensors")
    with pytest.raises(KeyboardInterrupt):  # all steps are done, and writing the target fails
        start()


def test_a_resumed_run_gives_no_advice_on_bf16(models, tmp_path, monkeypatch):
    monkeypatch.setattr("egmla.training.run.multiplies_bf16", lambda: False)
    monkeypatch.setattr("egmla.training.run.write_target", fail_with(KeyboardInterrupt()))
    said: list[str] = []
    # Four steps and one evaluation: bf16 is slow on many processors.
    options = {"bf16": True, "tokens": 500, "eval_tokens": 64, "places": {"say": said.append}}
    with pytest.raises(KeyboardInterrupt):
        heal(models, tmp_path / "healed", **options)
    assert any(line.startswith("--bf16: this processor") for line in said) != torch.cuda.is_available()
    said.clear()
    monkeypatch.undo()
    monkeypatch.setattr("egmla.training.run.multiplies_bf16", lambda: False)
    assert heal(models, tmp_path / "healed", **options)["resumed_at_step"] == 4
    assert not any(line.startswith("--bf16") for line in said)


@pytest.mark.parametrize("steps", [2, 6], ids=["before the first checkpoint", "after it"])
def test_no_resume_starts_over(models, healed, tmp_path, monkeypatch, steps):
    """It removes checkpoints of other settings, too."""
    monkeypatch.setattr("egmla.training.trainer.ProgressReport.on_step_end", interrupt_at(steps))
    with pytest.raises(KeyboardInterrupt):
        heal(models, tmp_path / "healed", seed=1)
    monkeypatch.undo()
    report = heal(models, tmp_path / "healed", places={"resume": False})
    assert report["resumed_at_step"] == 0 and report["settings"]["seed"] == 0
    assert report["losses"] == healed[1]["losses"]


def test_other_settings_are_welcome_before_the_first_checkpoint(models, healed, tmp_path, monkeypatch):
    monkeypatch.setattr("egmla.training.trainer.ProgressReport.on_step_end", interrupt_at(2))
    with pytest.raises(KeyboardInterrupt):
        heal(models, tmp_path / "healed", sequence_length=16)
    monkeypatch.undo()
    assert heal(models, tmp_path / "healed")["losses"] == healed[1]["losses"]


def interrupt_at(step: int):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize(
    ("steps", "options", "said", "resumed"),
    [
        (
            2,
            ("--resume",),
            "There is no checkpoint yet: the same command starts from step 0, with the tokens already prepared.",
            0,
        ),
        (6, (), "checkpoint-4 is kept, and the same command resumes from there.", 4),
    ],
)
def test_an_interrupted_command_says_what_it_left_and_the_same_one_resumes(
    models, tmp_path, monkeypatch, steps, options, said, resumed
):
    common = ["heal", models / "half", tmp_path / "healed", "--teacher", models / "source"]
    common += ["--data", models / "text.txt", *options]
    for name, value in SMALL.items():
        common += [f"--{name.replace('_', '-')}", value]
    monkeypatch.setattr("egmla.training.trainer.ProgressReport.on_step_end", interrupt_at(steps))
    stopped = run(*common)
    monkeypatch.undo()
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1].startswith("Interrupted.") and said in stopped.stderr
    finished = run(*common)
    assert finished.exit_code == 0, finished.output
    assert (f"Resuming from step {resumed} of 12" in finished.stderr) == bool(resumed)
    report = json.loads((tmp_path / "healed" / "training_report.json").read_text())
    assert report["resumed_at_step"] == resumed and report["plan"]["steps"] == 12


def test_two_runs_in_one_folder_are_refused(models, tmp_path):
    folders = RunFolders.of(tmp_path / "healed")
    with folders.locked(), pytest.raises(BlockingIOError, match="Another process is training"):
        heal(models, tmp_path / "healed")
    assert not list(tmp_path.iterdir())
    heal(models, tmp_path / "healed")


@pytest.mark.parametrize("name", ["thesis.txt", "run.json"])
@pytest.mark.parametrize("resume", [True, False])
def test_folders_of_something_else_are_left_alone(models, tmp_path, name, resume):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("[]")
    with pytest.raises(FileExistsError, match="holds files that no run of heal or train made"):
        heal(models, tmp_path / "healed", places={"resume": resume, "checkpoints": tmp_path / "mine"})
    assert (tmp_path / "mine" / name).read_text() == "[]"


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights(models, tmp_path, monkeypatch, where):
    factor = torch.nan if where == "loss" else 1.0
    monkeypatch.setattr(DistillationTrainer, "compute_loss", poisoned(DistillationTrainer.compute_loss, factor))
    with pytest.raises(DivergedError, match=r"optimiser step 7 .*checkpoint-4") as caught:
        heal(models, tmp_path / "healed")
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "healed").exists()
    checkpoint = tmp_path / "healed.checkpoints" / "checkpoint-4"
    assert all(tensor.isfinite().all() for tensor in weights(checkpoint).values())
    AutoTokenizer.from_pretrained(checkpoint)


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def poisoned(compute, factor: float):
    """A loss that is multiplied by `factor` at the seventh step, and has an infinite gradient there."""

    def compute_loss(self, model, inputs, **kwargs):
        loss = compute(self, model, inputs, **kwargs)
        return InfiniteGradient.apply(loss) * factor if model.training and self.state.global_step == 6 else loss

    return compute_loss


def test_a_full_disk_leaves_the_last_checkpoint(models, healed, tmp_path, monkeypatch):
    save = torch.save

    def full(content, file, *args, **kwargs):
        if "checkpoint-8" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-4 is kept, and the same command resumes"):
        heal(models, tmp_path / "healed")
    assert not (tmp_path / "healed").exists()
    monkeypatch.undo()
    report = heal(models, tmp_path / "healed")
    assert report["resumed_at_step"] == 4
    assert report["losses"] == healed[1]["losses"]


def test_a_run_that_fails_before_its_first_checkpoint_is_not_in_the_way(models, tmp_path, monkeypatch):
    """After a full disk the tokens are kept for the same command; after any other error nothing is left."""

    def failing(error):
        def create(*args, **kwargs):
            raise error

        return create

    monkeypatch.setattr(DistillationTrainer, "create_optimizer", failing(ValueError("no such optimiser")))
    with pytest.raises(ValueError, match="no such optimiser"):
        heal(models, tmp_path / "healed")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(DistillationTrainer, "create_optimizer", failing(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="the same command starts from step 0, with the tokens already prepared"):
        heal(models, tmp_path / "healed")
    monkeypatch.undo()
    assert (tmp_path / "healed.checkpoints" / "train.tokens").is_file()
    assert heal(models, tmp_path / "healed")["resumed_at_step"] == 0


@pytest.mark.parametrize("adapters, needed", [(False, 3 * 1200 + 1000 + 400), (True, 3 * 300 + 1000 + 400)])
def test_room_for_a_run(tmp_path, monkeypatch, adapters, needed):
    """Three checkpoints, the target and the tokens; files of an interrupted run count as room."""
    planned = {"memory_bytes": {"weights": 1000, "gradients and optimizer": 300}, "tokens": 100}
    folders = RunFolders.of(tmp_path / "target")
    folders.work.mkdir()
    for written in (0, 600):
        (folders.work / "train.tokens").write_bytes(bytes(written))
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=needed - written: SimpleNamespace(free=free))
        check_space(folders, planned, adapters)
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=needed - written - 1: SimpleNamespace(free=free))
        with pytest.raises(OSError, match="needs about"):
            check_space(folders, planned, adapters)


def test_heal_refuses_a_disk_without_room(models, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    with pytest.raises(OSError, match=r"needs about .* GiB left; free space"):
        heal(models, tmp_path / "healed", tokens=2_000_000)
