"""Caches with bits by importance: what is measured, the change of basis, and whole conversions."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from egmla import EGMLACache
from egmla.conversion import ConversionSettings, Refinement, convert_checkpoint
from egmla.conversion.allocation import LayerBits, Storage, cache_bytes
from egmla.conversion.bits import cheapest_basis, layer_in_basis
from egmla.conversion.job import planned_report, prepare
from egmla.conversion.sensitivity import measure_sensitivity
from egmla.conversion.settings import check_settings, command_line
from egmla.model_cards.converted import summary
from egmla.samples import sample_path, sample_text


@pytest.fixture(scope="module")
def options(calibration):
    return {"calibration": calibration, "calibration_tokens": 2048, "shipped_text": False}


@pytest.fixture(scope="module")
def converted(llama_folder, options, tmp_path_factory):
    target = tmp_path_factory.mktemp("bits") / "model"
    return target, convert_checkpoint(llama_folder, target, cache=0.3, **options)


@pytest.fixture(scope="module")
def full(llama_folder, options, tmp_path_factory):
    """The same model before it gets bits: all of the rank beside two thirds of the rotary key."""
    target = tmp_path_factory.mktemp("full") / "model"
    convert_checkpoint(
        llama_folder, target, kv_lora_rank=64, qk_rope_head_dim=32, refinement=Refinement(steps=0), **options
    )
    return AutoModelForCausalLM.from_pretrained(target).eval()


def sequences(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def with_noise(model, scales: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of a model whose entries get independent noise of these sizes `[R + P]` in each layer."""
    generator = torch.Generator().manual_seed(1)
    attentions = [layer.self_attn for layer in model.model.layers]

    def noisy(attention, scale):
        project = attention.project

        def changed(*args, **kwargs):
            nope, rope, *entries = project(*args, **kwargs)
            joined = torch.cat(entries, dim=-1)
            joined = joined + scale.float() * torch.randn(joined.shape, generator=generator)
            return nope, rope, *attention.split(joined)

        return changed

    for attention, scale in zip(attentions, scales, strict=True):
        attention.project = noisy(attention, scale)
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits.log_softmax(-1)
    finally:
        for attention in attentions:
            del attention.project


def test_noise_costs_the_divergence_that_gradients_foretell(full):
    ids = sequences(24, 72)
    found = measure_sensitivity(full, ids, group_tokens=8, first_tokens=0)
    scales = [0.02 * layer.covariance.diagonal().sqrt() for layer in found]
    foretold = sum(float((layer.gradient.diagonal() * s**2).sum()) / 2 for layer, s in zip(found, scales, strict=True))
    exact, noisy = (with_noise(full, each, ids) for each in ([0 * s for s in scales], scales))
    divergence = float((exact.exp() * (exact - noisy)).sum(-1).mean())
    assert divergence == pytest.approx(foretold, rel=0.25) and foretold > 1e-6


def test_what_is_measured_of_entries_is_by_hand(full):
    seen = []
    attention = full.model.layers[1].self_attn
    project = attention.project

    def keep(*args, **kwargs):
        found = project(*args, **kwargs)
        seen.append(torch.cat(found[2:], dim=-1)[0, 0].detach().double())
        return found

    attention.project = keep
    try:
        layer = measure_sensitivity(full, sequences(3, 20), group_tokens=8, first_tokens=2)[1]
    finally:
        attention.project = project
    entries = torch.cat([entries[2:] for entries in seen])
    assert torch.allclose(layer.mean, entries.mean(dim=0), atol=1e-5)
    assert torch.allclose(layer.covariance, torch.cov(entries.T, correction=0), atol=1e-4)
    groups = torch.cat([entries[2:18].view(2, 8, -1) for entries in seen])
    apart = (groups - groups.mean(dim=1, keepdim=True)).flatten(0, 1)
    assert torch.allclose(layer.spread, apart.T @ apart / len(apart), atol=1e-4)
    assert not any(parameter.grad is not None for parameter in full.parameters())
    assert all(parameter.requires_grad for parameter in full.parameters())


