"""`egmla convert --heal`: a conversion and its healing in one command, resumed from whichever step was interrupted."""

import json
from dataclasses import replace

import pytest
from command_line import run
from runs import heal, same_weights

from egmla.conversion import ConversionSettings, convert_checkpoint
from egmla.training import TrainingSettings, conversion_and_healing, convert_and_heal


TOKENS = 3000


@pytest.fixture
def conversion(models):
    options = {"calibration": models / "text.txt", "calibration_tokens": 2048, "shipped_text": False}
    return ConversionSettings(cache=0.3, evaluate=models / "other.txt", evaluation_windows=2, **options)


@pytest.fixture
def healing(models):
    return TrainingSettings([str(models / "text.txt")], TOKENS, sequence_length=4096, batch_size=4, eval_tokens=512)


def test_it_is_a_conversion_then_a_healing(models, conversion, healing, tmp_path):
    said = []
    report = convert_and_heal(models / "source", tmp_path / "whole", conversion, healing, say=said.append)
    assert "Converting takes roughly" in said[0] and "healing on 3,072 tokens" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    convert_checkpoint(models / "source", tmp_path / "converted", conversion)
    options = {"tokens": TOKENS, "sequence_length": 128, "learning_rate": None, "save_every": None, "eval_every": None}
    options |= {"eval_tokens": 512}
    apart = heal(models, tmp_path / "apart", model=str(tmp_path / "converted"), **options)
    assert same_weights(tmp_path / "whole", tmp_path / "apart")
    assert report["perplexity"] == apart["perplexity"]
    # What is measured is the healed model, and the conversion's report tells what it was before.
    measured = report["measured"]
    assert measured["file"] == "other.txt" and set(measured["caches"]) >= {"source", "0.3"}
    before = json.loads((tmp_path / "converted" / "conversion_report.json").read_text())["evaluation"]
    assert measured["source"] == before["source"] and measured["converted"] != before["converted"]
    assert json.loads((tmp_path / "whole" / "training_report.json").read_text())["measured"] == measured
    assert "evaluation" not in report["conversion"]


@pytest.mark.parametrize("step", ["heal_checkpoint", "measured"])
def test_the_same_call_goes_on(models, conversion, healing, tmp_path, monkeypatch, step):
    calls = []

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion_and_healing, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_and_heal(models / "source", tmp_path / "t", conversion, healing)
    left = {"heal_checkpoint": ["t.converted"], "measured": ["t", "t.converted"]}[step]
    assert sorted(path.name for path in tmp_path.iterdir()) == left

    def count(name):
        function = getattr(conversion_and_healing, name)
        monkeypatch.setattr(
            conversion_and_healing, name, lambda *args, **more: calls.append(name) or function(*args, **more)
        )

    for name in ("convert_checkpoint", "heal_checkpoint", "measured"):
        count(name)
    report = convert_and_heal(models / "source", tmp_path / "t", conversion, healing)
    assert calls == {"heal_checkpoint": ["heal_checkpoint", "measured"], "measured": ["measured"]}[step]
    assert report["measured"]["caches"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert_and_heal(models / "source", tmp_path / "t", conversion, healing)


def test_bad_input_is_named_before_anything_is_converted(models, conversion, healing, tmp_path):
    for change, message in (
        ({"data": [str(tmp_path / "missing.txt")]}, "missing.txt"),
        ({"stage": "nothing"}, "stage"),
        ({"learning_rate": -1.0}, "learning_rate=-1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert_and_heal(models / "source", tmp_path / "t", conversion, replace(healing, **change))
    with pytest.raises(ValueError, match="cache=0"):
        convert_and_heal(models / "source", tmp_path / "t", replace(conversion, cache=0.0), healing)
    assert not list(tmp_path.iterdir())


def test_another_conversion_in_its_place_is_refused(models, conversion, healing, tmp_path):
    convert_checkpoint(models / "source", tmp_path / "t.converted", replace(conversion, evaluate=None, cache=0.5))
    with pytest.raises(FileExistsError, match=r"t\.converted .*other settings \(bits"):
        convert_and_heal(models / "source", tmp_path / "t", conversion, healing)
    convert_and_heal(models / "source", tmp_path / "t", replace(conversion, resume=False, evaluate=None), healing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_a_folder_of_somebody_else_is_not_removed(models, conversion, healing, tmp_path):
    (tmp_path / "t.converted").mkdir()
    (tmp_path / "t.converted" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"t\.converted"):
        convert_and_heal(models / "source", tmp_path / "t", replace(conversion, resume=False), healing)
    assert (tmp_path / "t.converted" / "notes.txt").read_text() == "mine"


def test_command(models, tmp_path):
    text, other = models / "text.txt", models / "other.txt"
    words = ["convert", models / "source", tmp_path / "t", "--cache", 0.3, "--calibration", text, "--heal", "2K"]
    words += ["--no-shipped-text", "--calibration-tokens", 2048]
    plan = run(*words, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert "share of the cache's bytes" in plan.stdout and "optimiser steps" in plan.stdout
    assert not list(tmp_path.iterdir())
    done = run(*words, "--evaluate", other, "--evaluation-windows", 2)
    assert done.exit_code == 0, done.output
    assert "windows of other.txt" in done.stdout and "after 2,048 tokens" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]
    card = (tmp_path / "t" / "README.md").read_text()
    assert "after it was trained, read through its caches" in card
    assert "What each writes after" in card and "  - this model, 0.3 of the bytes: `" in card
    assert "| this model, 0.3 of the bytes | " in card and "facts retrieved" in card
    wrong = run("convert", models / "source", tmp_path / "u", "--exact", "--heal-data", text)
    assert wrong.exit_code == 1 and "--heal-data without --heal" in wrong.output
