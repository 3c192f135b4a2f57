"""Whole runs of `egmla train`: results, scores, cards, interruptions, and what they refuse."""

import json
from pathlib import Path

import pytest
from command_line import run
from runs import SMALL, VOCABULARY, heal, same_weights
from transformers import AutoTokenizer

from egmla import EGMLAConfig
from egmla.model_cards import write_card
from egmla.publishing.preflight import check_folder
from egmla.training import TrainingSettings, scratch_settings, train_from_scratch
from egmla.training.from_scratch import train_tokenizer


pytest.importorskip("matplotlib")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "kv_gate_embedding_dim": 6,
}


def test_train_from_a_preset(models, tmp_path):
    """The command trains a tokenizer as well; the result generates, and its report has the settings."""
    fields = [word for key, value in TINY.items() for word in ("--config", f"{key}={value}")]
    target = tmp_path / "trained"
    numbers = ("--tokens", "40K", "--sequence-length", 32, "--batch-size", 8, "--learning-rate", 0.005)
    options = ("--new-tokenizer", 300, "--data", models / "text.txt", *numbers, "--set", "max_grad_norm=0.5")
    result = run("train", "egmla-kv64-120m", target, *fields, *options)
    assert result.exit_code == 0, result.output
    assert "after 40,192 tokens" in result.stdout
    assert "operations, about" in result.stderr
    report = json.loads((target / "training_report.json").read_text())
    assert report["kind"] == "train"
    assert report["perplexity"]["0 tokens"] > 1.5 * report["perplexity"]["trained"]
    assert "--new-tokenizer 300" in report["command"]
    assert "--config kv_lora_rank=12" in report["command"]
    assert "--set max_grad_norm=0.5" in report["command"]
    assert "kl" not in report["command"]
    config = EGMLAConfig.from_pretrained(target)
    assert (config.vocab_size, config.eos_token_id, config.kv_gate_embedding_dim) == (300, 0, 6)
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = (models / "text.txt").read_text()[:500]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert run("generate", target, "--prompt", "Alice", "--max-new-tokens", 3).exit_code == 0
    check_folder(target)


def scratch(models, target, places=None, fields=None, **changes):
    values = {"data": [str(models / "text.txt")], **SMALL, **changes}
    config = EGMLAConfig(**{**TINY, "vocab_size": VOCABULARY, "attention_dropout": 0.1, **(fields or {})})
    options = {"tokenizer": str(models / "source"), **(places or {})}
    return train_from_scratch(config, target, scratch_settings(**values), **options)


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory) -> tuple[Path, dict]:
    """An uninterrupted run of `scratch` with its default settings: the folder it wrote, and the report."""
    folder = tmp_path_factory.mktemp("trained") / "trained"
    return folder, scratch(models, folder)


def test_train_scores_at_the_end_on_request(models, tmp_path, lm_eval_reads_once):
    """lm-eval scores the result; wrong tasks are refused before training."""
    data = Path(__file__).parents[1] / "fixtures" / "lm_eval"
    fields = [word for key, value in TINY.items() for word in ("--config", f"{key}={value}")]
    numbers = ("--tokens", 1500, "--sequence-length", 32, "--batch-size", 4, "--new-tokenizer", 300)
    common = (*fields, "--data", models / "text.txt", *numbers, "--data-dir", data)
    wrong = run("train", "egmla-kv64-120m", tmp_path / "trained", *common, "--tasks", "pika")
    assert wrong.exit_code == 1 and "piqa" in wrong.stderr and not list(tmp_path.iterdir())
    right = run("train", "egmla-kv64-120m", tmp_path / "trained", *common, "--tasks", "piqa", "--limit", 4)
    assert right.exit_code == 0, right.output
    scores = json.loads((tmp_path / "trained.scores.json").read_text())
    assert scores["n-samples"]["piqa"]["effective"] == 4
    card = write_card(tmp_path / "trained", scores=tmp_path / "trained.scores.json")[-1].read_text()
    assert f"{scores['results']['piqa']['acc,none']:.3f}" in card and "No task was measured" not in card
    check_folder(tmp_path / "trained")


