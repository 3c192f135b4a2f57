"""Whole runs of `egmla heal`: their results, what they refuse, two processes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import difference
from command_line import SHAPE, run
from runs import SMALL, heal, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.model_cards import write_card
from egmla.publishing.preflight import check_folder
from egmla.training.data import TextSource, packed_sequences
from egmla.training.report import outcome
from egmla.utils.perplexity import perplexity, recovered_share


pytestmark = pytest.mark.long  # in front, see conftest.py


pytest.importorskip("matplotlib")


# healing


def test_heal_leaves_a_model_and_a_report(models, tmp_path):
    target = tmp_path / "healed"
    said = []
    report = heal(models, target, eval_data=[str(models / "other.txt")], places={"say": said.append})
    assert json.loads((target / "training_report.json").read_text()) == json.loads(json.dumps(report, default=str))
    assert (target / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert (target / "conversion_report.json").is_file()
    assert not list(tmp_path.glob("*.checkpoints"))
    assert not list(target.glob("*.bin"))
    check_folder(target)  # code, safetensors, no paths of this machine
    assert report["command"].startswith("egmla heal half TARGET --teacher source --data text.txt --tokens 1500")
    assert "--eval-data other.txt" in report["command"]
    # 12 steps of 4 x 32 tokens; perplexities are those of `egmla.utils.perplexity` on the same sequences.
    assert (report["plan"]["steps"], report["tokens"], len(report["losses"])) == (12, 1536, 12)
    assert [row["step"] for row in report["evaluations"]] == [0, 6, 12]
    tokenizer = AutoTokenizer.from_pretrained(target)
    sequences = list(packed_sequences(TextSource(str(models / "other.txt")), tokenizer, 32))[:8]
    windows = torch.stack([torch.from_numpy(ids).long() for ids in sequences])
    for name, folder in (("0 tokens", models / "half"), ("trained", target), ("teacher", models / "source")):
        measured = perplexity(AutoModelForCausalLM.from_pretrained(folder).eval(), windows)
        assert report["perplexity"][name] == pytest.approx(measured, rel=1e-5), name
    assert any(line.startswith("0 tokens: perplexity") for line in said)
    # The logged rate is not the one of the gates, which is five times as high.
    assert max(row["learning_rate"] for row in report["losses"]) == pytest.approx(SMALL["learning_rate"])
    trained, before = weights(target), weights(models / "half")
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert any("kv_gate_norm" in name for name in changed)
    assert not any("mlp." in name or "embed_tokens" in name or "lm_head" in name for name in changed)
    config = EGMLAConfig.from_pretrained(target)
    assert config.use_cache
    assert config.to_diff_dict() == EGMLAConfig.from_pretrained(models / "half").to_diff_dict()


def test_healing_lowers_the_divergence_and_cross_entropy_needs_no_teacher(models, tmp_path):
    other = [str(models / "other.txt")]
    distilled = heal(models, tmp_path / "kl", tokens=20_000, eval_every=100, eval_data=other)
    losses = [row["loss"] for row in distilled["losses"]]
    assert sum(losses[-20:]) < 0.85 * sum(losses[3:23])
    plain = heal(models, tmp_path / "ce", teacher=None, kl_weight=0.0, ce_weight=1.0, eval_data=other)
    assert plain["perplexity"]["teacher"] is None
    assert plain["perplexity"]["0 tokens"] == pytest.approx(distilled["perplexity"]["0 tokens"], rel=1e-5)


def test_recovered_share_is_of_the_log_perplexity():
    assert recovered_share(10.0, 40.0, 20.0) == pytest.approx(0.5)
    assert recovered_share(10.0, 9.0, 8.0) is None
    assert recovered_share(None, 40.0, 20.0) is None


@pytest.mark.parametrize(
    ("teacher", "before", "after", "said"),
    [
        (10.0, 40.0, 20.0, "won back 50.0% of what the conversion had lost"),
        (10.0, 40.0, 44.0, "made the model worse on this text: perplexity rose from 40.000 to 44.000"),
        (None, 40.0, 44.0, "made the model worse"),
        (10.0, 9.0, 9.5, "made the model worse"),
        (10.0, 40.0, 9.0, "won back all that the conversion had lost: perplexity is below the teacher's"),
        (10.0, 9.0, 8.0, None),
        (None, 40.0, 20.0, None),
    ],
)
def test_outcomes_are_said_plainly(teacher, before, after, said):
    found = outcome({"teacher": teacher, "0 tokens": before, "trained": after})
    assert found is None if said is None else said in found


def test_lora_healing_is_merged_and_a_second_healing_remembers_the_first(models, tmp_path):
    first = heal(models, tmp_path / "lora", lora_rank=4, gate_learning_rate=0.02, dtype="bfloat16")
    trained = weights(tmp_path / "lora")
    assert trained.keys() == weights(models / "half").keys()
    assert {tensor.dtype for tensor in trained.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert first["plan"]["trained_parameters"] < first["plan"]["parameters"] / 2
    assert first["dtype"] == "bfloat16"
    second = heal(models, tmp_path / "again", model=str(tmp_path / "lora"), stage="gate")
    # Ten times the rate that gates have together with attention: they start at identity and nothing else is trained.
    assert second["settings"]["gate_learning_rate"] == pytest.approx(50 * second["settings"]["learning_rate"])
    assert [report["origin"]["model"] for report in second["earlier"]] == ["half"]
    assert second["origin"]["model"] == "lora"
    assert second["perplexity"]["0 tokens"] == pytest.approx(first["perplexity"]["trained"], rel=0.02)


def test_dry_run_writes_and_loads_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(EGMLAForCausalLM, "from_pretrained", None)
    plan = heal(models, tmp_path / "healed", places={"dry_run": True})
    assert plan["tokens"] == 1536
    assert plan["flops"] > 0
    assert not list(tmp_path.iterdir())


def test_dry_run_of_the_command_estimates_time(models, tmp_path):
    options = [
        "--teacher",
        models / "source",
        "--data",
        models / "text.txt",
        "--tokens",
        "2M",
        "--sequence-length",
        32,
    ]
    result = run("heal", models / "half", tmp_path / "healed", *options, "--dry-run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"rough time here +│ +(under a minute|\d+ (minute|hour|day)s?) ", result.stdout)
    assert re.search(r"of memory, roughly (under a minute|\d+ \w+) here", result.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bf16", "fast"), [(True, False), (True, True), (False, False)])
def test_bf16_is_advised_against_where_it_is_slow(models, tmp_path, monkeypatch, bf16, fast):
    monkeypatch.setattr("egmla.training.run.multiplies_bf16", lambda: fast)
    said = []
    heal(models, tmp_path / "healed", places={"dry_run": True, "say": said.append}, bf16=bf16)
    advised = bf16 and not fast and not torch.cuda.is_available()
    assert [line.startswith("--bf16: this processor has no bf16 instructions") for line in said] == [True] * advised


def test_the_card_of_a_healed_model_has_the_results_of_its_report(models, tmp_path):
    """It shows results at 0 tokens beside the healed ones, and each stage's command; nothing untrue is said."""
    heal(models, tmp_path / "first", stage="gate")
    report = heal(models, tmp_path / "second", model=str(tmp_path / "first"), dtype="bfloat16", lora_rank=2)
    card = write_card(tmp_path / "second")[-1].read_text()
    section = card.partition("\n## Healing\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    perplexity = {name: f"{value:.3f}" for name, value in report["perplexity"].items()}
    assert rows[2:] == [
        ["teacher", "", perplexity["teacher"]],
        ["before the last stage", "1,536", perplexity["0 tokens"]],
        ["this model", "3,072", perplexity["trained"]],
    ]
    assert section.count("egmla heal ") == 2
    assert "stage `gate`" in section and "LoRA of rank 2" in section and "rounded to bfloat16" in section
    assert report["data"][0]["sha256"] in section
    assert "at identity" not in card and "Nothing was trained" not in card
    assert "(bfloat16)" in card
    check_folder(tmp_path / "second")
    first = write_card(tmp_path / "first")[-1].read_text()
    assert "| converted | 0 |" in first and "rounded to" not in first
    (tmp_path / "first" / "training_report.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks command, commit, data"):
        write_card(tmp_path / "first")


def test_a_model_of_the_hub_keeps_its_reports(models, healed, tmp_path, monkeypatch):
    """Reports of conversion and earlier healing are fetched by the Hub's own functions, not by `Path`."""
    repository, revision = tmp_path / "hub" / "models--me--first", 10 * "0123"
    shutil.copytree(healed[0], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    report = heal(models, tmp_path / "second", model="me/first")
    assert len(report["earlier"]) == 1 and report["origin"]["revision"] == revision
    assert (tmp_path / "second" / "conversion_report.json").is_file()
    assert "before the last stage" in write_card(tmp_path / "second")[-1].read_text()


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "some"), "a number of tokens is written"),
        (("--sequence-length", "999"), "sequence_length=999: must be from 2 to 128"),
        (("--sequence-length", "128", "--batch-size", "2000"), "at least 2000 (one batch)"),
        (("--batch-size", "6", "--micro-batch-size", "4"), "choose a multiple of 4"),
        (("--kl-weight", "0"), "one must be above 0"),
        (("--lora-rank", "0"), "lora_rank=0: must be at least 1"),
        (("--data", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--set", "max_steps=4"), "max_steps follows from other options"),
        (("--set", "lr_scheduler_type=zigzag"), "zigzag"),
        (("--eval-share", "0"), "eval_share=0"),
        (("--eval-data", "TEXT"), "evaluated on and trained on"),
        (("--eval-data", "COPY"), "occur word for word"),
        (("--checkpoints", "WITHIN"), "cannot be one folder, nor one within the other"),
        (("--checkpoints", "AROUND"), "cannot be one folder, nor one within the other"),
        (("--set", "optim=lomo"), "lomo"),
        (("--warmup-share", "1.5"), "warmup_share=1.5"),
        (("--learning-rate", "0"), "learning_rate=0: must be above 0"),
        (("--temperature", "0"), "temperature=0: must be above 0"),
        (("--teacher", "OTHER"), "vocabulary of 40"),
        (("--teacher", "NONE"), "no folder"),
    ],
)
def test_heal_refuses(models, tmp_path, options, message):
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 40}, num_key_value_heads=2)).save_pretrained(
        tmp_path / "other"
    )
    copy = tmp_path / "copy.txt"
    copy.write_text("Foreword. " + (models / "text.txt").read_text()[:9000])
    names = {
        "TEXT": models / "text.txt",
        "COPY": copy,
        "OTHER": tmp_path / "other",
        "WITHIN": tmp_path / "healed" / "checkpoints",
        "AROUND": tmp_path,
        "NONE": "./nowhere",
    }
    given = ["--data", models / "text.txt", "--tokens", 1500, "--sequence-length", 32, "--batch-size", 4]
    given += ["--teacher", models / "source", *(names.get(option, option) for option in options)]
    result = run("heal", models / "half", tmp_path / "healed", *given)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("healed*"))


