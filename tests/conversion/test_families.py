"""Source families: exact mode is the real Transformers class, full-width closed form too, and refusals say why."""

import json

import conversions
import pytest
import torch
from cases import make_tokenizer
from conversions import ALL, EXACT_TOLERANCE, LATENT, PARTIAL, SMALL, random_layer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from egmla import EGMLACache, EGMLAConfig
from egmla.conversion import FAMILIES, Recipe, Refinement, bits, convert_checkpoint, layer_loop
from egmla.conversion.calibration import SourceRun
from egmla.conversion.closed_form import low_rank_attention
from egmla.conversion.estimates import _mlp_weights
from egmla.conversion.families import MISSING, AttentionShape, find_family
from egmla.conversion.refinement import ConvertedRun
from egmla.conversion.sources import open_source
from egmla.model_cards.scores import _count_parameters
from egmla.utils.accounting import cache_elements_per_layer, meta_model
from egmla.utils.perplexity import perplexity


pytestmark = pytest.mark.long  # in front, see conftest.py


make_source = conversions.make_family_source  # the fixture


LATENT_TOLERANCE = 1e-5  # nothing is computed anew
QUICK = {"calibration_tokens": 4096, "refinement": Refinement(steps=0)}


@torch.no_grad()
def differences(model, source, length: int = 100, ids: torch.Tensor | None = None) -> tuple[float, float]:
    """Largest difference of logits, all tokens at once and, with a cache, the last ones one by one."""
    ids = torch.randint(2, 128, (2, length)) if ids is None else ids
    length = ids.shape[1]
    whole = (model(ids).logits - source(ids).logits).abs().max()
    caches, steps = (EGMLACache(model.config), None), []
    for one, cache in zip((model, source), caches, strict=True):
        out = one(ids[:, :-5], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = [one(ids[:, i : i + 1], past_key_values=cache).logits for i in range(length - 5, length)]
        steps.append(torch.cat(logits, dim=1))
    return float(whole), float((steps[0] - steps[1]).abs().max())


def tokenized(folder, text, length: int = 100) -> torch.Tensor:
    """Ids `[1, length]` of the text's beginning, by the tokenizer that calibration uses: classes differ in spaces."""
    return AutoTokenizer.from_pretrained(folder)(text.read_text()[:length], return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("name", ALL)
def test_exact_conversion_is_the_source(make_source, tmp_path, name):
    source, folder = make_source(name)
    report = convert_checkpoint(folder, tmp_path / "converted", exact=True)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    ids = torch.randint(2, 128, (2, 100))
    assert source(ids).logits.std() > 0.1
    found = differences(converted, source)
    print(f"{name}: logits {found[0]:.1e}, decode steps {found[1]:.1e}")
    assert max(found) < (LATENT_TOLERANCE if name in LATENT else EXACT_TOLERANCE)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 64, "do_sample": False}
    # Where LongRoPE changes its frequencies ours starts over. Of the sources only Phi-3 does; others keep stale keys.
    stale = source.config.model_type != "phi3" and source.config.rope_parameters["rope_type"] == "longrope"
    expected = source.generate(ids, **options, **({"use_cache": False} if stale else {}))
    assert torch.equal(converted.generate(ids, **options), expected)
    cached = EGMLACache(converted.config)
    converted(ids, past_key_values=cached)
    assert cached.nbytes == 4 * ids.numel() * report["plan"]["target_elements"]
    assert report["plan"]["target_elements"] == report["plan"]["source_elements"]


def widths(config: PreTrainedConfig, share: float) -> dict:
    """Full latent and rotary widths of a source (`share` 1), or that share of its latent and little rotary key."""
    if FAMILIES[config.model_type].latent:
        ranks = config.kv_lora_rank
        return {"kv_lora_rank": [int(share * r) for r in ranks] if isinstance(ranks, list) else int(share * ranks)}
    shape = FAMILIES[config.model_type].shape(config)
    rope = shape.rope_width if share == 1 else 2
    return {"kv_lora_rank": int(share * 2 * shape.kv_width) - rope, "qk_rope_head_dim": rope}


@pytest.mark.parametrize("name", ALL)
def test_full_width_closed_form_is_the_source(make_source, calibration, tmp_path, name):
    """Every key that rotates keeps its rotation and the latent holds the rest: nothing is lost on the way there."""
    source, folder = make_source(name)
    ids, lost = tokenized(folder, calibration), []
    for share in (1, 0.3):
        asked = widths(source.config, share)
        report = convert_checkpoint(folder, tmp_path / str(share), **asked, calibration=calibration, **QUICK)
        converted = AutoModelForCausalLM.from_pretrained(tmp_path / str(share)).eval()
        assert converted.config.cache_elements_per_token == report["plan"]["target_elements"]
        assert converted.config.kv_lora_rank == asked["kv_lora_rank"]
        lost.append(differences(converted, source, ids=ids))
    print(f"{name}: full width {lost[0]}, small {lost[1]}")
    assert max(lost[0]) < EXACT_TOLERANCE and lost[1][0] > 100 * lost[0][0]


@pytest.mark.parametrize("name", ALL)
def test_a_cache_with_all_the_bits_is_the_source(make_source, calibration, tmp_path, name, monkeypatch):
    """Another basis of the latent changes nothing, and 8 bits a number change little."""
    monkeypatch.setattr(bits, "SENSITIVITY_TOKENS", 1024)  # with bits enough, any basis does
    source, folder = make_source(name)
    rope = {key: value for key, value in widths(source.config, 1).items() if key == "qk_rope_head_dim"}
    text = {"calibration": calibration, "calibration_tokens": 2048, "shipped_text": False}
    convert_checkpoint(folder, tmp_path / "t", cache=1.0, **rope, **text, dtype="float32")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    assert {width for layer in converted.config.kv_cache_bits["layers"] for width, _ in layer["latent"]} == {8}
    # Some types change their frequencies at a length, and what is read in chunks before it keeps those it was given.
    changes = source.config.rope_parameters["rope_type"] in ("longrope", "dynamic")
    ids = tokenized(folder, calibration, 30 if changes else 200)
    with torch.no_grad():
        expected = source(ids).logits
        assert (converted(ids, use_cache=False).logits - expected).abs().max() < 2e-3 * expected.abs().max()
        cache = EGMLACache(converted.config)
        found = torch.cat([converted(part, past_key_values=cache).logits for part in ids.split(8, dim=1)], dim=1)
    assert 0 < (found - expected).square().mean() < 1e-3 * expected.var()


def test_states_are_scaled_as_the_source_scales_them(make_source):
    """MiniCPM3 divides what its base model returns before its head, which perplexity and healing go by."""
    source, _ = make_source("minicpm3 untied")
    assert source.config.logits_scaling != 1
    ids = torch.randint(2, 128, (1, 40))
    with torch.no_grad():
        expected = source(ids, labels=ids).loss.exp().item()
    assert perplexity(source, ids) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["phi3 partial tied", "smollm3 yarn biases"])
