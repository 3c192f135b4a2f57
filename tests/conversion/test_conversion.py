"""Conversion: exact mode equals the source, the closed form is what it claims, bad input leaves nothing behind."""

import json
import shutil

import conversions
import pytest
import torch
from cases import make_tokenizer
from conversions import CLOSED_FORM, EXACT_TOLERANCE, SHRUNK, SOURCES, random_layer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from egmla import EGMLACache
from egmla.conversion import Recipe, Refinement, convert_checkpoint, sources
from egmla.conversion import source as source_module
from egmla.conversion.calibration import LayerStatistics
from egmla.conversion.closed_form import exact_attention, low_rank_attention, smaller_latent
from egmla.conversion.families import AttentionShape
from egmla.conversion.refinement import ConvertedRun as refinement_run
from egmla.conversion.refinement import causal_attention_in_blocks
from egmla.conversion.shards import ShardWriter


pytestmark = pytest.mark.long  # in front, see conftest.py


make_source = conversions.make_source  # the fixture


@pytest.mark.parametrize("name", SOURCES)
def test_exact_conversion_is_the_source(make_source, tmp_path, name):
    source, folder = make_source(name)
    target = tmp_path / "converted"
    convert_checkpoint(folder, target, exact=True)
    converted = AutoModelForCausalLM.from_pretrained(target).eval()
    ids = torch.randint(2, 128, (2, 100))
    with torch.no_grad():
        assert (converted(ids).logits - source(ids).logits).abs().max() < EXACT_TOLERANCE
    mask = torch.ones_like(ids)
    expected = source.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None)
    cache = EGMLACache(converted.config)
    tokens = converted.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, past_key_values=cache
    )
    assert torch.equal(tokens, expected)
    shape = source.config
    per_token = shape.num_hidden_layers * 2 * shape.num_key_value_heads * shape.head_dim
    assert converted.config.cache_elements_per_token == per_token


def test_calibrated_conversion_is_whole_and_exact_at_full_rank(make_source, calibration, tmp_path):
    source, folder = make_source("llama-biases")
    report = convert_checkpoint(
        folder,
        tmp_path / "full",
        kv_lora_rank=30,
        qk_rope_head_dim=30,
        calibration=calibration,
        refinement=CLOSED_FORM,
    )
    smaller = convert_checkpoint(
        folder, tmp_path / "small", kv_lora_rank=5, qk_rope_head_dim=4, calibration=calibration, refinement=CLOSED_FORM
    )
    assert report["plan"]["target_elements"] == 120 and smaller["plan"]["target_elements"] == 18
    ids = torch.tensor([list(calibration.read_text()[:200].encode())])
    with torch.no_grad():
        expected = source(ids).logits
        full, small = (
            float((AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(ids).logits - expected).abs().max())
            for name in ("full", "small")
        )
    assert full < EXACT_TOLERANCE and small > 100 * full
    target = tmp_path / "full"
    assert (target / "model.safetensors").is_file() and (target / "tokenizer.json").is_file()
    assert GenerationConfig.from_pretrained(target).temperature == 0.7
    assert (target / "chat_template.jinja").is_file()
    assert json.loads((target / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_egmla.EGMLAModel"
    assert (target / "modeling_egmla.py").is_file() and (target / "cache_egmla.py").is_file()
    assert json.loads((target / "conversion_report.json").read_text())["calibration"]["file"] == calibration.name


def test_full_widths_without_calibration_are_exact(make_source, tmp_path, monkeypatch):
    """The source's own widths need no calibration; the target may be an empty current folder."""
    source, folder = make_source("llama-gqa-tied")
    monkeypatch.chdir(tmp_path)
    report = convert_checkpoint(folder, ".", kv_lora_rank=30, qk_rope_head_dim=30)
    assert report["plan"]["exact"]
    ids = torch.randint(2, 128, (1, 40))
    with torch.no_grad():
        difference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits - source(ids).logits
    assert difference.abs().max() < EXACT_TOLERANCE


def test_calibration_starts_as_the_tokenizer_does(make_source, calibration, tmp_path, monkeypatch):
    """Where a tokenizer puts a first token before every text, each calibration sequence has it."""
    from tokenizers.processors import TemplateProcessing

    from egmla.conversion import layer_loop

    _, folder = make_source("llama-mha")
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "\x02"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="\x02 $A", special_tokens=[("\x02", 2)])
    tokenizer.save_pretrained(folder)
    seen = []
    run = layer_loop.SourceRun
    monkeypatch.setattr(layer_loop, "SourceRun", lambda *args: seen.append(args[2]) or run(*args))
    convert_checkpoint(
        folder, tmp_path / "t", kv_lora_rank=8, qk_rope_head_dim=4, calibration=calibration, refinement=CLOSED_FORM
    )
    assert (seen[0][:, 0] == 2).all() and not (seen[0][:, 1:] == 2).any()


def test_source_without_tokenizer_is_said_to_have_none(make_source, tmp_path):
    _, folder = make_source("llama-mha")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.warns(UserWarning, match="has no tokenizer that can be read"):
        report = convert_checkpoint(folder, tmp_path / "t", exact=True)
    assert report["tokenizer"] is None


def test_gate_starts_at_identity_and_can_learn(make_source, tmp_path):
    _, folder = make_source("llama-gqa-tied")
    convert_checkpoint(folder, tmp_path / "converted", exact=True)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", kv_gate=None).eval()
    ids = torch.randint(2, 128, (1, 40))
    assert torch.equal(gated(ids).logits, plain(ids).logits)
    gated(ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in gated.named_parameters() if n.endswith("kv_gate_norm.weight")]
    assert len(gradients) == 2 and all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(metric="output"), Recipe(rope_metric="key", centred=False)])
