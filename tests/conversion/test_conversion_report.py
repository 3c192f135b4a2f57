"""Conversion reports: what they say is what happened, and cards show it."""

import itertools
import json
import shutil

import pytest
import torch
from command_line import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from egmla.conversion import Refinement, convert_checkpoint, report
from egmla.model_cards import render_card
from egmla.samples import sample_text
from egmla.utils.perplexity import perplexity, token_windows


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation") / "book.txt"
    path.write_text(sample_text("evaluation")[:5000].encode("ascii", "ignore").decode())
    return path


@pytest.fixture(scope="module")
def converted(llama_folder, calibration, evaluation, tmp_path_factory):
    """A conversion with per-layer ranks that was evaluated, and its report as it was returned."""
    target = tmp_path_factory.mktemp("converted") / "small"
    stages = []
    returned = convert_checkpoint(
        llama_folder,
        target,
        kv_lora_rank=[12, 20],
        qk_rope_head_dim=8,
        calibration=calibration,
        calibration_tokens=4096,
        refinement=Refinement(steps=3),
        evaluate=evaluation,
        evaluation_windows=2,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert stages[-3:] == [("evaluate source", 2, 2), ("evaluate converted", 1, 2), ("evaluate converted", 2, 2)]
    return target, returned


def test_report_is_what_was_returned(converted):
    target, returned = converted
    written = json.loads((target / "conversion_report.json").read_text())
    assert written == json.loads(json.dumps(returned))
    assert written["settings"]["kv_lora_rank"] == [12, 20] and written["settings"]["calibration_tokens"] == 4096
    assert "--evaluate book.txt --evaluation-windows 2" in written["command"]


def test_perplexities_are_those_of_the_models(converted, llama_folder, evaluation):
    target, returned = converted
    windows = token_windows(AutoTokenizer.from_pretrained(llama_folder), evaluation.read_text(), 256, 2)
    found = returned["evaluation"]
    assert (found["file"], found["windows"], found["window"]) == ("book.txt", 2, 256)
    for name, folder in (("source", llama_folder), ("converted", target)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert found[name] == pytest.approx(perplexity(model, windows), rel=1e-6)
    assert found["source"] != found["converted"]


def test_layers_report_slots_and_energy(converted):
    _, returned = converted
    slots = [layer["rope_slots"] for layer in returned["layers"]]
    assert returned["slots_per_frequency"] == [sum(of.count(number) for of in slots) for number in range(8)]
    assert sum(returned["slots_per_frequency"]) == 2 * 4
    for layer in returned["layers"]:
        ranks, kept = zip(*layer["energy_by_rank"], strict=True)
        assert ranks == (1, 2, 4, 8, 16, 32, 64, 96)
        assert all(low <= high + 1e-12 for low, high in itertools.pairwise(kept))
        assert kept[-1] == pytest.approx(1.0) and kept[3] < layer["energy_kept"] < kept[5]


def test_figure(converted, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    target, returned = converted
    assert (target / "conversion_report.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    layers = returned["layers"]
    report.draw_report(tmp_path, returned)
    errors, energies, slots, _ = drawn[0].axes
    shown = [line.get_ydata().tolist() for line in errors.lines]
    assert shown == [[layer["attention_error"][key] for layer in layers] for key in ("before", "after")]
    assert [bar.get_height() for bar in energies.patches] == [layer["energy_kept"] for layer in layers]
    assert slots.images[0].get_array().sum(axis=0).tolist() == returned["slots_per_frequency"]
    # A source with latents keeps its own slots.
    report.draw_report(tmp_path, {**returned, "slots_per_frequency": []})
    assert len(drawn[1].axes) == 2


def test_without_matplotlib_the_report_has_no_figure(converted, tmp_path, monkeypatch):
    def missing():
        raise ImportError("Plots need matplotlib")

    monkeypatch.setattr(report, "check_matplotlib", missing)
    with pytest.warns(UserWarning, match=r"conversion_report.png was not drawn. Plots need matplotlib"):
        report.draw_report(tmp_path, converted[1])
    assert not list(tmp_path.iterdir())


def test_interrupted_evaluation_leaves_the_model(llama_folder, evaluation, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("egmla.conversion.convert.converted_perplexity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(llama_folder, tmp_path / "t", exact=True, evaluate=evaluation)
    assert "evaluation" not in json.loads((tmp_path / "t/conversion_report.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t").config.model_type == "egmla"


def test_the_same_command_adds_the_evaluation(converted, llama_folder, calibration, evaluation, tmp_path, monkeypatch):
    """To a finished model that was not measured, with the same settings; nothing is converted again."""
    target, returned = converted
    folder = shutil.copytree(target, tmp_path / "t")
    path = folder / "conversion_report.json"
    unmeasured = {name: value for name, value in returned.items() if name != "evaluation"}
    path.write_text(json.dumps(unmeasured | {"command": "without"}))
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file != path}

    def again(**changes):
        arguments = {
            "kv_lora_rank": [12, 20],
            "qk_rope_head_dim": 8,
            "calibration": calibration,
            "calibration_tokens": 4096,
            "refinement": Refinement(steps=3),
            "evaluate": evaluation,
            "evaluation_windows": 2,
        }
        return convert_checkpoint(llama_folder, folder, **arguments | changes)

    monkeypatch.setattr("egmla.conversion.convert.staged_folder", None)
    with pytest.raises(FileExistsError, match=r"finished conversion with other settings \(plan\)"):
        again(kv_lora_rank=[12, 19])
    with pytest.raises(FileExistsError, match=r"other settings \(refinement, dtype\)"):
        again(refinement=Refinement(steps=4), dtype="bfloat16")
    for changes in ({"resume": False}, {"evaluate": None}, {"dry_run": True}):
        with pytest.raises(FileExistsError, match=r"exists and is not empty; a new or empty folder"):
            again(**changes)
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match=r"other settings \(weights\)"):
        patch.setattr("egmla.conversion.convert.weights_sha256", lambda folder: "of a healed model")
        again()
    assert json.loads(path.read_text())["command"] == "without"
    assert again() == json.loads(path.read_text()) == json.loads(json.dumps(returned))
    assert before == {file.name: file.read_bytes() for file in folder.iterdir() if file != path}
    with pytest.raises(FileExistsError, match=r"exists and is not empty; a new or empty folder"):
        again()  # it is measured


def test_cards_show_the_evaluation_and_the_figure(converted, tmp_path):
    target, returned = converted
    folder = shutil.copytree(target, tmp_path / "small")
    card = render_card(folder)
    found = returned["evaluation"]
    assert f"| source | {found['source']:.3f} |\n| this model | {found['converted']:.3f} |" in card
    assert "2 windows of 256 tokens of `book.txt`" in card
    assert ("](conversion_report.png)" in card) == (folder / "conversion_report.png").is_file()
    # A report from before there were evaluations, settings and figures.
    older = {key: value for key, value in returned.items() if key not in ("evaluation", "settings")}
    del older["slots_per_frequency"]
    (folder / "conversion_report.json").write_text(json.dumps(older))
    (folder / "conversion_report.png").unlink(missing_ok=True)
    assert "## Perplexity\n\nNot measured." in render_card(folder)


def test_evaluation_on_the_command_line(llama_folder, evaluation, tmp_path):
    result = run("convert", llama_folder, tmp_path / "t", "--exact", "--evaluate", evaluation)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "t/conversion_report.json").read_text())["evaluation"]
    assert found["converted"] == pytest.approx(found["source"], rel=1e-5) and found["windows"] == 9
    assert f"{found['source']:.3f} -> {found['converted']:.3f}" in result.stdout