def test_part_of_the_rotation_loses_less_than_none(make_source, calibration, tmp_path, name):
    """Half of what rotates in slots, all the rest in the latent: close to the source, closer than without rotation."""
    source, folder = make_source(name)
    shape = FAMILIES[source.config.model_type].shape(source.config)
    ids = tokenized(folder, calibration)
    lost = []
    for rope in (shape.rope_width // 4 * 2, 0):
        widths = {"kv_lora_rank": 2 * shape.kv_width - rope, "qk_rope_head_dim": rope}
        convert_checkpoint(folder, tmp_path / str(rope), **widths, calibration=calibration, **QUICK)
        converted = AutoModelForCausalLM.from_pretrained(tmp_path / str(rope)).eval()
        with torch.no_grad():
            lost.append(float((converted(ids).logits - source(ids).logits).square().mean()))
    print(name, lost)
    assert EXACT_TOLERANCE**2 < lost[0] < lost[1]


def test_layers_without_rotation_need_no_rotary_key(make_source, calibration, tmp_path):
    """Nothing rotates, so nothing is lost without a rotary part: the latent alone is the source."""
    source, folder = make_source("smollm3 without rotation")
    widths = {"kv_lora_rank": 2 * FAMILIES["smollm3"].shape(source.config).kv_width, "qk_rope_head_dim": 0}
    convert_checkpoint(folder, tmp_path / "t", **widths, calibration=calibration, **QUICK)
    ids = tokenized(folder, calibration)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    assert (converted(ids).logits - source(ids).logits).abs().max() < EXACT_TOLERANCE


def test_slots_of_a_layer_without_rotation_go_to_what_carries_most():
    """Where nothing rotates no rotation is lost, so slots go by energy, whatever was measured of rotation."""
    shape = AttentionShape(heads=6, kv_heads=3, head_dim=8, hidden_size=48)
    weights, statistics, _ = random_layer(shape)
    still = low_rank_attention(weights, shape, statistics, 20, 6, Recipe(), attention_factor=1.3, rotates=False)
    by_energy = low_rank_attention(weights, shape, statistics, 20, 6, Recipe(mean_rotation="none"))
    torch.testing.assert_close(still.kv_a, by_energy.kv_a)
    torch.testing.assert_close(still.q, by_energy.q)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_calibration_runs_the_source(make_source, name):
    """Queries, features and outputs of the last attention, measured layer by layer, are those in the real class."""
    source, folder = make_source(name)
    ids = torch.randint(2, 128, (3, 40))
    family, seen, attended = FAMILIES[source.config.model_type], [], []
    source.model.layers[-1].self_attn.register_forward_hook(lambda *args: attended.append(args[2][0]))
    for probe in family.hooked_modules(source.config):
        module = source.model.layers[-1].self_attn.get_submodule(probe)
        module.register_forward_hook(lambda *args: seen.append(args[2].double().reshape(120, -1)))
    source(ids)
    run = SourceRun(open_source(folder), family, ids, weighting="uniform")
    *_, last = (run.measure(layer_idx) for layer_idx in range(source.config.num_hidden_layers))
    outputs, statistics = last.outputs, last.statistics
    scale = source.config.scale_depth / 2**0.5 if source.config.model_type == "minicpm3" else 1.0
    torch.testing.assert_close(outputs, scale * attended[0], atol=1e-4, rtol=1e-4)
    shape, seen = family.shape(source.config), torch.cat(seen, dim=1)
    queries, features = seen.split([shape.heads * shape.head_dim, seen.shape[1] - shape.heads * shape.head_dim], 1)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(statistics.mean, features.mean(dim=0), **close)
    torch.testing.assert_close(statistics.raw_moment, features.T @ features / 120, **close)
    queries = queries.view(120, shape.heads, -1)
    expected = torch.einsum("thx,thy->hxy", queries, queries) / 120
    torch.testing.assert_close(statistics.query_moment, expected, **close)


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "minicpm3 tied", "deepseek_v3 experts", "egmla with encoder"])
def test_refined_states_are_those_of_the_written_model(make_source, calibration, tmp_path, monkeypatch, name):
    """Encoders, norms behind attention and scaled branches are in what the next layer is refined on."""
    source, folder = make_source(name)
    runs = []
    monkeypatch.setattr(layer_loop, "ConvertedRun", lambda *args: runs.append(ConvertedRun(*args)) or runs[-1])
    settings = {**QUICK, "refinement": Refinement(steps=20, dtype="float32"), "dtype": "float32"}
    asked = widths(source.config, 0.4)
    convert_checkpoint(folder, tmp_path / "t", **asked, calibration=calibration, **settings)
    model, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval(), []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(inputs_embeds=runs[0].embeddings[:2])
    torch.testing.assert_close(seen[0], runs[0].states[:2], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["phi3 partial, odd heads", "smollm3", "qwen3", "olmo2", "deepseek_v3"])