def test_full_rank_closed_form_loses_only_rotation(recipe):
    """With every direction in the latent, scores differ only where a rotation was replaced by its mean."""
    shape = AttentionShape(heads=6, kv_heads=3, head_dim=8, hidden_size=48)
    weights, statistics, inputs = random_layer(shape)
    statistics.rotation = torch.ones_like(statistics.rotation)  # as if every token looked at itself: nothing is lost
    P, R, H, d = 8, 2 * 24 - 8, 6, 8
    new = low_rank_attention(weights, shape, statistics, R, P, recipe)
    queries = (inputs @ new.q.T + new.q_bias).view(-1, H, d + P)
    latent, rope_key = (inputs @ new.kv_a.T + new.kv_a_bias).split([R, P], dim=-1)
    up_k, up_v = new.kv_b.view(H, 2 * d, R).split([d, d], dim=1)
    keys = torch.cat((torch.einsum("tr,hnr->thn", latent, up_k), rope_key[:, None].expand(-1, H, -1)), dim=-1)
    scores = torch.einsum("thx,shx->hts", queries, keys)
    old_q = (inputs @ weights.q.T + weights.q_bias).view(-1, H, d)
    old_k = (inputs @ weights.k.T + weights.k_bias).view(-1, 3, d).repeat_interleave(2, dim=1)
    expected = torch.einsum("thx,shx->hts", old_q, old_k)
    # A constant in the keys moves all scores of a query alike, which the softmax does not see.
    torch.testing.assert_close(scores.softmax(-1), expected.softmax(-1), atol=1e-8, rtol=1e-6)
    old_v = (inputs @ weights.v.T + weights.v_bias).view(-1, 3, d).repeat_interleave(2, dim=1)
    values = torch.einsum("tr,hvr->thv", latent, up_v)
    outputs = values.reshape(500, -1) @ new.o.T + new.o_bias
    expected_outputs = old_v.reshape(500, -1) @ weights.o.T + weights.o_bias
    torch.testing.assert_close(outputs, expected_outputs, atol=1e-8, rtol=1e-8)


def test_low_rank_is_optimal_in_its_metric():
    """Eckart-Young: what is lost of the weighted keys and values is the sum of the eigenvalues left out."""
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=8, hidden_size=40)
    weights, statistics, inputs = random_layer(shape)
    R = 7
    new = low_rank_attention(weights, shape, statistics, R, 0, Recipe())
    latent = inputs @ new.kv_a.T + new.kv_a_bias
    up_k, up_v = new.kv_b.view(4, 16, R)[::2].split([8, 8], dim=1)
    centred = inputs - inputs.mean(dim=0)
    key_error = centred @ weights.k.T - latent @ up_k.reshape(16, R).T
    value_error = centred @ weights.v.T - latent @ up_v.reshape(16, R).T
    # balance 1: keys are scaled to the values' energy
    ratio = (centred @ weights.v.T).square().sum() / (centred @ weights.k.T).square().sum()
    lost = (ratio * key_error.square().sum() + value_error.square().sum()) / 500
    assert lost == pytest.approx(float(new.spectrum[R:].sum()), rel=1e-6)


