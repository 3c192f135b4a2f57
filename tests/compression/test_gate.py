"""Reconstruction scores and the gate that predicts them."""

import json

import pytest
import torch
from cases import make_tokenizer, tiny_model, token_ids
from typer.testing import CliRunner

from egmla import EGMLACache, EGMLAConfig
from egmla.commands import app
from egmla.compression import EvictionGate, GatePress, fit_gate, reconstruction_scores
from egmla.compression.gate import _Regression
from egmla.compression.gate_folder import make_gate
from egmla.utils.provenance import weights_sha256


INSTRUCTION = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.mark.parametrize("part", [1000, 9])
@torch.no_grad()
def test_scores_are_the_largest_weights(part):
    """Against the weights of eager attention over context, instruction and repetition in one sequence each."""
    model, ids = tiny_model(), token_ids(1, 24)
    found = reconstruction_scores(model, ids, INSTRUCTION, part=part)
    model.set_attn_implementation("eager")
    expected = torch.zeros(2, 4, 24)
    for piece in ids.split(part, dim=1):
        whole = torch.cat((ids, INSTRUCTION, piece), dim=1)
        for layer_idx, weights in enumerate(model(whole, output_attentions=True).attentions):
            expected[layer_idx] = torch.maximum(expected[layer_idx], weights[0, :, 24:, :24].amax(dim=1))
    torch.testing.assert_close(found, expected.sum(dim=1), atol=1e-5, rtol=1e-4)


def test_scores_leave_no_hooks_and_take_one_context():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"ids has shape \(2, 8\): one context at a time"):
        reconstruction_scores(model, token_ids(2, 8), INSTRUCTION)
    with pytest.raises(RuntimeError):
        reconstruction_scores(model, token_ids(1, 8), torch.zeros(1, 3))  # ids of another dtype fail on the way
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


def test_regression_finds_a_linear_map():
    inputs, weight = torch.randn(3000, 6), torch.randn(6)
    regression = _Regression(1, 6)
    for rows in inputs.split(1000):
        regression.add(0, rows, rows @ weight + 2)
    found, bias = regression.solve()
    torch.testing.assert_close(found[0], weight, atol=0.03, rtol=0.02)
    assert float(bias) == pytest.approx(2, abs=0.02)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    model = tiny_model()
    done = []
    # Two domains: the second has half of the tokens only.
    contexts = {"all": [token_ids(1, 120, seed=seed) for seed in range(12)]}
    contexts["low"] = [2 + token_ids(1, 120, seed=seed) % 40 for seed in range(20, 26)]
    gate, figures = fit_gate(model, contexts, INSTRUCTION, progress=lambda *each: done.append(each))
    assert done == [(number + 1, 18) for number in range(18)]
    return model, gate, figures


def test_a_gate_predicts_scores(fitted):
    _, gate, figures = fitted
    assert gate.weight.shape == (2, 48) and gate.bias.shape == gate.shares.shape == (2,)
    assert float(gate.shares.mean()) == pytest.approx(0.5)
    assert set(figures) == {"all", "low"}
    for found in figures.values():
        assert found["r2"] > 0.1 and found["recall"] > 0.6  # of chance: 0 and 0.5


def test_a_gate_presses(fitted):
    model, gate, _ = fitted
    ids, cache = token_ids(1, 60, seed=99), EGMLACache(model.config)
    with GatePress(gate, keep=0.5)(model), torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    assert sum(layer.stored for layer in cache.layers) == 60
    batch = EGMLACache(model.config)
    with GatePress(gate, keep=0.5, layers=gate.shares.tolist())(model), torch.no_grad():
        model(token_ids(3, 60), past_key_values=batch, use_cache=True)
    assert sum(layer.stored for layer in batch.layers) == 60


def test_gates_are_saved_and_loaded(fitted, tmp_path):
    model, gate, _ = fitted
    gate.save(tmp_path)
    loaded = EvictionGate.load(tmp_path, model.config)
    hidden = torch.randn(2, 5, 48)
    assert torch.equal(loaded(1, hidden), gate(1, hidden)) and torch.equal(loaded.shares, gate.shares)
    with pytest.raises(ValueError, match=r"gate of shape \(2, 48\), and the model has 3 layers of width 48"):
        EvictionGate.load(tmp_path, tiny_model(num_hidden_layers=3).config)
    with pytest.raises(FileNotFoundError, match=r"has no eviction_gate.safetensors: fit one first, egmla gate"):
        EvictionGate.load(tmp_path / "other", model.config)


def test_too_few_contexts(fitted):
    with pytest.raises(ValueError, match="books gives 4 contexts, and at least 5 are needed"):
        fit_gate(fitted[0], {"books": [token_ids(1, 20)] * 4}, INSTRUCTION)
    with pytest.raises(ValueError, match="A gate is fitted to texts"):
        fit_gate(fitted[0], {}, INSTRUCTION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gate") / "model"
    tiny_model(vocab_size=128).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_command(folder, calibration):
    """Two texts, a table with a figure for each, and files that load."""
    other = folder.parent / "other.txt"
    other.write_text(calibration.read_text()[::-1])
    arguments = ["gate", str(folder), "--data", str(calibration), "--data", str(other), "--contexts", "6"]
    result = CliRunner().invoke(app, [*arguments, "--context-tokens", "64"])
    assert result.exit_code == 0, result.output
    assert "calibration.txt" in result.output and "other.txt" in result.output and "A random half" in result.output
    config = EGMLAConfig.from_pretrained(folder)
    assert EvictionGate.load(folder, config).weight.shape == (2, 48)
    report = json.loads((folder / "eviction_gate.json").read_text())
    assert set(report["texts"]) == {"calibration.txt", "other.txt"}
    assert report["weights_sha256"] == weights_sha256(folder) and len(report["shares_at_half"]) == 2
    for found in report["texts"].values():
        assert found["contexts"] == 6 and 0.5 < found["recall"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "4"], "greater than or equal to 5"),
        (["--contexts", "5000"], "5000 were asked for: give a longer text"),
        (["--data", "none.txt"], "Gate text none.txt does not exist"),
        (["--data", "{text}", "--data", "{text}"], "twice: give each domain one file"),
    ],
)
def test_bad_commands(folder, calibration, options, message):
    before = sorted(path.name for path in folder.iterdir())
    options = [option.format(text=calibration) for option in options]
    data = [] if "--data" in options else ["--data", str(calibration)]
    result = CliRunner().invoke(app, ["gate", str(folder), *data, *options])
    assert result.exit_code != 0
    assert message in " ".join(f"{result.output} {result.exception}".split())
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_source_is_no_model_for_a_gate(llama_folder):
    with pytest.raises(ValueError, match="LlamaForCausalLM: gates are for EG-MLA models; convert it first"):
        make_gate(llama_folder, {"text": "a"})
    with pytest.raises(ValueError, match="A gate is fitted to texts"):
        make_gate(llama_folder, {})
    with pytest.raises(ValueError, match="context_tokens=8: give at least 5"):
        make_gate(llama_folder, {"text": "a"}, context_tokens=8)