def test_converted_config_and_weights_survive_saving(make_source, tmp_path, name):
    _, folder = make_source(name)
    convert_checkpoint(folder, tmp_path / "first", exact=True)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    first.save_pretrained(tmp_path / "second")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    configs = [EGMLAConfig.from_pretrained(tmp_path / name).to_dict() for name in ("first", "second")]
    assert configs[0] == configs[1] and configs[0]["model_type"] == "egmla"
    ids = torch.randint(2, 128, (1, 20))
    assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize("name", ["deepseek_v3", "egmla, ranks and slots per layer"])
def test_full_width_of_a_latent_without_calibration_is_exact(make_source, tmp_path, name):
    source, folder = make_source(name)
    report = convert_checkpoint(folder, tmp_path / "t", **widths(source.config, 1), qk_rope_head_dim=6)
    assert report["plan"]["exact"] and "--exact" in report["command"]
    with pytest.raises(ValueError, match="no use for refinement"):
        convert_checkpoint(folder, tmp_path / "u", **widths(source.config, 1), refinement=Refinement(steps=1))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "glm4_moe_lite biases"])
def test_gate_is_exactly_one(make_source, tmp_path, name):
    _, folder = make_source(name)
    convert_checkpoint(folder, tmp_path / "t", exact=True)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "t", kv_gate=None).eval()
    ids = torch.randint(2, 128, (1, 20))
    assert torch.equal(gated(ids).logits, plain(ids).logits)


