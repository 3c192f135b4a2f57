"""Perplexity by hand, caches of known size, timings that hold together, samples that are there."""

import importlib.util
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPT2Config, LlamaConfig, MambaConfig

from egmla import EGMLAConfig
from egmla.bench.decode import DecodeTiming, synthetic_cache, time_decode
from egmla.bench.side_by_side import ComparisonRow, compare, measurement_notes, plot_comparison
from egmla.configuration import load_preset
from egmla.samples import sample_path, sample_text
from egmla.utils.accounting import cache_elements_per_layer, cache_nbytes, count_parameters, meta_model
from egmla.utils.perplexity import perplexity, token_windows
from egmla.utils.plotting import check_matplotlib


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
CONFIGS = {
    "egmla": (EGMLAConfig(**SHAPE, **LATENT), 8 + 4),
    "llama": (LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=8), 2 * 2 * 8),
    "deepseek": (
        DeepseekV3Config(**SHAPE, **LATENT, q_lora_rank=None, num_key_value_heads=4, first_k_dense_replace=2),
        8 + 4,
    ),
}


class CharacterTokenizer:
    """A token per character."""

    def __call__(self, text, **kwargs):
        return {"input_ids": torch.tensor([[ord(character) % SHAPE["vocab_size"] for character in text]])}


@pytest.fixture(params=CONFIGS)
def kind(request) -> str:
    return request.param


def build(kind: str):
    return AutoModelForCausalLM.from_config(CONFIGS[kind][0]).eval()


def test_perplexity_by_hand():
    model = build("llama")
    windows = torch.randint(0, 97, (3, 11))
    logits = model(windows).logits
    losses = [
        -torch.log_softmax(logits[row, position], dim=-1)[windows[row, position + 1]].item()
        for row in range(3)
        for position in range(10)
    ]
    assert perplexity(model, windows, chunk=4) == pytest.approx(math.exp(sum(losses) / 30), rel=1e-5)


def test_perplexity_reports_progress():
    seen = []
    perplexity(build("egmla"), torch.randint(0, 97, (2, 5)), progress=lambda *state: seen.append(state))
    assert seen == [(1, 2), (2, 2)]


def test_token_windows():
    assert token_windows(CharacterTokenizer(), "a" * 25, 10).shape == (2, 10)
    assert token_windows(CharacterTokenizer(), "a" * 25, 10, max_windows=1).shape == (1, 10)
    with pytest.raises(ValueError, match="has 5 tokens and one window needs 10"):
        token_windows(CharacterTokenizer(), "a" * 5, 10)


def test_cache_elements_are_counted(kind):
    config, elements = CONFIGS[kind]
    assert cache_elements_per_layer(meta_model(config)) == [elements] * 2


def test_counting_leaves_the_configuration_alone():
    config = load_preset("egmla-kv16-120m")
    before = config.to_dict()
    meta_model(config)
    assert config.to_dict() == before


def test_cache_elements_of_an_unlike_cache():
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"MambaForCausalLM leaves .* so its elements cannot be counted"):
        cache_elements_per_layer(meta_model(config))


def test_parameters_add_up(kind):
    model = meta_model(CONFIGS[kind][0])
    counts = count_parameters(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["MLP"] == 2 * 3 * 32 * 48


def test_gate_tables_are_counted_apart():
    config = EGMLAConfig(**SHAPE, **LATENT, kv_gate_embedding_dim=5)
    counts = count_parameters(meta_model(config))
    assert counts["gate tables"] == 2 * 97 * 5
    assert counts["embeddings"] == 97 * 32


def test_parts_of_gpt2():
    counts = count_parameters(meta_model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=97, n_positions=16)))
    assert counts["attention"] == 8 * 24 + 24 + 8 * 8 + 8


@pytest.mark.parametrize("context", [1, 2, 700])
def test_synthetic_cache_has_the_stated_length(kind, context):
    cache = synthetic_cache(build(kind), context, batch_size=2)
    assert cache.get_seq_length() == context
    used, allocated = cache_nbytes(cache)
    assert used == 2 * context * 2 * CONFIGS[kind][1] * 4
    assert used <= allocated <= 1.25 * used + 2 * 2 * 64 * CONFIGS[kind][1] * 4
    assert all(torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all() for layer in cache.layers)


def test_synthetic_cache_wants_positive_numbers():
    with pytest.raises(ValueError, match="context=0"):
        synthetic_cache(build("egmla"), 0)


def test_contestants_take_turns():
    models = {kind: build(kind) for kind in CONFIGS}
    order = []
    for kind, model in models.items():
        model.register_forward_pre_hook(lambda *_, kind=kind: order.append(kind))
    turns = []
    timings = time_decode(
        models, 50, steps=3, rounds=2, warmup=1, batch_size=2, progress=lambda *done: turns.append(done)
    )
    # One forward each to make a cache, then turns of 1 + 3 steps.
    assert order == list(CONFIGS) + [kind for _ in range(2) for kind in CONFIGS for _ in range(4)]
    assert turns[-1] == (6, 6)
    for kind, timing in timings.items():
        assert len(timing.seconds) == 6
        assert timing.p10 <= timing.median <= timing.p90
        assert timing.cache_used_bytes == 2 * 50 * 2 * CONFIGS[kind][1] * 4


def test_timing_figures():
    turns = [[0.1 * step for step in steps] for steps in (range(1, 6), range(6, 12))]
    timing = DecodeTiming(context=10, batch_size=3, turns=turns)
    assert timing.median == pytest.approx(0.6)
    assert (timing.p10, timing.p90) == (pytest.approx(0.2), pytest.approx(1.0))
    assert timing.tokens_per_second == pytest.approx(5.0)
    with pytest.raises(ValueError, match="rounds=0"):
        time_decode({}, 10, rounds=0)


def test_compare_and_plot(tmp_path):
    models = {"stock": build("llama"), "latent": build("egmla")}
    rows = compare(
        models,
        CharacterTokenizer(),
        sample_text("evaluation"),
        window=32,
        max_windows=2,
        context=40,
        steps=1,
        rounds=1,
    )
    assert [row.model for row in rows] == ["stock", "latent"]
    assert [row.cache_elements_per_token for row in rows] == [64, 24]
    assert [row.cache_bytes_per_token for row in rows] == [256, 96]
    assert all(math.isfinite(row.perplexity) and row.decode_tokens_per_second > 0 for row in rows)
    assert measurement_notes(models, 32, 2, 40)["dtype"] == "float32"

    pytest.importorskip("matplotlib")
    plot_comparison(rows, tmp_path / "table.png", "A title", "a note")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_plot_wants_rows(tmp_path):
    with pytest.raises(ValueError, match="0 models"):
        plot_comparison([], tmp_path / "table.png", "A title")
    row = ComparisonRow("m", 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1)
    with pytest.raises(ValueError, match="7 models"):
        plot_comparison([row] * 7, tmp_path / "table.png", "A title")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'egmla\[plot\]'"):
        check_matplotlib()


def test_samples_are_there():
    evaluation, calibration = sample_text("evaluation"), sample_text("calibration")
    assert evaluation.startswith("ALICE")
    assert 50_000 < len(evaluation.encode()) < 70_000
    assert 200_000 < len(calibration.encode()) < 300_000
    # Perplexity on text that was calibrated on would flatter.
    assert not {line for line in evaluation.splitlines() if len(line) > 40} & set(calibration.splitlines())
    assert (sample_path("evaluation").parent / "README.md").is_file()
    with pytest.raises(ValueError, match="'nix' is no sample: use one of calibration, evaluation"):
        sample_path("nix")
