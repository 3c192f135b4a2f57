"""Model cards: every figure is one of a JSON file beside the card, metadata the Hub takes, bad input named."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import SHAPE, run, save_tokenizer
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from egmla import EGMLAConfig
from egmla.conversion import Refinement, convert_checkpoint
from egmla.model_cards import render_card, write_card
from egmla.model_cards.metadata import card_problems
from egmla.publishing import check_folder


CARDS = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob("*/README.md"))
SOURCE_CARD = "---\nlicense: apache-2.0\nlanguage: en\nbase_model: its/grandparent\n---\n\n# Tiny\n"


def lm_eval_results(path: str, shift: float = 0.0) -> dict:
    """Results as lm-eval writes them, with figures that are nobody else's."""
    return {
        "results": {
            "piqa": {"acc,none": 0.6125 + shift, "acc_stderr,none": 0.0344, "alias": "piqa"},
            "mmlu": {"acc,none": 0.2481, "acc_stderr,none": 0.0101},
            "mmlu_anatomy": {"acc,none": 0.1717, "acc_stderr,none": 0.0301},
            "wikitext": {"word_perplexity,none": 31.4159 + shift, "word_perplexity_stderr,none": "N/A"},
        },
        "groups": {"mmlu": {"acc,none": 0.2481, "acc_stderr,none": 0.0101}},
        "group_subtasks": {"mmlu": ["mmlu_anatomy"], "piqa": []},
        "configs": {
            "piqa": {
                "dataset_path": "baber/piqa",
                "validation_split": "validation",
                "doc_to_text": "/home/somebody/secret",
                "metadata": {"version": 1.0, "local_files": {"validation": "piqa_valid.jsonl"}},
            },
            "wikitext": {"dataset_path": "EleutherAI/wikitext", "dataset_name": "wikitext-2", "test_split": "test"},
        },
        "n-shot": {"piqa": 5, "mmlu": 0, "wikitext": 0},
        "n-samples": {
            "piqa": {"original": 1838, "effective": 200},
            "mmlu_anatomy": {"original": 18, "effective": 18},
            "wikitext": {"original": 60, "effective": 60},
        },
        "config": {
            "model": "egmla",
            "model_args": {"pretrained": path, "tokenizer": "/home/somebody/tokenizer"},
            "model_dtype": "torch.float32",
            "batch_size": 8,
            "limit": 200,
        },
        "pretty_env_info": "the machine's",
        "git_hash": "somebody's",
        "lm_eval_version": "0.4.13",
    }


def comparison(source: str, model: str) -> dict:
    models = [
        {
            "name": name,
            "path": path,
            "cache_elements_per_token": elements,
            "cache_bytes_per_token": 4 * elements,
            "results": lm_eval_results(path, shift),
        }
        for name, path, elements, shift in (("llama", source, 64, 0.0), ("small", model, 32, -0.0775))
    ]
    scores = [
        {"model": "llama", "task": "piqa", "metric": "acc", "filter": "none", "value": 0.6125, "stderr": 0.0344},
        {"model": "small", "task": "piqa", "metric": "acc", "filter": "none", "value": 0.535, "stderr": 0.0344},
    ]
    for score, difference in zip(scores, (None, -0.0775), strict=True):
        score |= {"questions": 200, "difference": difference, "difference_stderr": difference and 0.0213}
    settings = {
        "limit": 200,
        "num_fewshot": 5,
        "batch_size": 8,
        "model_args": {"tokenizer": "/home/somebody/tokenizer", "dtype": "float32"},
        "use_cache": "/home/somebody/cache",
    }
    return {"models": models, "scores": scores, "settings": settings}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    source = folder / "llama"
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=8)).save_pretrained(source)
    save_tokenizer(source)
    (source / "README.md").write_text(SOURCE_CARD)
    text = folder / "text.txt"
    text.write_text("the cat and the dog " * 2000)
    convert_checkpoint(
        source,
        folder / "small",
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        calibration=text,
        calibration_tokens=8192,
        refinement=Refinement(steps=2),
    )
    return folder / "small"


@pytest.fixture
def model(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "small"))


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def table_rows(card: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    section = card.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")][
        2:
    ]


