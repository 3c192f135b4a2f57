"""Layout deepseek_v3: Transformers' own class computes what the EG-MLA model would, or the conversion is refused."""

import json

import conversions
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from egmla.conversion import Recipe, Refinement, convert_checkpoint
from egmla.conversion.deepseek_export import LAYOUTS


pytestmark = pytest.mark.long  # in front, see conftest.py


make_source = conversions.make_family_source  # the fixture
UNIFORM = Recipe(slots="uniform", freqfold=1, latent_norm=True)
CLOSED_FORM = Refinement(steps=0)
REFINED = Refinement(steps=3, dtype="float32")


def both_layouts(folder, tmp_path, **arguments):
    """The same conversion in both layouts, and random ids."""
    for layout in LAYOUTS:
        report = convert_checkpoint(folder, tmp_path / layout, layout=layout, **arguments)
        assert report["layout"] == layout
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / layout).eval() for layout in LAYOUTS)
    assert type(theirs) is DeepseekV3ForCausalLM
    return ours, theirs, torch.randint(2, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def assert_same_function(ours, theirs, ids):
    with torch.no_grad():
        expected, got = ours(ids).logits, theirs(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    assert torch.equal(theirs.generate(ids, **options), ours.generate(ids, **options))
    assert not any("gate_proj" in name for name in theirs.state_dict() if "self_attn" in name)


@pytest.mark.parametrize(
    ("name", "freqfold", "P", "refinement"),
    [
        ("llama linear", 1, 10, REFINED),
        ("llama llama3, wide heads", 7, 2, REFINED),
        ("mistral, window of the whole context", 1, 14, CLOSED_FORM),
        ("mistral yarn mqa", 1, 10, CLOSED_FORM),
        ("llama dynamic", 1, 10, CLOSED_FORM),
    ],
)
def test_converted_with_latent_norm(make_source, calibration, tmp_path, name, freqfold, P, refinement):
    """All frequencies in slots, or every seventh: both are stock frequencies of that width."""
    _, folder = make_source(name)
    recipe = Recipe(slots="uniform", freqfold=freqfold, latent_norm=True)
    options = {"kv_lora_rank": 9, "qk_rope_head_dim": P, "recipe": recipe, "refinement": refinement}
    options |= {"calibration": calibration, "calibration_tokens": 4096}
    assert_same_function(*both_layouts(folder, tmp_path, **options))


def test_refinement_trains_the_gain(make_source, calibration, tmp_path):
    _, folder = make_source("llama linear")
    gains = []
    for steps in (0, 3):
        convert_checkpoint(
            folder,
            tmp_path / str(steps),
            kv_lora_rank=9,
            qk_rope_head_dim=4,
            latent_norm=True,
            refinement=Refinement(steps=steps, dtype="float32"),
            calibration=calibration,
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(steps))
        gains.append(model.model.layers[1].self_attn.kv_a_layernorm.weight)
    assert not torch.equal(*gains)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "youtu", "minicpm3 tied", "glm4_moe_lite"])
def test_latent_sources(make_source, tmp_path, name):
    _, folder = make_source(name)
    assert_same_function(*both_layouts(folder, tmp_path, exact=True))


def test_loads_without_this_package(make_source, loaded_clean_python, tmp_path):
    _, folder = make_source("deepseek_v3")
    convert_checkpoint(folder, tmp_path / "t", exact=True, layout="deepseek_v3")
    config = json.loads((tmp_path / "t/config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and "auto_map" not in config
    assert not list((tmp_path / "t").glob("*.py"))
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]);"
        "assert 'egmla' not in sys.modules; print(type(m).__name__)"
    )
    done = loaded_clean_python.run(code, tmp_path / "t", check=True)
    assert done.stdout.strip() == "DeepseekV3ForCausalLM"


def test_latent_norm_costs_one_number(make_source, calibration, tmp_path):
    """The constant's number aside, the model with a norm is the one a number narrower without."""
    _, folder = make_source("llama linear")
    common = {"calibration": calibration, "refinement": CLOSED_FORM, "qk_rope_head_dim": 4}
    convert_checkpoint(folder, tmp_path / "norm", kv_lora_rank=9, latent_norm=True, **common)
    convert_checkpoint(folder, tmp_path / "none", kv_lora_rank=8, **common)
    ids = torch.randint(2, 128, (2, 24))
    with torch.no_grad():
        norm, none = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(ids).logits for name in ("norm", "none")
        )
    assert (norm - none).abs().max() < 0.01 * none.abs().max()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "llama linear",
            {"exact": True, "layout": "deepseek"},
            r"layout='deepseek': must be one of egmla, ",
        ),
        (
            "llama linear",
            {"exact": True, "layout": "deepseek_v3"},
            r"latent has no norm; .* with --latent-norm",
        ),
        ("llama linear", {"exact": True, "latent_norm": True}, r"latent_norm with exact=True"),
        ("deepseek_v3", {"exact": True, "latent_norm": True}, r"deepseek_v3 source has a latent with its own norm"),
        ("qwen3", {"cache": 0.5, "latent_norm": True}, r"qwen3 source has an encoder between input and latent"),
        (
            "llama linear",
            {"cache": 0.5, "layout": "deepseek_v3", "latent_norm": True},
            r"not at the stock frequencies .* --set slots=uniform --set freqfold=5",
        ),
        (
            "mistral yarn mqa",
            {"cache": 0.5, "layout": "deepseek_v3", "latent_norm": True},
            r"'yarn'\); those of this type depend on the width.*slots=uniform and --qk-rope-head-dim 10",
        ),
        (
            "llama dynamic",
            {"cache": 0.25, "layout": "deepseek_v3", "recipe": Recipe(slots="uniform", freqfold=5, latent_norm=True)},
            r"'dynamic'\); those of this type depend on the width.*slots=uniform and --qk-rope-head-dim 10",
        ),
        ("deepseek_v3", {"kv_lora_rank": 8, "layout": "deepseek_v3"}, r"made smaller behind its norm, by an encoder"),
        (
            "llama linear",
            {"kv_lora_rank": [8, 9], "qk_rope_head_dim": 10, "layout": "deepseek_v3", "recipe": UNIFORM},
            r"latents of different widths",
        ),
        ("qwen2", {"cache": 0.5, "layout": "deepseek_v3", "recipe": UNIFORM}, r"its queries have biases"),
        (
            "llama linear",
            {
                "kv_lora_rank": 9,
                "qk_rope_head_dim": 10,
                "layout": "deepseek_v3",
                "recipe": UNIFORM,
                "refinement": Refinement(steps=3, gate=True),
            },
            r"layout='deepseek_v3' with a gate trained in refinement .* has no gate, .* Leave out --refine-gate",
        ),
    ],
)
def test_refused(make_source, calibration, tmp_path, name, arguments, message):
    _, folder = make_source(name)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "t", **arguments, calibration=calibration)
    assert not list(tmp_path.iterdir())


def test_trained_gate_is_refused(make_source, tmp_path):
    """A gate that does something has no place in DeepSeek's class."""
    _, folder = make_source("deepseek_v3")
    convert_checkpoint(folder, tmp_path / "egmla", exact=True)
    for file in (tmp_path / "egmla").glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("kv_gate_norm.bias"):
                tensors[name] += 0.1
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate of layer 0 of .* is trained"):
        convert_checkpoint(tmp_path / "egmla", tmp_path / "t", exact=True, layout="deepseek_v3")
