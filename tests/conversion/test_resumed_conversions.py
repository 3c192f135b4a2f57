"""Conversions that are stopped at any point: the same command finishes them, to the files of one that never was."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import conversions
import pytest
import torch
from transformers import AutoModelForCausalLM

from egmla.conversion import Recipe, Refinement, convert, convert_checkpoint, job, journal, shards


pytestmark = pytest.mark.long  # in front, see conftest.py


make_source = conversions.make_family_source  # the fixture

SMALLER = {"kv_lora_rank": 12, "qk_rope_head_dim": 6, "calibration_tokens": 1024}
REFINED = {**SMALLER, "refinement": Refinement(steps=2)}
CLOSED_FORM = Refinement(steps=0)
NORMED = Recipe(slots="uniform", latent_norm=True)
WIDTHS = {"kv_lora_rank": 9, "qk_rope_head_dim": 10, "calibration_tokens": 1024}
KINDS = {
    "refined": ("llama linear", REFINED),
    "exact": ("llama linear", {"exact": True}),
    "closed form": ("llama linear", {**SMALLER, "refinement": CLOSED_FORM}),
    "ranks by energy": ("llama linear", {**SMALLER, "recipe": Recipe(ranks="energy"), "refinement": CLOSED_FORM}),
    "latent source, refined": (
        "deepseek_v3",
        {"kv_lora_rank": 8, "calibration_tokens": 1024, "refinement": Refinement(steps=2)},
    ),
    "exact in layout deepseek_v3": ("deepseek_v3", {"exact": True, "layout": "deepseek_v3"}),
    "refined in layout deepseek_v3": (
        "llama linear",
        {**WIDTHS, "layout": "deepseek_v3", "recipe": NORMED, "refinement": Refinement(steps=2)},
    ),
}


@contextmanager
def stopped_at(owner, name, when):
    """Raises as Ctrl-C does instead of calling a function, at the first call for which `when(number, *arguments)`."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(args)
        if when(len(calls), *args):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


def assert_same_files(target: Path, whole: Path) -> None:
    assert {path.name for path in target.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        if path.name not in ("conversion_report.json", "conversion_report.png"):  # they tell of time and place
            assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    reports = [json.loads((folder / "conversion_report.json").read_text()) for folder in (target, whole)]
    assert reports[0]["layers"] == reports[1]["layers"]
    assert reports[0]["weights_sha256"] == reports[1]["weights_sha256"]


@pytest.fixture(scope="module", autouse=True)
def several_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardWriter.__init__, "__defaults__", (0, 60_000))
        yield


@pytest.fixture(scope="module")
def whole(make_source, calibration, tmp_path_factory):
    """A conversion of a kind in `KINDS` that nothing stopped, and the arguments of it."""
    made = {}

    def make(kind: str):
        if kind not in made:
            name, arguments = KINDS[kind]
            arguments = {**arguments, "calibration": None if "exact" in kind else calibration}
            made[kind] = tmp_path_factory.mktemp("whole") / "t", make_source(name)[1], arguments
            convert_checkpoint(made[kind][1], made[kind][0], **arguments)
            assert len(list(made[kind][0].glob("model-*.safetensors"))) > 1
        return made[kind]

    return make


# What raises, and at which of its calls: the model has two layers.
POINTS = {
    "the first layer's part is written, not noted": (journal.Journal, "finish_layer", lambda call, *_: call == 1),
    "the second layer's part is written, not noted": (journal.Journal, "finish_layer", lambda call, *_: call == 2),
    "its states are written, not noted": (journal.Journal, "_write", lambda call, *_: call == 2),
    "it is noted, the states before it are there": (journal.Journal, "_remove_stale", lambda call, *_: call == 2),
    "no shard is written": (shards.ShardWriter, "finish", lambda call, *_: call == 1),
    "one shard is written": (shards, "_join", lambda call, *_: call == 2),
    "the report is written, the journal knows of no model": (journal.Journal, "finish", lambda call, *_: call == 1),
    "the parts are there": (journal.Journal, "_remove_stale", lambda call, *_: call == 3),
}


