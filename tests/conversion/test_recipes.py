"""Recipes: the peers' choices do what their papers say, and bad choices are named."""

import json
import shutil

import pytest
import torch
from command_line import run
from conversions import EXACT_TOLERANCE, random_layer
from transformers import AutoModelForCausalLM

from egmla.commands.common import read_settings
from egmla.conversion import RECIPES, Recipe, Refinement, convert_checkpoint, find_recipe
from egmla.conversion.closed_form import low_rank_attention
from egmla.conversion.families.base import AttentionShape
from egmla.conversion.plan import deal_ranks
from egmla.conversion.recipes import find_refinement, recipe_options, refinement_options, split_choices


SHAPE = AttentionShape(heads=6, kv_heads=3, head_dim=8, hidden_size=48)


def test_transmla_slots_are_those_of_a_narrower_rotary_key():
    """Each fold keeps as many components, at every so many-th frequency of the source."""
    weights, statistics, _ = random_layer(SHAPE)
    slots = {
        width: low_rank_attention(weights, SHAPE, statistics, 12, width, RECIPES["transmla-like"]).slots
        for width in RECIPES["transmla-like"].rope_widths(SHAPE)
    }
    assert slots == {2: [0], 4: [0, 2], 8: [0, 1, 2, 3]}


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_transmla_keeps_the_principal_components_of_the_keys(fold):
    """Of each fold's keys, what the rotary part holds is the most that so many components can hold."""
    weights, statistics, inputs = random_layer(SHAPE)
    recipe = find_recipe("transmla-like", {"freqfold": fold})
    kept = low_rank_attention(weights, SHAPE, statistics, 12, 8, recipe)
    rope_keys = inputs @ kept.kv_a[12:].T + kept.kv_a_bias[12:]
    keys = (inputs @ weights.k.T + weights.k_bias).view(-1, 3, 2, 4 // fold, fold)
    largest = 0.0
    for group in range(4 // fold):
        members = keys[:, :, :, group].permute(0, 2, 1, 3).reshape(-1, 3 * fold)  # both halves are samples
        largest += float(torch.linalg.eigvalsh(members.T @ members)[-fold:].sum())
    assert float(rope_keys.square().sum()) == pytest.approx(largest, rel=1e-9)


def test_transmla_balances_mean_norms_of_what_is_not_rotated():
    weights, statistics, inputs = random_layer(SHAPE)
    kept = low_rank_attention(weights, SHAPE, statistics, 48, 0, Recipe(balance_by="norm", centred=False))
    # All directions are kept, so the latent's second moment is that of scaled keys beside values.
    keys, values = inputs @ weights.k.T + weights.k_bias, inputs @ weights.v.T + weights.v_bias
    ratio = values.square().mean(dim=0).sqrt().mean() / keys.square().mean(dim=0).sqrt().mean()
    expected = torch.cat((ratio * keys, values), dim=1).square().sum() / len(inputs)
    assert float(kept.spectrum.sum()) == pytest.approx(float(expected), rel=1e-9)


def test_mha2mla_keeps_each_heads_own_strongest_pairs():
    weights, statistics, inputs = random_layer(SHAPE)
    kept = low_rank_attention(weights, SHAPE, statistics, 12, 12, RECIPES["mha2mla-like"])
    keys = (inputs @ weights.k.T + weights.k_bias).view(-1, 3, 2, 4)
    queries = (inputs @ weights.q.T + weights.q_bias).view(-1, 6, 2, 4)
    key_norm, query_norm = (part.square().sum(dim=2).mean(dim=0).sqrt() for part in (keys, queries))
    score = query_norm.view(3, 2, 4).sum(dim=1) * key_norm
    wanted = sorted((pair, head) for head in range(3) for pair in score[head].topk(2).indices.tolist())
    assert kept.slots == [pair for pair, _ in wanted]
    rows = weights.k.view(3, 2, 4, 48)
    expected = torch.stack([rows[head, :, pair] for pair, head in wanted], dim=1).reshape(12, 48)
    torch.testing.assert_close(kept.kv_a[12:], expected)


def test_mha2mla_latent_is_the_svd_of_the_weights():
    """No text: the best latent of the weights of keys that do not rotate and of values, side by side."""
    weights, statistics, _ = random_layer(SHAPE)
    recipe = RECIPES["mha2mla-like"]
    kept = low_rank_attention(weights, SHAPE, statistics, 12, 12, recipe)
    all_rotary = low_rank_attention(weights, SHAPE, statistics, 24, 24, recipe)  # no key is left in its latent
    squares = torch.linalg.svdvals(weights.v).square()
    torch.testing.assert_close(all_rotary.spectrum[:24], squares)
    chosen = kept.kv_a[12:].square().sum()
    assert float(kept.spectrum.sum()) == pytest.approx(float(squares.sum() + weights.k.square().sum() - chosen))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "default"])
