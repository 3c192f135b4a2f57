"""Sweeps: every size and recipe is measured, a killed one goes on, figures of other settings are not mixed in."""

import json
import shutil

import pytest
from command_line import run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from egmla.conversion import Refinement
from egmla.conversion import sweep as module
from egmla.conversion.sweep import sweep
from egmla.samples import sample_text


pytest.importorskip("matplotlib")

CACHES = [0.5, 0.25]
RECIPES = ("default", "transmla-like")


@pytest.fixture(scope="module")
def texts(calibration, tmp_path_factory):
    evaluation = tmp_path_factory.mktemp("evaluation") / "book.txt"
    evaluation.write_text(sample_text("evaluation")[:3000].encode("ascii", "ignore").decode())
    return {
        "calibration": calibration,
        "evaluate": evaluation,
        "calibration_tokens": 2048,
        "evaluation_windows": 1,
        "refinement": Refinement(0),
    }


@pytest.fixture(scope="module")
def swept(llama_folder, texts, tmp_path_factory):
    """A sweep that was killed at its second model and run again, with the models each run made."""
    target = tmp_path_factory.mktemp("sweep") / "models"
    made: list[list[str]] = [[], []]
    convert = module.convert_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        for attempt in (0, 1):

            def counted(source, folder, *, dry_run=False, attempt=attempt, **arguments):
                if not dry_run:
                    if attempt == 0 and len(made[0]) == 1:
                        raise KeyboardInterrupt
                    made[attempt].append(folder.name)
                return convert(source, folder, dry_run=dry_run, **arguments)

            patch.setattr(module, "convert_checkpoint", counted)
            if attempt == 0:
                with pytest.raises(KeyboardInterrupt):
                    sweep(llama_folder, target, CACHES, recipes=RECIPES, **texts)
            else:
                report = sweep(llama_folder, target, CACHES, recipes=RECIPES, **texts)
    return target, report, made