def test_card_without_scores_says_so(model):
    card = write_card(model)[-1].read_text()
    for heading in ("Perplexity", "Scores"):
        assert f"## {heading}\n\nNot measured." in card
    assert "model-index" not in card
    report = json.loads((model / "conversion_report.json").read_text())
    assert table_rows(card, "Cache")[0][1:3] == ["32", "128"]
    assert table_rows(card, "Cache")[1][1:3] == ["64", "256"]
    assert report["plan"]["source_elements"] == 64
    assert "50.0% of the source's 64" in card
    data = ModelCard(card).data
    # What the source's card calls its base is not what was converted.
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en"], None)
    assert "its/grandparent" not in card and "`llama`, converted" in card
    assert "trust_remote_code=True" in card.partition("AutoTokenizer.from_pretrained")[2].partition("AutoModel")[2]
    assert (model / "architecture.png").read_bytes().startswith(b"\x89PNG")
    found = check_folder(model)
    assert not [warning for warning in found.warnings if "card" in warning or "README" in warning]


def test_command_in_the_card_makes_the_model_again(model, converted, tmp_path, monkeypatch):
    command = render_card(model).partition("```bash\n")[2].partition("\n")[0].split()
    assert command[:2] == ["egmla", "convert"]
    monkeypatch.chdir(converted.parent)
    arguments = [str(tmp_path / "again") if word == "TARGET" else word for word in command[1:]]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()


def test_refinement_is_stated(model):
    card = render_card(model)
    report = json.loads((model / "conversion_report.json").read_text())
    products, length = report["refinement"]["dtype"], report["calibration"]["sequence_length"]
    assert f"2 steps of 2 of those sequences ({4 * length:,} tokens), the gate not trained" in card
    assert f"matrix products in {products}" in card
    assert "was refined by itself on the calibration text and nothing was trained end to end" in card
    assert "Nothing was trained after" not in card and "The gate is at identity" in card
    write(model / "conversion_report.json", {**report, "refinement": {**report["refinement"], "gate": True}})
    card = render_card(model)
    assert "the gate trained with the rest" in card and "The gate was trained in that refinement only." in card
    assert "at identity" not in card
    write(model / "conversion_report.json", {**report, "refinement": None})
    card = render_card(model)
    assert "- refinement: none, the closed form as it is" in card
    assert "Nothing was trained after the conversion" in card and "The gate is at identity" in card
    assert "smaller by its rank, which loses more" in card


def test_scores_of_one_model(model, tmp_path):
    written = write_card(model, scores=write(tmp_path / "results.json", lm_eval_results(str(model))))
    assert [path.name for path in written] == ["results.json", "architecture.png", "README.md"]
    card = written[-1].read_text()
    assert table_rows(card, "Scores") == [
        ["piqa", "acc", "200 of 1,838", "5", "0.613 ± 0.034"],
        ["mmlu", "acc", "18", "0", "0.248 ± 0.010"],
    ]
    assert table_rows(card, "Perplexity") == [["wikitext", "word_perplexity", "60", "0", "31.42"]]
    # lm-eval does not record how it was called, so no command is given.
    assert "egmla eval" not in card and "Batch size 8, model arguments: none." in card
    assert "they are its first ones" in card and "`piqa_valid.jsonl`" in card
    public = (model / "evaluation" / "results.json").read_text()
    assert "somebody" not in public and str(tmp_path) not in public and "the machine's" not in public
    check_folder(model)