def test_the_basis_makes_both_matrices_diagonal_and_sorts_by_importance(full):
    found = measure_sensitivity(full, sequences(24, 72), group_tokens=8, first_tokens=0)[0]
    basis = cheapest_basis(found, 64, damping=0.0)
    assert torch.allclose(basis.down @ basis.up, torch.eye(64, dtype=torch.float64), atol=1e-6)
    for matrix in (
        basis.down @ found.covariance[:64, :64] @ basis.down.T,
        basis.up.T @ found.gradient[:64, :64] @ basis.up,
    ):
        rest = matrix - torch.diag(matrix.diagonal())
        size = matrix.diagonal().clamp_min(0).sqrt()
        assert (rest.abs() <= 1e-4 * torch.outer(size, size) + 1e-9).all()
    for values in (basis.latent_importance, basis.pair_importance):
        assert all(before >= after for before, after in pairwise(values.tolist()))


def test_a_new_basis_keeps_the_function(full, tmp_path):
    ids = sequences(2, 40)
    found = measure_sensitivity(full, sequences(4, 72), group_tokens=8, first_tokens=0)
    with torch.no_grad():
        before = full(ids).logits
        changed = AutoModelForCausalLM.from_config(full.config).eval()
        changed.load_state_dict(full.state_dict())
        slots = []
        for layer_idx, (layer, measured) in enumerate(zip(changed.model.layers, found, strict=True)):
            basis = cheapest_basis(measured, 64)
            tensors = layer_in_basis(layer.self_attn.state_dict(), basis, full.config)
            layer.self_attn.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
            own = full.config.layer_rope_slots(layer_idx)
            slots.append([own[number] for number in basis.pairs])
            layer.self_attn.rope_slots = torch.tensor(slots[-1])
        assert slots != [full.config.layer_rope_slots(layer_idx) for layer_idx in range(2)]
        assert (changed(ids).logits - before).abs().max() < 2e-3 * before.abs().max()


def test_bytes_are_those_of_the_cache(converted):
    model = AutoModelForCausalLM.from_pretrained(converted[0], dtype=torch.bfloat16).eval()
    kept = model.config.kv_cache_bits
    for share, layers in {kept["share"]: kept["layers"], **kept["budgets"]}.items():
        cache = EGMLACache(model.config, bits=float(share))
        with torch.no_grad():
            for part in sequences(1, 256).split(64, dim=1):
                model(part, past_key_values=cache)
        bits = [LayerBits(*(expanded(layer[kind]) for kind in ("latent", "rope"))) for layer in layers]
        assert cache.nbytes == cache_bytes(bits, model.config.cache_elements_per_layer, Storage(), 256)


def expanded(runs: list[list[int]]) -> list[int]:
    return [bits for bits, count in runs for _ in range(count)]


def test_a_conversion_with_bits(converted, full):
    target, report = converted
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    bits, config = model.config.kv_cache_bits, model.config
    largest = report["cache"]["budgets"][0]
    assert bits["layers"] and set(bits["budgets"]) == {"0.25", "0.1875", "0.125", "0.09375", "0.0625"}
    assert 0.28 < largest["shares"]["32768"] <= 0.3
    for layer_idx, layer in enumerate(bits["layers"]):
        assert 0 < sum(count for _, count in layer["latent"]) <= config.layer_kv_lora_ranks[layer_idx]
        assert sum(count for _, count in layer["rope"]) <= config.qk_rope_head_dim // 2
    for smaller in report["cache"]["budgets"][1:]:
        assert smaller["shares"]["32768"] <= smaller["share"] and smaller["expected_kl"] > largest["expected_kl"]
    with torch.no_grad():
        ids = sequences(2, 40)
        assert (model(ids, use_cache=False).logits - full(ids).logits).abs().max() < 2e-3 * full(
            ids
        ).logits.abs().max()
    assert json.loads((target / "conversion_report.json").read_text())["cache"] == json.loads(
        json.dumps(report["cache"])
    )
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.float32}