@pytest.mark.parametrize("point", POINTS)
def test_stopped_at_work(whole, tmp_path, point):
    expected, folder, arguments = whole("refined")
    with stopped_at(*POINTS[point]):
        convert_checkpoint(folder, tmp_path / "t", **arguments)
    assert not (tmp_path / "t").exists()
    convert_checkpoint(folder, tmp_path / "t", **arguments)
    assert_same_files(tmp_path / "t", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("there", [False, True], ids=["new target", "empty target"])
@pytest.mark.parametrize("moving", ["first", "third", "config.json", "journal.json"])
def test_stopped_while_files_move(whole, tmp_path, there, moving):
    """Until config.json, which comes last, nothing looks like a model; what has arrived stands in no one's way."""
    expected, folder, arguments = whole("closed form")
    target = tmp_path / "t"
    if there:
        target.mkdir()
    point = {"first": lambda call, *_: call == 1, "third": lambda call, *_: call == 3}
    when = point.get(moving, lambda call, path, *_: path.name == moving)
    with stopped_at(Path, "unlink" if moving == "journal.json" else "rename", when):
        convert_checkpoint(folder, target, **arguments)
    assert (target / "config.json").exists() == (moving == "journal.json")
    work = []
    convert_checkpoint(folder, target, **arguments, progress=lambda *step: work.append(step))
    assert work == [] or moving == "first"
    assert_same_files(target, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert_checkpoint(folder, target, **arguments)


def test_files_of_others_in_a_half_published_target(whole, tmp_path):
    _, folder, arguments = whole("exact")
    with stopped_at(Path, "rename", lambda call, *_: call == 3):
        convert_checkpoint(folder, tmp_path / "t", **arguments)
    (tmp_path / "t/mine").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert_checkpoint(folder, tmp_path / "t", **arguments)
    assert (tmp_path / "t/mine").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_on_behind_its_first_layer(whole, tmp_path, kind):
    expected, folder, arguments = whole(kind)
    with stopped_at(journal.Journal, "finish_layer", lambda call, *_: call == 2):
        convert_checkpoint(folder, tmp_path / "t", **arguments)
    done = []
    convert_checkpoint(folder, tmp_path / "t", **arguments, progress=lambda _, *step: done.append(step[0]))
    assert min(done) >= 1, "the first layer was done again"
    assert_same_files(tmp_path / "t", expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t").config.num_hidden_layers == 2


def test_report_covers_all_runs(whole, tmp_path, monkeypatch):
    """Time and memory of a run that was stopped count; each look at the clock is ten seconds after the one before."""
    expected, folder, arguments = whole("exact")
    assert json.loads((expected / "conversion_report.json").read_text())["runs"] == 1
    clock = iter(range(0, 1000, 10))
    for module in (convert, journal):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(journal, "peak_bytes", lambda: 7)
    with stopped_at(journal.Journal, "finish_layer", lambda call, *_: call == 2):
        convert_checkpoint(folder, tmp_path / "t", **arguments)  # starts at 0, the first layer ends at 10
    monkeypatch.setattr(journal, "peak_bytes", lambda: 5)
    report = convert_checkpoint(folder, tmp_path / "t", **arguments)  # 20; 30 and 40
    assert (report["runs"], report["seconds"], report["peak_bytes"]) == (2, 30.0, 7)


def test_no_resume_starts_over(whole, tmp_path):
    expected, folder, arguments = whole("closed form")
    with stopped_at(journal.Journal, "finish_layer", lambda call, *_: call == 2):
        convert_checkpoint(folder, tmp_path / "t", **arguments)
    # Other settings may be given, too.
    with stopped_at(job, "target_config", lambda *_: True):
        convert_checkpoint(folder, tmp_path / "t", **{**arguments, "kv_lora_rank": 11}, resume=False)
    done = []
    convert_checkpoint(
        folder, tmp_path / "t", **arguments, resume=False, progress=lambda _, *step: done.append(step[0])
    )
    assert min(done) < 1
    assert_same_files(tmp_path / "t", expected)


def test_other_threads_are_refused(whole, tmp_path):
    """They sum in another order, and the result would be neither run's."""
    expected, folder, arguments = whole("refined")
    assert json.loads((expected / "conversion_report.json").read_text())["machine"]["threads"] == 1
    with stopped_at(journal.Journal, "finish_layer", lambda call, *_: call == 2):
        convert_checkpoint(folder, tmp_path / "t", **arguments)
    torch.set_num_threads(2)
    try:
        with pytest.raises(
            ValueError, match=r"machine was .*'threads': 1.* and is .*'threads': 2.*OMP_NUM_THREADS sets"
        ):
            convert_checkpoint(folder, tmp_path / "t", **arguments)
    finally:
        torch.set_num_threads(1)