def test_scores_beside_the_source(model, tmp_path):
    folder = tmp_path / "comparison"
    folder.mkdir()
    write(folder / "comparison.json", comparison("/elsewhere/llama", str(model)))
    card = write_card(model, scores=folder)[-1].read_text()
    figures = ["0.535 ± 0.034", "0.613 ± 0.034", "-0.077 ± 0.021"]
    assert table_rows(card, "Scores")[0] == ["piqa", "acc", "200 of 1,838", "5", *figures]
    assert table_rows(card, "Scores")[1][-1] == "not measured"
    assert "(evaluation/scores.png)" in card
    assert "32 and 64 elements per token" in card
    assert (model / "evaluation" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "egmla eval small --tasks piqa,mmlu,wikitext --limit 200 --num-fewshot 5 --batch-size 8 --model-args "
        "dtype=float32 --data-dir FOLDER"
    ) in card
    assert "not shown here: model_args.tokenizer, use_cache." in card
    for name in ("results", "source_results", "comparison"):
        assert "somebody" not in (model / "evaluation" / f"{name}.json").read_text()
    # Scores of the model alone replace those, also what they said of the source.
    card = write_card(model, scores=write(tmp_path / "results.json", lm_eval_results("small")))[-1].read_text()
    assert len(table_rows(card, "Scores")[0]) == 5
    assert sorted(path.name for path in (model / "evaluation").iterdir()) == ["results.json"]


def test_results_of_lm_evals_own_folder(model, tmp_path):
    folder = tmp_path / "out" / "small"
    folder.mkdir(parents=True)
    old = lm_eval_results(str(model), shift=0.1)
    new = lm_eval_results(str(model))
    new["config"]["model_args"] = f"pretrained={model},dtype=float32"
    write(folder / "results_2026-11-22T10-00-00.json", old)
    write(folder / "results_2026-11-23T09-00-00.json", new)
    other = tmp_path / "out" / "other"
    other.mkdir()
    write(other / "results_2026-11-23T10-00-00.json", lm_eval_results("/elsewhere/other"))
    path = write_card(model, scores=tmp_path / "out")[0]
    content = json.loads(path.read_text())
    assert content["results"] == new["results"]
    assert content["config"]["model_args"] == {"pretrained": "small", "dtype": "float32"}


def test_an_earlier_card_is_replaced_and_what_was_stated_kept(model):
    write_card(model, license="mit", base_model="another/source", repo_id="me/tiny")
    card = write_card(model)[-1].read_text()
    data = ModelCard(card).data
    assert (data.license, data.base_model) == ("mit", "another/source")
    assert card.count('from_pretrained("me/tiny"') == 4


def test_a_made_up_repository_is_not_kept(model):
    write_card(model)
    renamed = model.rename(model.with_name("renamed"))
    assert 'from_pretrained("your-name/renamed"' in write_card(renamed)[-1].read_text()


def test_weights_changed_since_the_conversion(model):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    card = write_card(model)[-1].read_text()
    assert "The weights have changed since they were last reported on" in card
    assert "Nothing was trained" not in card and "at identity" not in card


def test_how_scores_were_taken_is_said_of_perplexities_too(model, tmp_path):
    results = lm_eval_results(str(model))
    results["results"] = {"wikitext": results["results"]["wikitext"]}
    results["groups"] = {}
    results["n-samples"]["wikitext"]["effective"] = 3
    results["settings"] = {"limit": 3, "num_fewshot": None, "batch_size": 1, "model_args": {}, "lm_eval": "0.4.13"}
    results["settings"]["apply_chat_template"] = True
    card = write_card(model, scores=write(tmp_path / "results.json", results))[-1].read_text()
    assert "## Scores\n\nNot measured." in card
    assert table_rows(card, "Perplexity") == [["wikitext", "word_perplexity", "3 of 60", "0", "31.42"]]
    assert "--tasks wikitext --limit 3 --batch-size 1 --set apply_chat_template=True" in card


def test_tasks_on_one_data_set_stay_apart_and_filters_are_named(model, tmp_path):
    results = lm_eval_results(str(model))
    results["results"] = {
        "one": {"exact_match,strict": 0.1, "exact_match,flexible": 0.2, "list,none": [1], "bad,none": math.nan},
        "two": {"exact_match,strict": 0.3},
    }
    results["groups"] = {}
    results["configs"] = {task: {"dataset_path": "owner/data", "test_split": "test"} for task in ("one", "two")}
    results["n-samples"] = {task: {"original": 9, "effective": 9} for task in ("one", "two")}
    card = write_card(model, scores=write(tmp_path / "results.json", results))[-1].read_text()
    assert [row[:2] + row[4:] for row in table_rows(card, "Scores")] == [
        ["one", "exact_match (strict)", "0.100"],
        ["one", "exact_match (flexible)", "0.200"],
        ["two", "exact_match (strict)", "0.300"],
    ]
    (index,) = yaml.safe_load(card.split("---")[1])["model-index"]
    assert [entry["dataset"]["name"] for entry in index["results"]] == ["one", "two"]
    assert [[metric["value"] for metric in entry["metrics"]] for entry in index["results"]] == [[0.1, 0.2], [0.3]]