def test_smaller_latent_is_optimal_in_its_metric():
    """Eckart-Young again: what is lost of an MLA layer's logits and outputs is the sum of the eigenvalues left out."""
    generator = torch.Generator().manual_seed(5)
    rand = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    H, N, V, r, R, T = 3, 8, 6, 24, 9, 400
    kv_b, o = rand(H * (N + V), r), rand(20, H * V)
    latents, queries = rand(T, r) @ rand(r, r) + 3 * rand(r), rand(H, T, N + 4) @ rand(H, N + 4, N + 4)
    mean = latents.mean(dim=0)
    statistics = LayerStatistics(
        key_moment=torch.empty(0, 0),
        query_moment=queries.mT @ queries / T,
        mean=mean,
        raw_moment=latents.T @ latents / T,
        rotation=torch.empty(H, 0),
    )

    def energies(expanded: torch.Tensor) -> tuple[float, float]:
        """Of logits and outputs that keys and values `[T, H (N + V)]` make."""
        keys, values = expanded.view(T, H, N + V).split([N, V], dim=-1)
        logits = torch.einsum("hqn,thn->hqt", queries[..., :N], keys).square().sum() / T**2
        # Heads attend to different tokens, so their errors do not cancel: each counts by itself.
        outputs = torch.einsum("thv,ohv->tho", values, o.view(20, H, V)).square().sum() / T
        return float(logits), float(outputs)

    logits, outputs = energies((latents - mean) @ kv_b.T)

    def lost(down: torch.Tensor, up: torch.Tensor) -> float:
        lost_logits, lost_outputs = energies((latents - mean) @ (kv_b - up @ down).T)
        return outputs / logits * lost_logits + lost_outputs  # balance 1: equal energy

    best = smaller_latent(kv_b, o, N, statistics, R, Recipe(metric="output", damping=0.0))
    plain = torch.linalg.svd(kv_b)[2][:R]
    on_input = smaller_latent(kv_b, o, N, statistics, R, Recipe(metric="input"))
    assert lost(best.down, best.kv_b) == pytest.approx(float(best.spectrum[R:].sum()), rel=1e-6)
    assert 1.1 * lost(best.down, best.kv_b) < lost(on_input.down, on_input.kv_b) < lost(plain, kv_b @ plain.T)
    torch.testing.assert_close(best.down_bias, -best.down @ mean)
    values = kv_b.view(H, N + V, r)[:, N:] @ mean
    torch.testing.assert_close(best.o_bias, o @ values.flatten())


def test_exact_attention_needs_equal_blocks():
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=6, hidden_size=20)
    weights, _, _ = random_layer(shape)
    new = exact_attention(weights, shape)
    assert new.q.shape == (4 * 12, 20) and new.kv_a.shape == (24, 20) and new.slots == [0, 1, 2, 0, 1, 2]
    # Each head is on the block of its own key head: half of its rows are zero.
    assert int((new.q.abs().sum(dim=1) == 0).sum()) == 4 * 6


def test_shards_and_dtype(make_source, tmp_path, monkeypatch):
    _, folder = make_source("llama-mha", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (100_000,))
    target = tmp_path / "converted"
    convert_checkpoint(folder, target, exact=True, dtype="bfloat16")
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