def test_recipes_convert_the_whole_way(llama_folder, calibration, tmp_path, name):
    source = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    report = convert_checkpoint(
        llama_folder,
        tmp_path / "t",
        cache=0.5,
        calibration=calibration,
        recipe=find_recipe(name, {"balance": 2.0, "sequence_length": 64}),
    )
    assert f"--recipe {name} --set sequence_length=64 --set balance=2.0" in report["command"]
    assert report["calibration"]["sequence_length"] == 64 and report["refinement"] is None
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()
    ids = torch.tensor([list(calibration.read_text()[:200].encode())])
    with torch.no_grad():
        logits, expected = converted(ids).logits, source(ids).logits
    assert EXACT_TOLERANCE < (logits - expected).square().mean() < expected.var()


def test_a_head_by_head_selection_of_everything_is_the_source(llama_folder, calibration, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    widths = {"kv_lora_rank": 48, "qk_rope_head_dim": 48}
    convert_checkpoint(llama_folder, tmp_path / "t", **widths, calibration=calibration, recipe="mha2mla-like")
    ids = torch.randint(2, 128, (1, 50))
    with torch.no_grad():
        lost = AutoModelForCausalLM.from_pretrained(tmp_path / "t").eval()(ids).logits - source(ids).logits
    assert lost.abs().max() < EXACT_TOLERANCE


def test_ranks_go_where_energy_is_left():
    """Layers that need most of their directions get more of the same sum, none more than twice or less than half."""
    steep, flat = torch.tensor([1.0, 1e-3, 1e-4, 1e-5, 0, 0, 0, 0, 0, 0]), torch.ones(10)
    assert deal_ranks([steep, flat, flat], 4) == [2, 5, 5]
    assert deal_ranks([steep, steep, flat], 4) == [2, 2, 8]
    assert deal_ranks([flat, flat], 4) == [4, 4]
    assert deal_ranks([flat, flat[:5]], 4) == [3, 5] and deal_ranks([steep, flat], 1) == [1, 1]


def test_ranks_by_energy_convert_the_whole_way(llama_folder, calibration, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():  # keys and values of the last layer go in one direction
        for name in ("k_proj", "v_proj"):
            weight = model.model.layers[-1].self_attn.get_submodule(name).weight
            weight.copy_(torch.outer(weight[:, 0], weight[0]) / weight.std())
    model.save_pretrained(source)
    settings = {"qk_rope_head_dim": 8, "calibration": calibration, "refinement": Refinement(steps=0)}
    recipe = Recipe(ranks="energy", sequence_length=64)
    report = convert_checkpoint(source, tmp_path / "t", kv_lora_rank=7, recipe=recipe, **settings)
    ranks = report["plan"]["ranks"]
    assert sum(ranks) == 7 * len(ranks) and ranks[-1] < 7
    assert "--set ranks=energy" in report["command"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "t").config.layer_kv_lora_ranks == ranks
    # The same ranks, given by hand.
    again = {"kv_lora_rank": ranks, "recipe": Recipe(sequence_length=64)}
    same = convert_checkpoint(source, tmp_path / "s", **again, **settings)
    assert same["weights_sha256"] == report["weights_sha256"]
    for wrong in ({"kv_lora_rank": ranks}, {"kv_lora_rank": 7, "layout": "deepseek_v3"}):
        with pytest.raises(ValueError, match=r"ranks='energy' .* give one rank and layout 'egmla'"):
            convert_checkpoint(source, tmp_path / "u", recipe=recipe, **wrong, **settings)


def test_recipes_by_name_and_back():
    assert find_recipe(None) == find_recipe("default") == Recipe()
    changed = find_recipe("transmla-like", {"freqfold": 2})
    assert recipe_options(changed) == ["--recipe", "transmla-like", "--set", "freqfold=2"]
    assert recipe_options(Recipe()) == []


def test_refinement_by_options_and_back():
    assert find_refinement() is None
    assert find_refinement(7) == Refinement(steps=7)
    usual = {"learning_rate": 1e-3, "batch_size": 2, "carry": 0.0, "dtype": Refinement().dtype}
    assert refinement_options(find_refinement(7, changes=usual)) == []
    assert split_choices({"balance": 2.0, "refine.carry": 1}) == ({"balance": 2.0}, {"carry": 1})
    other = "float32" if Refinement().dtype == "bfloat16" else "bfloat16"
    changed = {"learning_rate": 3e-4, "batch_size": 4, "carry": 0.5, "dtype": other}
    words = refinement_options(find_refinement(gate=True, changes=changed))
    assert words[0] == "--refine-gate" and "refine.learning_rate=0.0003" in words and len(words) == 1 + 2 * 4
    recipe, refinement = split_choices(read_settings(words[2::2]))
    assert not recipe and find_refinement(None, True, refinement) == Refinement(gate=True, **changed)


@pytest.mark.parametrize(
    ("steps", "gate", "changes", "message"),
    [
        (None, False, {"rate": 1}, r"The refinement has no choice 'rate'; it has learning_rate, batch_size, carry"),
        (None, False, {"steps": 1}, r"no choice 'steps'"),
        (None, False, {"batch_size": 1.5}, r"batch_size=1.5: must be of type int"),
        (None, False, {"batch_size": 0}, r"batch_size=0, carry=0.0 of the refinement: .* at least 1 sequence"),
        (None, False, {"learning_rate": 0}, r"learning_rate=0, .* the rate must be above 0"),
        (None, False, {"carry": 2}, r"carry from 0 to 1"),
        (None, False, {"dtype": "int8"}, r"dtype='int8' of the refinement: must be auto, float32 or bfloat16"),
        (0, True, {}, r"--refine-gate with --refine-steps 0: without refinement nothing is trained"),
        (0, False, {"carry": 1}, r"--set refine.carry with --refine-steps 0"),
    ],
)
def test_bad_choices_of_the_refinement(steps, gate, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        find_refinement(steps, gate, changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transmla", {}, r"Recipe 'transmla' is not known: .*; did you mean transmla-like\?"),
        ("nonesuch", {}, r"must be one of default, transmla-like, mha2mla-like"),
        ("default", {"fold": 2}, r"no choice 'fold'; it has rope_metric, freqfold"),
        ("default", {"metric": "outputs"}, r"metric='outputs': must be one of input, output, weights"),
        ("default", {"freqfold": 2}, r"freqfold=2 with slots='lost': must be 1, or with slots='uniform'"),
        ("default", {"slots": "heads"}, r"slots='heads' with rope_metric='query'.*use rope_metric='heads'"),
        ("default", {"sequence_length": 1}, r"sequence_length=1: at least 2 tokens"),
        ("default", {"balance": 0}, r"balance=0, damping=0.01: balance must be above 0"),
        ("default", {"centred": 1}, r"centred=1: must be of type bool"),
        ("default", {"freqfold": 2.5}, r"freqfold=2.5: must be of type int"),
    ],
)
def test_bad_choices(name, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        find_recipe(name, changes)


@pytest.mark.parametrize(
    ("recipe", "width", "message"),
    [
        ("transmla-like", 6, r"qk_rope_head_dim=6: .* must be one of 4, 8, 16 for this source"),
        ("mha2mla-like", 4, r"with slots='heads' and freqfold=1 it must be one of 0, 6, 12, 18, 24, 30, 36, 42, 48"),
        (find_recipe("transmla-like", {"freqfold": 3}), 4, r"freqfold=3: must divide the 8 rotary frequencies"),
    ],
)
def test_widths_that_slots_do_not_allow(llama_folder, calibration, tmp_path, recipe, width, message):
    arguments = {"kv_lora_rank": 8, "qk_rope_head_dim": width, "calibration": calibration, "recipe": recipe}
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(llama_folder, tmp_path / "t", **arguments)


def test_recipe_on_the_command_line(llama_folder, calibration, tmp_path):
    words = ["convert", llama_folder, tmp_path / "t", "--cache", 0.5, "--calibration", calibration]
    result = run(*words, "--recipe", "transmla-like", "--set", "freqfold=2", "--set", "centred=true")
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "t/conversion_report.json").read_text())["recipe"]
    assert recipe["freqfold"] == 2 and recipe["centred"] is True and recipe["slots"] == "uniform"
    assert "a setting is written key=value" in run(*words, "--set", "freqfold").stderr