def test_exact_conversion(converted, tmp_path):
    convert_checkpoint(converted.parent / "llama", tmp_path / "exact", exact=True)
    card = write_card(tmp_path / "exact")[-1].read_text()
    assert "exact conversion" in card and "a starting point for training, not a saving" in card
    assert "Nothing was trained" not in card


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "conversion_report.json").unlink(), "has no conversion_report.json"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "conversion_report.json").write_text("{"), "no valid JSON"),
        (lambda folder: (folder / "conversion_report.json").write_text("{}"), "lacks calibration, command"),
        (lambda folder: (folder / "README.md").write_text("# Mine\n"), "was not made by this command"),
        (
            lambda folder: EGMLAConfig(vocab_size=8, hidden_size=8, intermediate_size=8).save_pretrained(folder),
            "do not belong together",
        ),
    ],
)
def test_bad_folders_are_named_and_left_alone(model, spoil, message):
    spoil(model)
    before = sorted(model.iterdir())
    result = run("card", model)
    assert result.exit_code == 1
    assert message in result.stderr
    assert sorted(model.iterdir()) == before


def test_other_models_are_refused(converted):
    with pytest.raises(ValueError, match="holds a llama model"):
        write_card(converted.parent / "llama")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lm_eval_results("/elsewhere/another"), "holds the scores of /elsewhere/another"),
        (comparison("/elsewhere/llama", "/elsewhere/another"), "has no scores of"),
        (comparison("small", "/elsewhere/another"), "has no scores of"),
        (
            {**lm_eval_results("small"), "config": {"model_args": "pretrained=small", "model_num_parameters": 7}},
            "7 param",
        ),
        ({"models": []}, "holds no scores"),
        ({"something": "else"}, "holds no scores"),
    ],
)
def test_scores_of_another_model_are_refused(model, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        write_card(model, scores=write(tmp_path / "scores.json", content))
    assert not (model / "evaluation").exists() and not (model / "README.md").exists()


def test_scores_of_a_namesake_are_refused(model, tmp_path):
    namesake = tmp_path / "elsewhere" / "small"
    namesake.mkdir(parents=True)
    content = comparison("/elsewhere/llama", str(namesake))
    with pytest.raises(ValueError, match="has no scores of"):
        write_card(model, scores=write(tmp_path / "scores.json", content))
    # Two of the name, one of them this one: the path decides.
    content["models"].append({**content["models"][1], "path": str(model), "name": "this"})
    content["scores"].append({**content["scores"][1], "model": "this", "value": 0.25})
    content["models"][-1]["results"]["results"]["piqa"]["acc,none"] = 0.25
    card = write_card(model, scores=write(tmp_path / "scores.json", content))[-1].read_text()
    assert table_rows(card, "Scores")[0][4].startswith("0.250")
    content["models"][-1]["cache_elements_per_token"] = 33
    with pytest.raises(ValueError, match="cached 33 elements per token"):
        write_card(model, scores=write(tmp_path / "scores.json", content))


def test_missing_scores_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        write_card(model, scores=tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="holds no scores"):
        write_card(model, scores=tmp_path)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"license": "Apache 2.0"}, "license in README.md is 'Apache 2.0'"),
        ({"license": "other"}, "needs a license_name"),
        ({"base_model": "a/b/c"}, "no repository id"),
        ({"repo_id": "not valid!"}, "no repository id"),
    ],
)
def test_metadata_the_hub_refuses(model, tmp_path, stated, message):
    scores = write(tmp_path / "results.json", lm_eval_results(str(model)))
    with pytest.raises(ValueError, match=message):
        write_card(model, scores=scores, **stated)
    assert not (model / "README.md").exists() and not (model / "evaluation").exists()