def test_dry_run_writes_nothing(make_source, calibration, tmp_path):
    _, folder = make_source("llama-mha")
    plan = convert_checkpoint(
        folder, tmp_path / "t", kv_lora_rank=20, qk_rope_head_dim=6, calibration=calibration, dry_run=True
    )
    assert plan["plan"]["target_elements"] == 52 and plan["plan"]["source_elements"] == 240
    assert plan["estimate"]["seconds"] > 0 and plan["estimate"]["memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_room_on_disk(make_source, calibration, tmp_path, monkeypatch):
    """Known before the work, refused where there is less; what an interrupted run left there is counted as room."""
    _, folder = make_source("llama-gqa-tied")
    target, arguments = tmp_path / "t", {**SHRUNK, "calibration": calibration}
    room = convert_checkpoint(folder, target, **arguments, dry_run=True)["disk"]
    used, parts = [0], []
    usage = shutil.disk_usage(tmp_path)

    def less(missing):
        there = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: usage._replace(free=room["needed_bytes"] - there - missing)
        )

    def watch(*step):
        used.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
        parts.append(len(list(tmp_path.rglob("part-*"))))
        if len(parts) > 5 and max(parts) > 1:
            raise KeyboardInterrupt

    for dry_run in (True, False):
        less(1)
        with pytest.raises(
            OSError, match=r"has \d.\d\d GB free on its disk, and the conversion needs .* Free space or"
        ):
            convert_checkpoint(folder, target, **arguments, dry_run=dry_run)
        assert list(tmp_path.iterdir()) == []
    less(0)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(folder, target, **arguments, progress=watch)
    less(0)
    convert_checkpoint(folder, target, **arguments)
    assert max(used) <= 1.1 * room["needed_bytes"]
    tensors = load_file(target / "model.safetensors").values()
    assert room["weights_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_refinement_lowers_the_error_on_text_it_was_not_trained_on(make_source, calibration, tmp_path):
    _, folder = make_source("llama-gqa-tied")
    refinement = Refinement(steps=40, dtype="float32")
    report = convert_checkpoint(
        folder, tmp_path / "t", **{**SHRUNK, "refinement": refinement}, calibration=calibration
    )
    assert report["refinement"]["steps"] == 40
    for layer in report["layers"]:
        assert layer["attention_error"]["after"] < 0.9 * layer["attention_error"]["before"]
    # The gate was not asked to take part.
    norms = [v for k, v in load_file(tmp_path / "t/model.safetensors").items() if "kv_gate_norm.weight" in k]
    assert len(norms) == 2 and all(norm.abs().max() == 0 for norm in norms)


@pytest.mark.parametrize("T", [5, 256, 600])
def test_attention_in_blocks_is_causal_attention(T):
    """Whole blocks, part of one and both, widths of values apart from keys'; gradients too."""
    generator = torch.Generator().manual_seed(T)
    tensors = [torch.randn(2, 3, T, d, generator=generator) for d in (12, 12, 7)]
    results = []
    for attend in (causal_attention_in_blocks, None):
        query, key, value = (tensor.clone().requires_grad_() for tensor in tensors)
        if attend is None:
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
        else:
            output = attend(None, query, key, value, None, 0.3)[0].transpose(1, 2)
        (output * torch.linspace(0, 1, T)[:, None]).sum().backward()
        results.append([output, query.grad, key.grad, value.grad])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="takes no other mask"):
        causal_attention_in_blocks(None, *tensors, torch.zeros(T, T), 0.3)


def test_refinement_keeps_the_closed_form_where_it_is_better(make_source, calibration, tmp_path):
    _, folder = make_source("llama-gqa-tied")
    for name, refinement in (("a", CLOSED_FORM), ("b", Refinement(steps=2, learning_rate=10.0, dtype="float32"))):
        convert_checkpoint(folder, tmp_path / name, **{**SHRUNK, "refinement": refinement}, calibration=calibration)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_refined_gate_leaves_identity(make_source, calibration, tmp_path):
    _, folder = make_source("llama-gqa-tied")
    settings = {**SHRUNK, "refinement": Refinement(steps=3, gate=True)}
    convert_checkpoint(folder, tmp_path / "t", **settings, calibration=calibration)
    norms = [v for k, v in load_file(tmp_path / "t/model.safetensors").items() if "kv_gate_norm.weight" in k]
    assert all(norm.abs().max() > 0 for norm in norms)