def test_trained_gate_is_refused(make_source, calibration, tmp_path):
    """A latent with a gate that does something cannot be mixed; one at identity is replaced by another."""
    model, _ = make_source("egmla")
    torch.nn.init.constant_(model.model.layers[1].self_attn.kv_gate_norm.weight, 0.1)
    model.save_pretrained(tmp_path / "trained")
    make_tokenizer().save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"gate of layer 1 of .* is trained .*kv_gate_norm.weight is not 0"):
        convert_checkpoint(tmp_path / "trained", tmp_path / "t", kv_lora_rank=8, calibration=calibration)


def test_longrope_beyond_its_switch(make_source, tmp_path):
    """Above the original context all positions rotate at the long frequencies, those generated before it too."""
    source, folder = make_source("phi3 longrope")
    convert_checkpoint(folder, tmp_path / "t", exact=True)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    assert differences(converted, source, 150)[0] < EXACT_TOLERANCE
    ids = torch.randint(2, 128, (2, 120))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    expected = source.generate(ids, **options)
    for cache in (EGMLACache(converted.config), EGMLACache(converted.config, max_cache_len=160)):
        assert torch.equal(converted.generate(ids, past_key_values=cache, **options), expected)
    with torch.no_grad():
        assert torch.equal(converted(expected).logits.argmax(-1)[:, 128:-1], expected[:, 129:])