def test_figures_that_are_no_numbers_are_refused():
    card = "---\nmodel-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {name: d, type: d}\n"
    card += "    metrics:\n    - {type: acc, name: acc, value: .nan}\n---\n\n# M\n"
    assert "is nan" in card_problems(card)[0]


def test_there_are_cards_of_three_cache_sizes():
    assert len({json.loads((folder / "config.json").read_text())["kv_lora_rank"] for folder in CARDS}) >= 3


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_published_cards(folder):
    """Figures are read here in a way of our own, not the renderer's."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == []
    repo_id = re.search(r'from_pretrained\("([^"]+)"', card)[1]
    data = ModelCard(card).data
    assert card == render_card(folder, base_model=data.base_model, repo_id=repo_id)

    healed = (folder / "training_report.json").exists()
    if (folder / "evaluation").exists() or not healed:
        check_scores(folder, card)
    else:
        assert "model-index" not in card and "## Scores\n\nNot measured." in card
    if healed:
        report = json.loads((folder / "training_report.json").read_text())
        rows = {row[0]: row[2] for row in table_rows(card, "Healing")}
        shown = {"teacher": "teacher", "converted": "0 tokens", "this model": "trained"}
        assert rows == {name: f"{report['perplexity'][key]:.3f}" for name, key in shown.items()}
        # A perplexity is in the card, so no heading may say that none was measured.
        assert "## Perplexity\n\nNot measured." not in card

    report = json.loads((folder / "conversion_report.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    per_layer = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    elements = [int(row[1].replace(",", "")) for row in table_rows(card, "Cache")]
    assert elements == [per_layer * config["num_hidden_layers"], report["source"]["cache_elements_per_token"]]
    size = getattr(torch, report["dtype"]).itemsize
    for row, count in zip(table_rows(card, "Cache"), elements, strict=True):
        assert row[2:] == [f"{count * size:,}", f"{count * size / 32:,.1f} MiB"]


def check_scores(folder, card):
    results = json.loads((folder / "evaluation" / "results.json").read_text())["results"]
    source = json.loads((folder / "evaluation" / "source_results.json").read_text())["results"]
    (index,) = yaml.safe_load(card.split("---")[1])["model-index"]
    name, parsed = model_index_to_eval_results([index])
    metrics = [(entry, metric) for entry in index["results"] for metric in entry["metrics"]]
    assert name == folder.name and len(parsed) == len(metrics) >= 4
    counts = json.loads((folder / "evaluation" / "results.json").read_text())["n-samples"]
    for entry, metric in metrics:
        task, kind = entry["dataset"]["name"], metric["args"]["filter"]
        assert metric["value"] == results[task][f"{metric['type']},{kind}"]
        stderr = results[task].get(f"{metric['type']}_stderr,{kind}")
        assert metric["args"]["standard_error"] == (stderr if isinstance(stderr, float) else None)
        if task in counts:
            asked = entry["dataset"]["args"]
            assert (asked["questions"], asked["of"]) == (counts[task]["effective"], counts[task]["original"])

    pairs = json.loads((folder / "evaluation" / "comparison.json").read_text())["scores"]
    pairs = {(row["task"], row["metric"]): row for row in pairs if row["model"] == "this model"}
    rows = table_rows(card, "Scores") + table_rows(card, "Perplexity")
    assert len(rows) == len(metrics)
    for task, metric, _, _, own, of_source, difference in rows:
        for cell, figures in ((own, results[task]), (of_source, source[task])):
            value, stderr = figures[f"{metric},none"], figures.get(f"{metric}_stderr,none")
            assert_figure(cell, value, stderr if isinstance(stderr, float) else None)
        row = pairs[task, metric]
        assert_figure(difference, row["difference"], row["difference_stderr"])
        assert math.isclose(row["difference"], results[task][f"{metric},none"] - source[task][f"{metric},none"])


def assert_figure(cell: str, value: float, stderr: float | None) -> None:
    parts = cell.split(" ± ")
    assert len(parts) == (1 if stderr is None else 2)
    for text, figure in zip(parts, (value, stderr), strict=False):
        digits = len(text.partition(".")[2])
        assert digits >= 2 and abs(float(text) - figure) <= 0.5001 * 10**-digits
