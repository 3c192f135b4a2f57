"""Options from a YAML file: `--config FILE`."""

import functools
import inspect
import sys
from pathlib import Path

import pytest
from command_line import run

from egmla.commands import app


@pytest.fixture
def asked(monkeypatch):
    """The parameters that `egmla convert` runs with."""
    values = {}
    (command,) = (command for command in app.registered_commands if command.callback.__name__ == "convert")
    monkeypatch.setattr(command, "callback", _recorder(command.callback, values))
    return values


def _recorder(callback, values: dict):
    @functools.wraps(callback)
    def record(**parameters):
        values.update(parameters)

    record.__signature__ = inspect.signature(callback)
    return record


def convert(tmp_path, text: str, *arguments: str):
    (tmp_path / "run.yaml").write_text(text)
    return run("convert", "--config", tmp_path / "run.yaml", *arguments)


def test_a_file_may_hold_everything(tmp_path, asked):
    text = "source: a\ntarget: b\nkv-lora-rank: [8, 12]\nqk_rope_head_dim: 4\nset: {balance: 2, refine.steps: 3}\n"
    result = convert(tmp_path, text + "resume: false\ndtype: bfloat16\nrefine-gate: true\n")
    assert result.exit_code == 0, result.output
    assert (asked["source"], asked["target"]) == ("a", Path("b"))
    assert (asked["kv_lora_rank"], asked["qk_rope_head_dim"]) == ("8,12", 4)
    assert asked["choices"] == ["balance=2", "refine.steps=3"]
    assert (asked["resume"], asked["refine_gate"], asked["exact"]) == (False, True, False)
    assert asked["dtype"].value == "bfloat16"


def test_the_command_line_wins(tmp_path, asked):
    text = "source: a\ntarget: b\ncache: 0.5\nevaluation-windows: 3\nresume: false\n"
    result = convert(tmp_path, text, "other", "--evaluation-windows", "5", "--resume")
    assert result.exit_code == 0, result.output
    assert (asked["source"], asked["target"]) == ("other", Path("b"))
    assert (asked["cache"], asked["evaluation_windows"], asked["resume"]) == (0.5, 5, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exat: true", "'exat' is no option of `egmla convert`; did you mean exact?"),
        ("config: other.yaml", "'config' is no option of `egmla convert`"),
        ("- exact", "must hold options as `name: value`"),
        ("exact: [", "is not valid YAML"),
        ("cache: much", "--cache"),
    ],
)
def test_what_a_file_cannot_hold(tmp_path, asked, text, message):
    result = convert(tmp_path, text, "a", "b")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not asked


def test_a_missing_file(tmp_path):
    result = run("inspect", "--config", tmp_path / "nowhere.yaml")
    assert result.exit_code == 2
    assert "nowhere.yaml cannot be read: No such file or directory" in result.stderr


def test_train_reads_files_and_fields_by_the_same_option(tmp_path, monkeypatch):
    """`--config KEY=VALUE` was there first."""
    given = {}

    def run_shown(start, target, **_):
        given.update(start.keywords, target=target)

    monkeypatch.setattr(sys.modules["egmla.commands.train"].options, "run_shown", run_shown)
    (tmp_path / "run.yaml").write_text("target: new\ndata: [a.txt, b.txt]\ntokens: 5000\n")
    result = run("train", "egmla-kv16-120m", "--config", tmp_path / "run.yaml", "--config", "num_hidden_layers=2")
    assert result.exit_code == 0, result.output
    assert given["target"] == Path("new")
    assert given["settings"].data == ["a.txt", "b.txt"] and given["settings"].tokens == 5000
    assert given["overrides"] == {"num_hidden_layers": 2}