def test_refinement_has_no_dropout(make_source, calibration, tmp_path, monkeypatch):
    """Whatever the source was trained with; on a GPU the attention function would follow it."""
    _, folder = make_source("llama-dropout")
    seen = set()

    def attend(*args, dropout=0.0, **kwargs):
        seen.add(dropout)
        return causal_attention_in_blocks(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "egmla_blocks", attend)
    convert_checkpoint(folder, tmp_path / "t", **SHRUNK, calibration=calibration)
    assert seen == {0.0}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t").config.attention_dropout == 0.5


def test_refined_states_are_those_of_the_written_model(make_source, calibration, tmp_path, monkeypatch):
    """What the next layer is refined on is what the model gives when it is loaded, gate and rotation included."""
    from egmla.conversion import layer_loop

    _, folder = make_source("llama-yarn")
    runs = []
    monkeypatch.setattr(layer_loop, "ConvertedRun", lambda *args: runs.append(refinement_run(*args)) or runs[-1])
    settings = {**SHRUNK, "refinement": Refinement(steps=3, gate=True, dtype="float32")}
    convert_checkpoint(folder, tmp_path / "t", **settings, calibration=calibration, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    embeddings = runs[0].embeddings
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(inputs_embeds=embeddings[:2])
    torch.testing.assert_close(seen[0], runs[0].states[:2], atol=2e-4, rtol=1e-4)


def test_errors_of_the_closed_form_are_those_of_the_written_model(make_source, calibration, tmp_path, monkeypatch):
    """Without refinement, too, the report has each attention's error, on the last sequence."""
    from egmla.conversion import layer_loop

    source, folder = make_source("llama-yarn")
    seen = []
    run = layer_loop.SourceRun
    monkeypatch.setattr(layer_loop, "SourceRun", lambda *args: seen.append(args[2]) or run(*args))
    settings = {**SHRUNK, "refinement": CLOSED_FORM, "dtype": "float32"}
    report = convert_checkpoint(folder, tmp_path / "t", **settings, calibration=calibration)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    outputs = {source: [], converted: []}
    for model, kept in outputs.items():
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output[0]))
        with torch.no_grad():
            model(seen[0][-1:])
    for layer, ours, theirs in zip(report["layers"], outputs[converted], outputs[source], strict=True):
        error = (ours - theirs).square().sum() / theirs.square().sum()
        assert layer["attention_error"] == {"before": pytest.approx(float(error), rel=1e-3)}


def test_two_conversions_are_identical(make_source, calibration, tmp_path):
    _, folder = make_source("llama-gqa-tied")
    for name in ("a", "b"):
        convert_checkpoint(folder, tmp_path / name, **SHRUNK, calibration=calibration)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_lora_rank": 0, "qk_rope_head_dim": 4}, r"kv_lora_rank=0: must be from 1 to 56"),
        ({"kv_lora_rank": 57, "qk_rope_head_dim": 4}, r"kv_lora_rank=57: must be from 1 to 56.*use exact"),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 5}, r"qk_rope_head_dim=5: must be even and from 0 to 30"),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 32}, r"qk_rope_head_dim=32: must be even and from 0 to 30"),
        ({"kv_lora_rank": [8, 8, 8], "qk_rope_head_dim": 4}, r"3 entries and the source 2 layers"),
        ({"kv_lora_rank": 8, "exact": True}, r"exact mode keeps everything"),
        ({"cache": 1.5}, r"cache=1.5: .* above 0 and at most 1"),
        ({}, r"Say how small the cache shall be"),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 4, "calibration": None}, r"needs calibration text"),
        ({"exact": True, "dtype": "int8"}, r"dtype='int8': must be one of float32"),
    ],
)
def test_bad_arguments(make_source, calibration, tmp_path, arguments, message):
    _, folder = make_source("llama-gqa-tied")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "t", **{"calibration": calibration, **arguments})
    assert not (tmp_path / "t").exists()


def test_calibration_text_too_short(make_source, tmp_path):
    _, folder = make_source("llama-gqa-tied")
    short = tmp_path / "short.txt"
    short.write_text("abc " * 100)
    with pytest.raises(ValueError, match=r"gives 400 calibration tokens; at least 1024 are required"):
        convert_checkpoint(folder, tmp_path / "t", kv_lora_rank=8, qk_rope_head_dim=4, calibration=short)