def test_a_killed_sweep_goes_on(swept):
    target, report, made = swept
    assert made == [["default-0.5"], ["default-0.25", "transmla-like-0.5", "transmla-like-0.25"]]
    assert json.loads((target / "sweep.json").read_text()) == json.loads(json.dumps(report))
    assert (target / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_the_models(swept):
    target, report, _ = swept
    assert [(row["recipe"], row["cache"], row["elements"]) for row in report["rows"]] == [
        ("default", 0.5, 96),
        ("default", 0.25, 48),
        ("transmla-like", 0.5, 96),
        ("transmla-like", 0.25, 48),
    ]
    assert report["source"]["elements"] == 192
    for row in report["rows"]:
        config = AutoModelForCausalLM.from_pretrained(target / row["folder"]).config
        assert config.cache_elements_per_token == row["elements"]
        made = json.loads((target / row["folder"] / "conversion_report.json").read_text())
        assert made["evaluation"]["converted"] == row["perplexity"]
        assert made["evaluation"]["source"] == report["source"]["perplexity"]


def test_best_is_the_pareto_front():
    rows = [
        {"elements": size, "perplexity": value} for size, value in ((96, 20.0), (48, 30.0), (96, 25.0), (60, 30.0))
    ]
    module._mark_best(rows)
    assert [row["best"] for row in rows] == [True, True, False, False]


def test_other_settings_are_not_mixed_in(swept, llama_folder, texts):
    target, _, _ = swept
    with pytest.raises(ValueError, match=r"holds a sweep with other settings \(choices\).*choose another folder"):
        sweep(llama_folder, target, CACHES, **texts, choices={"balance": 2.0})
    with pytest.raises(ValueError, match=r"other settings \(calibration\)"):
        sweep(llama_folder, target, CACHES, **{**texts, "calibration_tokens": 4096})


def test_a_namesake_of_the_source_is_another(swept, llama_folder, texts, tmp_path, monkeypatch):
    target, _, _ = swept
    namesake = shutil.copytree(llama_folder, tmp_path / llama_folder.name)  # its files keep their times
    sweep(namesake, target, CACHES, recipes=RECIPES, **texts)
    tensors = load_file(namesake / "model.safetensors")
    save_file({**tensors, "model.norm.weight": 2 * tensors["model.norm.weight"]}, namesake / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds a sweep with other settings \(source_fingerprint\)"):
        sweep(namesake, target, CACHES, recipes=RECIPES, **texts)
    monkeypatch.setattr(module, "software_versions", lambda: {"torch": "1.0"})
    with pytest.raises(ValueError, match=r"other settings \(versions\)"):
        sweep(llama_folder, target, CACHES, recipes=RECIPES, **texts)


def test_a_sweep_starts_over(swept, llama_folder, texts, tmp_path):
    target = shutil.copytree(swept[0], tmp_path / "models")
    kept = (target / "transmla-like-0.5" / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"qk_rope_head_dim=3"):
        sweep(llama_folder, target, [0.5], **texts, resume=False, qk_rope_head_dim=3)
    assert json.loads((target / "sweep.json").read_text())["rows"] == swept[1]["rows"]  # the check removed nothing
    before = (target / "default-0.5" / "config.json").stat().st_mtime_ns
    report = sweep(llama_folder, target, [0.5], **{**texts, "calibration_tokens": 1024}, resume=False)
    assert [row["folder"] for row in report["rows"]] == ["default-0.5"]
    assert report["settings"]["calibration"]["tokens_asked"] == 1024
    assert (target / "default-0.5" / "config.json").stat().st_mtime_ns > before
    assert (target / "transmla-like-0.5" / "config.json").stat().st_mtime_ns == kept


def test_the_device_that_was_chosen(llama_folder, texts, tmp_path, monkeypatch):
    """On a machine whose GPU PyTorch sees but cannot use, the CPU can be chosen."""
    from egmla.conversion import convert_checkpoint

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    options = {name: texts[name] for name in ("calibration", "calibration_tokens", "refinement")}
    report = convert_checkpoint(llama_folder, tmp_path / "t", cache=0.5, device="cpu", **options)
    assert report["machine"]["device"] == "cpu"


def test_bad_input_shows_before_anything_is_made(llama_folder, texts, tmp_path):
    def refused(message, error=ValueError, caches=(0.5, 0.25), **changes):
        with pytest.raises(error, match=message):
            sweep(llama_folder, tmp_path / "t", caches, **{**texts, **changes})
        assert not (tmp_path / "t").exists()

    refused(r"cache=1.5: the share", caches=[0.5, 1.5])
    refused(r"at least one size and one recipe", caches=[])
    refused(r"Recipe 'transmla' is not known", recipes=["default", "transmla"])
    refused(r"have text in common", evaluate=texts["calibration"])
    refused(r"Calibration text .* does not exist", FileNotFoundError, calibration=tmp_path / "nothing.txt")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists and holds no sweep"):
        sweep(llama_folder, tmp_path, CACHES, **texts)


def test_options_of_the_models_on_the_command_line(llama_folder, texts, tmp_path, monkeypatch):
    passed = []

    def swept(*args, **options):
        passed.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(module, "sweep", swept)
    words = ["sweep", llama_folder, tmp_path / "t", "--cache", "0.5"]
    words += ["--calibration", texts["calibration"], "--evaluate", texts["evaluate"]]
    more = [
        "--refine-gate",
        "--set",
        "refine.carry=1",
        "--set",
        "balance=2",
        "--latent-norm",
        "--layout",
        "deepseek_v3",
    ]
    assert "enough" in run(*words).stderr and "enough" in run(*words, *more).stderr
    plain, special = passed
    assert plain["choices"] == {} and plain["refinement"] is None and "layout" not in plain
    assert special["choices"] == {"balance": 2, "latent_norm": True} and special["layout"] == "deepseek_v3"
    assert special["refinement"] == Refinement(gate=True, carry=1)


def test_several_calibration_texts(llama_folder, texts, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(texts["calibration"].read_text()[::-1])
    both = {**texts, "calibration": [texts["calibration"], other]}
    report = sweep(llama_folder, tmp_path / "t", [0.5], **both)
    assert report["settings"]["calibration"]["file"] == "calibration.txt, other.txt"
    made = json.loads((tmp_path / "t" / "default-0.5" / "conversion_report.json").read_text())
    assert [text["file"] for text in made["calibration"]["files"]] == ["calibration.txt", "other.txt"]
    other.write_text(other.read_text()[1:])
    with pytest.raises(ValueError, match=r"other settings \(calibration\)"):
        sweep(llama_folder, tmp_path / "t", [0.5], **both)


def test_sweep_in_deepseeks_layout(llama_folder, texts, tmp_path):
    with pytest.raises(ValueError, match=r"does not fit layout deepseek_v3: its queries have biases"):
        sweep(llama_folder, tmp_path / "t", [0.5], **texts, choices={"latent_norm": True}, layout="deepseek_v3")
    assert not (tmp_path / "t").exists()


def test_sweep_on_the_command_line(swept, llama_folder, texts):
    """All is there already: the table of a second run."""
    target, report, _ = swept
    words = ["sweep", llama_folder, target, "--cache", "0.5,0.25", "--recipe", "default,transmla-like"]
    words += ["--calibration", texts["calibration"], "--evaluate", texts["evaluate"]]
    words += ["--calibration-tokens", 2048, "--evaluation-windows", 1, "--refine-steps", 0]
    result = run(*words)
    assert result.exit_code == 0, result.output
    for row in report["rows"]:
        assert f"{row['perplexity']:.3f}" in result.stdout
    assert "--cache half: must be fractions" in run(*words[:4], "half", *words[5:]).stderr