def test_bf16_source_stays_bf16(make_source, tmp_path):
    """Scaled and sliced tensors keep the stored dtype."""
    source, folder = make_source("minicpm3 tied")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "t", exact=True)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    tensors = [tensor for file in (tmp_path / "t").glob("*.safetensors") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    ids = torch.randint(2, 128, (1, 20))
    assert (converted(ids).logits - source(ids).logits).abs().max() < 0.05 * source(ids).logits.abs().max()


def change_config(folder, target, **changes):
    """A copy of a source whose config.json says something else."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("name", "changes", "arguments", "message"),
    [
        (
            "phi3",
            {"sliding_window": 255},
            {},
            r"phi3 checkpoint attends in a sliding window of 255 tokens within .* 256",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
            {},
            r"qwen2 checkpoint attends in a sliding window of 64 tokens",
        ),
        # Its class has one window for all layers, whatever a configuration says of them.
        (
            "phi3",
            {"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]},
            {},
            r"phi3 checkpoint attends in a sliding window of 64 tokens",
        ),
        ("llama linear", {"rope_parameters": PARTIAL}, {}, r"partial_rotary_factor=0.7.*own llama does not"),
        (
            "phi3 partial tied",
            {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.8}},
            {},
            r"rotates 9 dimensions",
        ),
        ("llama linear", {"num_key_value_heads": 4}, {}, r"num_attention_heads=6 is no multiple of .*heads=4"),
        (
            "deepseek_v3",
            {},
            {"exact": False, "kv_lora_rank": 21},
            r"kv_lora_rank=21: must be from 1 to 20, the latent",
        ),
        (
            "deepseek_v3",
            {},
            {"exact": False, "cache": 0.2, "cache_dtype": "bf16"},
            r"cache=0.2: of 26 elements .* keeps 5, and the rotary key takes 6, which stays .* at least 0.27\.",
        ),
        (
            "egmla, ranks and slots per layer",
            {},
            {"exact": False, "cache": 0.3, "cache_dtype": "bf16"},
            r"cache=0.3: of 20 elements .* keeps 6, and the rotary key takes 6, .* must be at least 0.35\.",
        ),
        ("deepseek_v3", {}, {"exact": False, "kv_lora_rank": [8]}, r"has 1 entries and the source 2 layers"),
        (
            "deepseek_v3",
            {},
            {"exact": False, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
            r"qk_rope_head_dim=4: the rotary key of an MLA source stays as it is, 6 wide",
        ),
        (
            "qwen3",
            {},
            {"exact": False, "cache": 0.5, "recipe": Recipe(slots="uniform", freqfold=7)},
            r"freqfold=7: this qwen3 source normalises its queries",
        ),
        ("deepseek_v3", {}, {"exact": False}, r"Say how small the cache shall be: kv_lora_rank, or cache, or exact"),
        ("deepseek_v3", {}, {"exact": False, "kv_lora_rank": 8}, r"needs calibration text"),
        (
            "deepseek_v3",
            {},
            {"kv_lora_rank": 8},
            r"exact mode keeps everything \(kv_lora_rank=20, qk_rope_head_dim=6\)",
        ),
        (
            "phi3 partial tied",
            {},
            {"cache": 0.5},
            r"cache=0.5 with exact=True, kv_lora_rank=None: give either cache or kv_lora_rank or exact",
        ),
        ("youtu", {"first_k_dense_replace": 1}, {}, r"mixtures of experts \(first: layer 1\), which are known for"),
        ("egmla", {"kv_encoder_dim": 30, "kv_encoder_norm_dim": 10}, {}, r"normalises latents .* kv_encoder_dim=30"),
        ("egmla with encoder", {"qk_rope_head_dim": 0}, {}, r"has no rotary key \(qk_rope_head_dim=0\)"),
        (
            "phi3",
            {"num_key_value_heads": 2},
            {},
            r"qkv_proj.weight in .* has shape \(120, 60\) and its config asks for \(100, 60\)",
        ),
    ],
)
def test_refused_variants(make_source, tmp_path, name, changes, arguments, message):
    _, folder = make_source(name)
    source = change_config(folder, tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "t", **{"exact": True, **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model_type", [*MISSING, "bloom"])
def test_unsupported_architectures_say_what_is_missing(model_type):
    config = PreTrainedConfig()
    config.model_type = model_type
    with pytest.raises(ValueError, match=rf"Architecture '{model_type}' is not supported.*Nearest: \w+; missing: \w+"):
        find_family(config)
    assert all(near in FAMILIES for near, _ in MISSING.values())


@pytest.mark.parametrize("name", ["deepseek_v3 experts", "deepseek_v2 experts in groups", "glm4_moe_lite experts"])
@pytest.mark.parametrize("stored", ["one by one", "side by side"])
def test_experts_as_they_are_stored(make_source, tmp_path, name, stored):
    """As on the Hub, one tensor an expert and map, or in one: the same converted model, which reloads after saving."""
    source, folder = make_source(name)
    [file] = folder.glob("*.safetensors")
    tensors = {key: tensor for key, tensor in load_file(file).items() if ".mlp.experts." not in key}
    for key, tensor in source.state_dict().items():
        if key.endswith("experts.gate_up_proj") and stored == "one by one":
            for number, expert in enumerate(tensor):
                prefix = f"{key.removesuffix('gate_up_proj')}{number}."
                tensors[f"{prefix}gate_proj.weight"], tensors[f"{prefix}up_proj.weight"] = expert.chunk(2)
        elif key.endswith("experts.down_proj") and stored == "one by one":
            for number, expert in enumerate(tensor):
                tensors[f"{key.removesuffix('down_proj')}{number}.down_proj.weight"] = expert
        elif ".mlp.experts." in key:
            tensors[key] = tensor
    copied = change_config(folder, tmp_path / "source")
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, copied / file.name, {"format": "pt"}
    )
    convert_checkpoint(copied, tmp_path / "t", exact=True)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    converted.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    ids = torch.randint(2, 128, (1, 20))
    with torch.no_grad():
        assert (converted(ids).logits - source(ids).logits).abs().max() <= 1e-5
        assert torch.equal(again(ids).logits, converted(ids).logits)


@pytest.mark.parametrize("part", ["gate", "down"])
@pytest.mark.parametrize("expert", [0, 3, 7])
def test_a_missing_expert_is_named(make_source, tmp_path, expert, part):
    _, folder = make_source("deepseek_v3 experts")
    copied = change_config(folder, tmp_path / "source")
    [file] = copied.glob("*.safetensors")
    tensors, lost = load_file(file), f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
    assert tensors.pop(lost) is not None
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks {lost}, of one of its 8 experts; .* incomplete: download it again"):
        convert_checkpoint(copied, tmp_path / "t", exact=True)


@pytest.mark.parametrize(
    ("name", "fields", "layer", "known"),
    [
        ("deepseek_v3", {}, 2, True),
        ("deepseek_v3", {"num_nextn_predict_layers": 2}, 3, True),
        ("deepseek_v3", {}, 3, False),
        ("deepseek_v3", {"num_nextn_predict_layers": 0}, 2, False),
        ("glm4_moe_lite", {}, 2, True),
        ("deepseek_v2", {}, 2, False),
        ("youtu", {"num_nextn_predict_layers": 1}, 2, False),
        ("minicpm3 untied", {}, 2, False),
        ("egmla", {}, 2, False),
    ],
)
def test_layers_behind_the_last(make_source, tmp_path, name, fields, layer, known):
    """Those that predict further tokens are left out, where the family and its configuration know of them."""
    _, folder = make_source(name)
    source = change_config(folder, tmp_path / "source", **fields)
    [file] = source.glob("*.safetensors")
    extra = f"model.layers.{layer}.input_layernorm.weight"
    save_file({**load_file(file), extra: torch.ones(60)}, file, {"format": "pt"})
    if known:
        convert_checkpoint(source, tmp_path / "t", exact=True)
        assert not any(key.startswith("model.layers.2.") for key in load_file(tmp_path / "t/model.safetensors"))
        return
    with pytest.raises(ValueError, match=rf"has 1 tensors that a \w+ model does not, first {extra}"):
        convert_checkpoint(source, tmp_path / "t", exact=True)


@pytest.mark.parametrize("name", ["deepseek_v3 experts", "glm4_moe_lite experts", "youtu"])
def test_estimates_count_experts(make_source, name):
    """All of them in memory, those that a token passes through in time; the router is too small to be counted."""
    source, _ = make_source(name)
    config = FAMILIES[source.config.model_type].target_config(source.config, kv_gate="latent")
    held, used = _mlp_weights(config)
    for layer, count in zip(source.model.layers, held, strict=True):
        assert count == pytest.approx(sum(parameter.numel() for parameter in layer.mlp.parameters()), rel=0.05)
    expert = 3 * 60 * 12
    assert used == ([held[0], (3 + 2) * expert] if "experts" in name else held)


@pytest.mark.parametrize("name", ["deepseek_v3 experts", "glm4_moe_lite experts"])
def test_converted_experts_are_counted_without_weights(make_source, tmp_path, name):
    """On the meta device, where experts one by one cannot run; and in files as lm-eval counts, without buffers."""
    _, folder = make_source(name)
    convert_checkpoint(folder, tmp_path / "t", exact=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t")
    empty = meta_model(model.config)
    assert sum(cache_elements_per_layer(empty)) == model.config.cache_elements_per_token
    assert _count_parameters(tmp_path / "t") == model.num_parameters()


def test_experts_learn(make_source, tmp_path):
    """Gradients reach experts and router, and the gate."""
    _, folder = make_source("deepseek_v3 experts")
    convert_checkpoint(folder, tmp_path / "t", exact=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t").train()
    ids = torch.randint(2, 128, (2, 20))
    model(ids, labels=ids).loss.backward()
    learned = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    for part in (
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.gate.weight",
        "self_attn.kv_gate_norm.bias",
    ):
        assert f"model.layers.1.{part}" in learned


def test_router_bias_stays_fine(make_source, tmp_path):
    _, folder = make_source("deepseek_v3 experts")
    convert_checkpoint(folder, tmp_path / "t", exact=True, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t")
    router = model.model.layers[1].mlp.gate
    assert router.e_score_correction_bias.dtype == torch.float32 and router.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_config": None}, r"moe_config=None: layers with experts .* deepseek_v2, deepseek_v3, glm4_moe_lite"),
        ({"moe_config": {"model_type": "mixtral"}}, r"need one whose model_type is one of"),
        ({"moe_layers": [2]}, r"moe_layers=\[2\]: must be numbers of layers, from 0 to 1"),
        (
            {"moe_config": {"model_type": "deepseek_v3", "hidden_size": 8}},
            r"hidden_size=8: must be that of the model, 60",
        ),
    ],
)
def test_impossible_experts(changes, message):
    experts = {"model_type": "deepseek_v3", "hidden_size": 60}
    with pytest.raises(Exception, match=message):
        EGMLAConfig(**{**SMALL, "moe_layers": [1], "moe_config": experts, **changes})
