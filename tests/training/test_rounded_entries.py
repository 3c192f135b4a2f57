"""Training through the cache's rounding: what a forward pass sees is what decoding token by token sees."""

import json

import pytest
import torch
from allocated import FIRST, GROUP, allocation_for
from cases import tiny_config, token_ids
from runs import heal, same_weights

from egmla import EGMLACache, EGMLAForCausalLM
from egmla.conversion import convert_checkpoint
from egmla.training.rounded_entries import RoundedEntries, round_trip


TOKENS = 3 * GROUP + FIRST + 6  # groups, and a rest


@pytest.fixture(params=["input-gate", "rank-per-layer", "no-rope"])
def model(request):
    return make_model(request.param)


def make_model(case: str = "input-gate", recent: int = 5) -> EGMLAForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(case)
    config.kv_cache_bits = {**allocation_for(config), "recent_tokens": recent}
    model = EGMLAForCausalLM(config).eval()
    for parameter in model.parameters():  # attention that notices what it attends to
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def whole(model, ids, **options):
    rounded = RoundedEntries(model.config.bit_allocation())
    mask = rounded.mask(ids.shape[1], ids.device)
    return model(ids, past_key_values=rounded, attention_mask=mask, use_cache=True, **options).logits


@torch.no_grad()
def test_a_whole_sequence_sees_what_decoding_sees(model):
    ids = token_ids(2, TOKENS)
    cache = EGMLACache(model.config)
    steps = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(TOKENS)]
    got = whole(model, ids)
    torch.testing.assert_close(got, torch.cat(steps, dim=1), atol=1e-3, rtol=1e-4)
    assert (got - model(ids).logits).abs().max() > 0.05  # rounding is seen at all


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, FIRST, FIRST + GROUP])
def test_sequences_without_a_group_are_exact(tokens):
    """But for channels that are not stored, which only the first tokens have."""
    model, ids = make_model(recent=64), token_ids(1, tokens)
    cache = EGMLACache(model.config)
    steps = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(tokens)]
    torch.testing.assert_close(whole(model, ids), torch.cat(steps, dim=1), atol=1e-4, rtol=1e-4)


def test_gradients_go_straight_through():
    model = make_model()
    allocation = model.config.bit_allocation()
    bits = allocation.layers[0]
    entries = torch.randn(2, 1, TOKENS, bits.rank + bits.rope_dim, requires_grad=True)
    rounded = RoundedEntries(allocation)
    both = rounded.append(*entries.split([bits.rank, bits.rope_dim], dim=-1), 0).to_tensor()
    weights = torch.randn_like(both)
    (both * weights).sum().backward()
    groups = allocation.grouped_tokens(TOKENS)
    expected = weights[:, :, groups:].clone()
    expected[:, :, FIRST : FIRST + groups] += weights[:, :, :groups]
    dropped = bits.channels[bits.stored_channels :]
    assert dropped
    expected[:, :, FIRST:, dropped] = 0
    torch.testing.assert_close(entries.grad, expected)
    given = entries.detach()[:, :, FIRST : FIRST + groups]
    torch.testing.assert_close(both.detach()[:, :, :groups], round_trip(given, bits, GROUP), atol=1e-6, rtol=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            for layer in model.model.layers:
                layer._can_checkpoint_with_cache = True
        whole(model, token_ids(2, TOKENS)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.fixture(scope="module")
def allocated(models, tmp_path_factory):
    """The small source's conversion with allocated bits, in groups that sequences of a test fill."""
    folder = tmp_path_factory.mktemp("allocated") / "model"
    text = {"calibration": models / "text.txt", "calibration_tokens": 2048, "shipped_text": False}
    convert_checkpoint(models / "source", folder, cache=0.3, **text)
    config = json.loads((folder / "config.json").read_text())
    config["kv_cache_bits"] |= {"group_tokens": 8, "recent_tokens": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_healing_trains_through_the_rounding(models, allocated, tmp_path):
    longer = {"model": str(allocated), "tokens": 6000, "learning_rate": 3e-4}
    through = heal(models, tmp_path / "through", **longer)
    beside = heal(models, tmp_path / "beside", **longer, rounding=False)
    assert through["settings"]["rounding"] and not beside["settings"]["rounding"]
    assert "--no-rounding" in beside["command"] and "rounding" not in through["command"]
    # At 0 tokens the weights are the same; what differs is what evaluation sees.
    assert abs(through["perplexity"]["0 tokens"] / beside["perplexity"]["0 tokens"] - 1) > 1e-3
    losses = [row["loss"] for row in through["losses"]]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not same_weights(tmp_path / "through", tmp_path / "beside")
    config = json.loads((tmp_path / "through" / "config.json").read_text())
    assert config["kv_cache_bits"] == json.loads((allocated / "config.json").read_text())["kv_cache_bits"]


def test_a_model_without_allocated_bits_has_nothing_to_round(healed):
    assert not healed[1]["settings"]["rounding"]


def test_adapters_and_checkpointed_gradients_train_through_it_too(models, allocated, tmp_path):
    plain = heal(models, tmp_path / "plain", model=str(allocated), lora_rank=2)
    checkpointed = heal(
        models, tmp_path / "checkpointed", model=str(allocated), lora_rank=2, gradient_checkpointing=True
    )
    assert plain["settings"]["rounding"] and plain["losses"][0]["loss"] > 0
    assert [row["loss"] for row in plain["losses"]] == pytest.approx([row["loss"] for row in checkpointed["losses"]])