def test_a_conversion_with_bits_is_evaluated_through_its_caches(llama_folder, options, tmp_path):
    """Perplexity and retrieval of the source, and of the two largest caches with bits."""
    text = tmp_path / "evaluation.txt"
    text.write_text(sample_text("evaluation")[:20000], encoding="utf-8")
    given = {**options, "evaluate": text, "evaluation_windows": 1}
    found = convert_checkpoint(llama_folder, tmp_path / "model", cache=0.3, **given)["evaluation"]
    assert set(found["caches"]) == {"source", "0.3", "0.25"}
    assert found["source"] == found["caches"]["source"]["perplexity"]
    assert found["converted"] == found["caches"]["0.3"]["perplexity"] != found["source"]
    for size in found["caches"].values():
        assert size["ratio"] == pytest.approx(size["perplexity"] / found["source"], rel=1e-4)
        assert 0 <= size["retrieved"] <= found["questions"]
    assert found["questions"] > 0
    assert len(found["continuations"]) == 1  # of one window
    assert all(row.keys() == {"context", "source", "0.3", "0.25"} for row in found["continuations"])


def test_a_card_says_what_a_cache_with_bits_takes(converted):
    target, report = converted
    config = AutoModelForCausalLM.from_pretrained(target).config
    text = summary(config, report, "someone/source", trained=False)
    shares = report["cache"]["budgets"][0]["shares"]
    assert f"{shares['32768']:.1%} of the bytes" in text and f"{shares['2048']:.1%} at 2,048" in text
    assert "smaller ones: 0.25, 0.1875, 0.125, 0.09375, 0.0625" in text


def test_shipped_and_given_texts_share_the_tokens_by_turns(llama_folder, calibration, tmp_path):
    """Gradients are of the first sequences, so each domain stands among them; the command names what was given."""
    other = tmp_path / "other.txt"
    other.write_text("a third text, of other words. " * 200)
    settings = check_settings(ConversionSettings(cache=0.3, calibration=[calibration, other], calibration_tokens=4096))
    assert settings.calibration == (sample_path("calibration"), calibration, other)
    job = prepare(llama_folder, settings)
    texts = [path.read_text()[:9999] for path in settings.calibration]
    begins = ["".join(chr(token) for token in row[-40:]) for row in job.sequences[:6].tolist()]
    assert [next(i for i, text in enumerate(texts) if begin in text) for begin in begins] == [0, 1, 2, 0, 1, 2]
    report = planned_report(job)
    assert report["calibration"]["file"] == "calibration.txt, calibration.txt, other.txt"
    assert report["calibration"]["sequences"] == 15
    assert "--calibration calibration.txt --calibration other.txt --calibration-tokens 4096" in report["command"]


def test_the_shipped_text_is_enough_and_can_be_left_out(calibration):
    def texts(**options):
        return check_settings(ConversionSettings(cache=0.3, **options)).calibration

    assert texts() == texts(calibration=sample_path("calibration")) == (sample_path("calibration"),)
    assert texts(calibration=calibration, shipped_text=False) == (calibration,)
    assert texts(calibration=calibration, cache_dtype="bf16") == (calibration,)
    settings = check_settings(ConversionSettings(cache=0.3, calibration=calibration, shipped_text=False))
    assert "--no-shipped-text" in command_line("source", settings, {"tokens_asked": 1}, None)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_weights_keep_the_dtype_of_the_source(llama_folder, options, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", cache=0.3, dtype=dtype, **options)
    wanted = dtype or "bfloat16"
    assert report["dtype"] == wanted
    assert {tensor.dtype for tensor in load_file(tmp_path / "target" / "model.safetensors").values()} == {
        getattr(torch, wanted)
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").dtype == getattr(torch, wanted)