def test_the_card_of_a_model_trained_from_new_weights(models, tmp_path):
    """It has no source, so everything on its card comes from the training report."""
    report = scratch(models, tmp_path / "new", {"name": "egmla-kv16-120m", "overrides": {"hidden_size": 32}})
    card = write_card(tmp_path / "new", license="mit")[-1].read_text()
    section = card.partition("\n## Training\n")[2].partition("\n## ")[0]
    assert f"| new weights | 0 | {report['perplexity']['0 tokens']:.3f} |" in section
    assert f"| this model | {report['tokens']:,} | {report['perplexity']['trained']:.3f} |" in section
    assert "egmla train egmla-kv16-120m TARGET" in section and report["data"][0]["sha256"] in section
    config = EGMLAConfig.from_pretrained(tmp_path / "new")
    full = 2 * config.num_attention_heads * config.v_head_dim * config.num_hidden_layers
    assert f"| this model | {config.cache_elements_per_token:,} |" in card
    assert f"(counted) | {full:,} |" in card and f"wide would hold {full:,}." in card
    assert "- configuration: `egmla-kv16-120m`, with hidden_size=32\n- tokenizer: `source`" in card
    assert "No task was measured." in card and "Of the weights: mit." in card
    assert not {"converted", "healed", "teacher"} & set(card.lower().split())
    found = check_folder(tmp_path / "new")
    assert not [warning for warning in found.warnings if "card" in warning]
    # Trained further, it still comes from new weights.
    heal(models, tmp_path / "more", model=str(tmp_path / "new"), teacher=None, kl_weight=0.0, ce_weight=1.0)
    card = write_card(tmp_path / "more")[-1].read_text()
    assert f"trained from new weights on {2 * report['tokens']:,} tokens" in card
    assert "None was stated for these weights" in card and card.count("```bash\negmla ") == 2


def test_several_processes_take_no_scores(models, tmp_path, monkeypatch):
    """lm-eval would divide the questions among processes that are gone by then."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    common = ("--data", models / "text.txt", "--tokens", 1500, "--new-tokenizer", 300, "--tasks", "piqa")
    result = run("train", "egmla-kv16-120m", tmp_path / "trained", *common)
    assert result.exit_code == 1 and "--tasks with 2 processes" in result.stderr and "egmla eval" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gate", "said", "bytes_per_token"),
    [
        (None, "A model with multi-head latent attention, without EG-MLA's gate", 160),
        ("latent", "An EG-MLA model (embedding-gated", 160),
        ("expanded", "whose gates act on expanded keys and values", 164),  # 4 of a token's id
    ],
)
def test_cards_tell_gates_apart(models, tmp_path, gate, said, bytes_per_token):
    scratch(models, tmp_path / "new", fields={"kv_gate": gate, "kv_gate_embedding_dim": None})
    card = write_card(tmp_path / "new")[-1].read_text()
    assert said in card
    assert ("every step expands them" in card) == (gate == "expanded")
    assert f"| this model | 40 | {bytes_per_token} |" in card


def test_a_new_tokenizer_reads_the_beginning_of_a_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr("egmla.training.data.PIECE_CHARACTERS", 1000)
    monkeypatch.setattr("egmla.training.from_scratch.TOKENIZER_CHARACTERS", 3000)
    text = (models / "text.txt").read_text()
    with (tmp_path / "long.txt").open("w", encoding="utf-8") as file:
        file.write(text[:6000] + "\n" + "zyzzyva " * 5000)
    tokenizer = train_tokenizer(TrainingSettings([str(tmp_path / "long.txt")], 1), 280)
    assert len(tokenizer("zyzzyva")["input_ids"]) > 4  # from the whole file it would become one token


def test_a_killed_training_resumes_bit_for_bit(models, trained, tmp_path, monkeypatch):
    folder, whole = trained
    monkeypatch.setattr("egmla.training.trainer.ProgressReport.on_step_end", fail_at_step(10))
    with pytest.raises(KeyboardInterrupt):
        scratch(models, tmp_path / "stopped")
    monkeypatch.undo()
    report = scratch(models, tmp_path / "stopped")
    assert report["resumed_at_step"] == 8 and report["losses"] == whole["losses"]
    assert same_weights(tmp_path / "stopped", folder)


def fail_at_step(step: int):
    def fail(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    return fail


def test_train_is_repeatable(models, trained, tmp_path):
    folder, one = trained
    two, other = (scratch(models, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert one["losses"] == two["losses"]
    assert same_weights(folder, tmp_path / "0")
    assert one["losses"] != other["losses"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Training needs a tokenizer"),
        (("--new-tokenizer", "100"), "must be at least 257"),
        (("--new-tokenizer", "9000"), "tokens only, and 9000 were asked for"),
        (("--tokenizer", "SOURCE", "--config", "vocab_size=50"), f"--config vocab_size={VOCABULARY}"),
        (("--new-tokenizer", "300", "--config", "vocab_size=500"), "new_tokenizer=300 with vocab_size=500"),
        (("--tokenizer", "SOURCE", "--config", "hiden_size=50"), "there is hidden_size"),
        (("--tokenizer", "SOURCE", "--config", "hidden_size"), "written key=value"),
        (("--tokenizer", "SOURCE", "--config", "kv_lora_rank=0"), "must be a positive number"),
    ],
)
def test_train_refuses(models, tmp_path, options, message):
    options = [models / "source" if option == "SOURCE" else option for option in options]
    common = ("--data", models / "text.txt", "--tokens", 1500, "--sequence-length", 32)
    result = run("train", "egmla-kv16-120m", tmp_path / "trained", *common, *options)
    assert result.exit_code == (2 if "hidden_size" in options else 1)  # 2: no such file of options
    assert message in result.stderr
    assert not list(tmp_path.iterdir())