def test_heal_refuses_other_models_and_a_full_target(models, tmp_path):
    common = ("--data", models / "text.txt", "--tokens", 1500)
    assert "healing trains an EG-MLA model" in run("heal", models / "source", tmp_path / "healed", *common).stderr
    assert "is not empty" in run("heal", models / "half", models / "source", *common).stderr
    assert "name it as teacher" in run("heal", models / "half", tmp_path / "healed", *common).stderr
    bare = tmp_path / "bare"
    EGMLAForCausalLM.from_pretrained(models / "half").save_pretrained(bare)
    assert "has no tokenizer" in run("heal", bare, tmp_path / "healed", *common).stderr
    assert not (tmp_path / "healed").exists()


def test_heal_refuses_a_teacher_with_other_tokens(models, tmp_path):
    LlamaForCausalLM.from_pretrained(models / "source").save_pretrained(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(models / "source")
    tokenizer.add_tokens(["something"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="has other tokens"):
        heal(models, tmp_path / "healed", teacher=str(tmp_path / "teacher"))


def test_heal_refuses_to_hold_out_what_occurs_elsewhere(models, tmp_path):
    copy, text = tmp_path / "copy.txt", (models / "text.txt").read_text()
    copy.write_text(text[30_000:] + text[:30_000])
    longer = {"tokens": 80_000, "sequence_length": 128, "eval_tokens": 2048}
    with pytest.raises(ValueError, match="occur word for word"):
        heal(models, tmp_path / "healed", data=[str(models / "text.txt"), str(copy)], **longer)
    assert [path.name for path in tmp_path.iterdir()] == ["copy.txt"]


def test_heal_refuses_a_tokenizer_larger_than_the_vocabulary(models, tmp_path):
    model = EGMLAForCausalLM.from_pretrained(models / "half")
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(models / "half")
    tokenizer.add_tokens(["something"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"tokenizer has 321 tokens and the model a vocabulary of 320; save the model"
    ):
        heal(models, tmp_path / "healed", model=tmp_path / "model", teacher=None, kl_weight=0.0, ce_weight=1.0)


# processes


HELPERS = Path(__file__).parents[1] / "helpers"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.fixture
def assert_two_train_as_one(models, tmp_path):
    """Heal in one process, then by the function given, which runs a command in two: the same losses and weights."""

    def check(run_in_two) -> None:
        (tmp_path / "half").mkdir()
        for file in (models / "half").iterdir():
            (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "half" / "config.json").read_text())
        (tmp_path / "half" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
        # Five evaluation sequences, which two processes cannot share evenly.
        changes = {"tokens": 20 * 128, "eval_tokens": 5 * 32}
        one = heal(models, tmp_path / "one", model=str(tmp_path / "half"), **changes)
        target = tmp_path / "two"
        command = ["heal", tmp_path / "half", target, "--teacher", models / "source", "--data", models / "text.txt"]
        for name, value in {**SMALL, **changes}.items():
            command += [f"--{name.replace('_', '-')}", value]
        run_in_two([str(part) for part in command])
        two = json.loads((target / "training_report.json").read_text())
        assert two["settings"]["processes"] == 2
        losses = [[row["loss"] for row in report["losses"]] for report in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        for name in ("0 tokens", "trained"):
            assert two["perplexity"][name] == pytest.approx(one["perplexity"][name], rel=1e-4)
        left, right = weights(tmp_path / "one"), weights(target)
        assert max(difference(tensor, right[name]) for name, tensor in left.items()) < 1e-4

    return check


def test_two_launched_processes_train_as_one(assert_two_train_as_one):
    """`accelerate launch` with two gloo ranks."""

    def launch(command: list[str]) -> None:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0", "-m", "egmla"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "parameters are DTensor" not in done.stderr

    assert_two_train_as_one(launch)


def test_two_sharded_processes_train_as_one(assert_two_train_as_one, loaded_python):
    """FSDP2: two gloo ranks."""
    code = f"import runpy; runpy.run_path({str(HELPERS / 'fsdp_on_cpu.py')!r}, run_name='__main__')"

    def fork(command: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}

        def run(rank: str):
            environment = {**os.environ, **FSDP2, **ranks, "RANK": rank, "LOCAL_RANK": rank}
            return loaded_python.run(code, *command, env=environment)

        with ThreadPoolExecutor(2) as both:
            for done in both.map(run, ("0", "1")):
                assert done.returncode == 0, done.stderr[-3000:]
                assert "parameters are DTensor" in done.stderr

    assert_two_train_as_one(fork)


def test_adapters_are_not_sharded(models, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"lora_rank=2 with FSDP or DeepSpeed.*--multi_gpu"):
        heal(models, tmp_path / "healed", lora_rank=2)
    assert not list(tmp_path.iterdir())


def test_healed_models_load_without_the_package(healed, loaded_clean_python):
    folder = str(healed[0])
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T; "
        f"m = A.from_pretrained({folder!r}, trust_remote_code=True); "
        f"T.from_pretrained({folder!r}); "
        "print(m(torch.arange(5)[None]).logits.double().sum().item(), 'egmla' in sys.modules)"
    )
    done = loaded_clean_python.run(script)
    assert done.returncode == 0, done.stderr
    total, imported = done.stdout.split()[-2:]
    model = EGMLAForCausalLM.from_pretrained(folder)
    assert imported == "False"
    assert float(total) == pytest.approx(model(torch.arange(5)[None]).logits.double().sum().item(), rel=1e-5)