def test_target_not_empty(make_source, tmp_path):
    _, folder = make_source("llama-gqa-tied")
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists and is not empty"):
        convert_checkpoint(folder, tmp_path, exact=True)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_missing_shard(make_source, tmp_path):
    _, folder = make_source("llama-mha", max_shard_size="100KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=rf"lacks {lost.name}, which model.safetensors.index.json lists"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)


def test_an_index_left_beside_one_file(make_source, tmp_path):
    """`save_pretrained` of the whole into a folder that had shards."""
    model, folder = make_source("llama-mha", max_shard_size="100KB")
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    convert_checkpoint(folder, tmp_path / "t", exact=True)
    written = load_file(tmp_path / "t" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], model.lm_head.weight)


def test_an_interrupt_that_safetensors_turns_into_an_error(make_source, monkeypatch):
    _, folder = make_source("llama-mha")
    source = sources.open_source(folder)

    class Interrupted:
        def __init__(self, *args, **kwargs):
            raise ValueError(source_module.INTERRUPTED)

    monkeypatch.setattr(source_module, "safe_open", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.tensor("lm_head.weight")


def test_a_head_that_is_not_the_embedding_it_is_tied_to(make_source, tmp_path):
    """Transformers uses it, whatever the configuration says."""
    model, folder = make_source("llama-gqa-tied")
    head = model.lm_head.weight.detach().clone()
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    convert_checkpoint(folder, tmp_path / "same", exact=True)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight that is not its model.embed_tokens.weight.*Set tie_word"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)


def test_truncated_generation_config(make_source, tmp_path):
    _, folder = make_source("llama-mha")
    (folder / "generation_config.json").write_text('{"do_sample": tr')
    with pytest.raises(ValueError, match=r"generation_config.json .*download it again"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)


def test_truncated_shard(make_source, tmp_path):
    _, folder = make_source("llama-mha")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_nan_weights(make_source, tmp_path, name):
    _, folder = make_source("llama-mha")

    def poison(tensors):
        tensors[name][0, 0] = float("nan")

    change_weights(folder, poison)
    with pytest.raises(ValueError, match=rf"Tensor {name} in .* has 1 values that are NaN"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["copied", "computed"])
def test_values_too_large_for_the_dtype(make_source, calibration, tmp_path, part):
    """Large values make a large latent, and its norm a constant 300 times as large, which its gain takes back."""
    _, folder = make_source("llama-mha")
    name = "mlp.up_proj.weight" if part == "copied" else "self_attn.v_proj.weight"
    change_weights(folder, lambda tensors: tensors[f"model.layers.1.{name}"].mul_(1e6 if part == "copied" else 1e3))
    widths = {"kv_lora_rank": 12, "qk_rope_head_dim": 6, "calibration_tokens": 1024, "refinement": CLOSED_FORM}
    settings = {"exact": True} if part == "copied" else {**widths, "calibration": calibration, "latent_norm": True}
    named = name if part == "copied" else "self_attn.kv_a_layernorm.weight"
    message = rf"Tensor model.layers.1.{named} .* torch.float16 holds up to 6.55e\+04; use dtype bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "t", **settings, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    convert_checkpoint(folder, tmp_path / "t", **settings, dtype="bfloat16")


def test_missing_and_unknown_tensors(make_source, tmp_path):
    _, folder = make_source("llama-mha")
    change_weights(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"1 tensors that a llama model does not, first model.layers.0.extra.weight"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)
    change_weights(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "extra" in n or "up_proj" in n])
    with pytest.raises(ValueError, match=r"lacks 2 tensors its config asks for, first model.layers.0.mlp.up_proj"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)


def test_unsupported_sources(make_source, tmp_path):
    _, folder = make_source("mistral-wide-heads")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    with pytest.raises(ValueError, match=r"sliding window of 64 tokens"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(ValueError, match=r"'gpt_neox' is not supported. Supported: llama, mistral"):
        convert_checkpoint(folder, tmp_path / "t", exact=True)
    with pytest.raises(FileNotFoundError, match=r"is no folder"):
        convert_checkpoint(tmp_path / "nothing", tmp_path / "t", exact=True)
    with pytest.raises(FileNotFoundError, match=r"nothing.gguf does not exist"):
        convert_checkpoint(tmp_path / "nothing.gguf", tmp_path / "t", exact=True)
