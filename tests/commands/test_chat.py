"""`egmla generate` without a prompt: a conversation; and the choice of a device."""

import re

import pytest
import torch
from command_line import SHAPE, WORDS, save_tokenizer
from typer.testing import CliRunner

from egmla import EGMLAConfig, EGMLAForCausalLM
from egmla.commands import app
from egmla.commands.common import find_device
from egmla.utils.streaming import Generated


ONE, TWO, ANSWER = WORDS[:3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    config = EGMLAConfig(**SHAPE, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    EGMLAForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def chat(model, lines: str, *options: str):
    arguments = ["generate", str(model), "--max-new-tokens", "3", *options]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, input=lines)


def answers(result) -> list[tuple[int, int]]:
    """Prompt tokens and new tokens of each answer."""
    assert result.exit_code == 0, result.output
    found = re.findall(r"(\d+) tokens in .*prompt of (\d+) tokens", result.stdout)
    return [(int(prompt), int(new)) for new, prompt in found]


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the model reads, as text; it answers each with the same word."""
    read = []

    def stream_answer(model, tokenizer, ids, **options):
        read.append(tokenizer.decode(ids[0]))
        return Generated(ANSWER, ids.shape[1], 1, 1.0, 1, 1, 1, 1.0, 1)

    monkeypatch.setattr("egmla.utils.streaming.stream_answer", stream_answer)
    return read


def test_a_chat_remembers(model, prompts):
    assert len(answers(chat(model, f"{ONE}\n\n{TWO}\n{ONE} {ONE}\n"))) == 3
    # The template ends in a word that the tokenizer does not know.
    assert prompts == [
        f"{ONE} <unk>",
        f"{ONE} {ANSWER} {TWO} <unk>",
        f"{ONE} {ANSWER} {TWO} {ANSWER} {ONE} {ONE} <unk>",
    ]


def test_the_system_message_comes_first(model):
    ((with_system, _),) = answers(chat(model, "Alice was\n", "--system", "Alice"))
    assert with_system == 4


@pytest.mark.parametrize("lines", ["Alice\n/exit\nAlice was\n", "Alice\n  /exit  \n", "Alice\n", "Alice"])
def test_a_chat_ends(model, lines):
    assert len(answers(chat(model, lines))) == 1


def test_a_chat_without_a_template_continues_the_text(model, prompts):
    assert len(answers(chat(model, f"{ONE}\n{TWO}\n", "--no-chat"))) == 2
    assert prompts == [ONE, f"{ONE} {ANSWER} {TWO}"]
    refused = chat(model, "Alice\n", "--no-chat", "--system", "Alice")
    assert refused.exit_code == 1 and "the chat template is turned off" in refused.stderr


def test_standard_output_holds_answers_alone(model):
    result = chat(model, "Alice\n")
    assert "/exit or Ctrl-D" in result.stderr and "/exit" not in result.stdout


def test_a_model_out_of_reach_is_named():
    result = CliRunner().invoke(app, ["generate", "owner/nowhere", "--prompt", "a"])
    assert result.exit_code == 1
    assert "owner/nowhere is no local folder, and the Hub has no such model or cannot be reached" in result.stderr


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_devices(monkeypatch, name, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert find_device(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:1", "PyTorch sees 1 GPUs here"),
        ("gpu", "must be auto, cpu, cuda"),
        ("cpu:0", "must be auto, cpu, cuda"),
        ("cuda:", "must be auto, cpu, cuda"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, name, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"--device {name}: ") as error:
        find_device(name)
    assert message in str(error.value)
