"""Batches padded on the left: the first tokens of each row are kept exact, wherever padding puts them."""

import pytest
import torch
from allocated import FIRST, GROUP, allocation_for
from cases import difference, token_ids
from quantized import tiny_model

from egmla import EGMLACache
from egmla.left_padding_egmla import LeftPadding


LENGTH = 3 * GROUP + 5
PADS = [0, 1, FIRST + 4, 2 * GROUP, LENGTH - 2, LENGTH]  # none, some, over groups; fewer tokens than FIRST; no token


def batch(pads=PADS, length=LENGTH):
    ids, mask = token_ids(len(pads), length), torch.ones(len(pads), length, dtype=torch.long)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.fixture(params=["allocated", "int4"])
def options(request):
    config = tiny_model().config
    return {"bits": allocation_for(config)} if request.param == "allocated" else {"quantization": "int4"}


def test_the_order_is_that_of_the_definition():
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9, [0] * 7 + [1] * 2, [0] * 9])
    padding = LeftPadding.of(mask, 3)
    letters = "....abcde", "abcdefghi", ".......ab", "........."
    columns = torch.tensor([[ord(letter) for letter in row] for row in letters])
    stored = padding.order_entries(columns[:, None, :, None].float())[:, 0, :, 0]
    found = ["".join(chr(int(letter)) for letter in row) for row in stored]
    assert found == ["abcddddde", "abcdefghi", "abbbbbbbb", "........."]  # padding repeats the token behind it
    assert padding.columns == 9
    seen = padding.order_mask((columns != ord("."))[:, None, None])[:, 0, 0].int().tolist()
    assert seen == [[1, 1, 1, 0, 0, 0, 0, 1, 1], [1] * 9, [1, 1] + [0] * 7, [0] * 9]
    assert LeftPadding.of(torch.tensor([[1, 1, 0], [1, 1, 1]]), 3) is None  # on the right


@torch.no_grad()
def test_first_tokens_of_each_row_are_exact(options):
    model, (ids, mask, positions) = tiny_model(), batch()
    cache, exact = EGMLACache(model.config, **options), EGMLACache(model.config, bits=16)
    for given in (cache, exact):
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=given)
    layer, dense = cache.layers[0], exact.layers[0].entries.to_tensor()
    first = min(layer.first_tokens, FIRST)
    held = layer.entries.to_tensor()
    for row, count in enumerate(PADS[:-2]):
        assert torch.equal(held[row, :, :first], dense[row, :, count : count + first])
    assert torch.equal(held[-2, :, :2], dense[-2, :, -2:])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_shifts_nothing_that_is_exact(implementation):
    """With bits enough for everything, and no group yet, a padded row is what it is alone, in all later steps."""
    model, (ids, mask, _) = tiny_model(attn_implementation=implementation), batch(PADS[:-1])
    bits = allocation_for(model.config) | {"recent_tokens": 64}
    for layer, rank in zip(bits["layers"], model.config.layer_kv_lora_ranks, strict=True):
        layer["latent"] = [[8, rank]]
        layer["rope"] = [[8, model.config.qk_rope_head_dim // 2]]
    cache, start = EGMLACache(model.config, bits=bits), LENGTH - 1
    for cut in (slice(0, start), slice(start, LENGTH), slice(LENGTH, LENGTH + 4)):
        more_ids, more = token_ids(len(ids), 4), torch.ones(len(ids), 4, dtype=torch.long)
        all_ids, all_mask = torch.cat((ids, more_ids), 1), torch.cat((mask, more), 1)
        given = (all_mask.cumsum(1) - 1).clamp(min=0)[:, cut]
        out = model(
            all_ids[:, cut], attention_mask=all_mask[:, : cut.stop], position_ids=given, past_key_values=cache
        ).logits
    for row, count in enumerate(PADS[:-1]):
        expected = model(all_ids[row : row + 1, count:]).logits[:, -4:]
        assert difference(out[row : row + 1], expected) <= 1e-4


@torch.no_grad()
def test_rows_keep_their_padding_through_operations(options):
    model, (ids, mask, positions) = tiny_model(), batch(PADS[:4])
    cache = EGMLACache(model.config, **options)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    rows = torch.tensor([2, 2, 0, 3])
    cache.reorder_cache(rows)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 4, 6]))
    assert cache.padding.pads.tolist() == [PADS[row] for row in rows]
    again = EGMLACache(model.config, **options)
    model(ids[rows], attention_mask=mask[rows], position_ids=positions[rows], past_key_values=again)
    step = {"attention_mask": torch.nn.functional.pad(mask[rows], (0, 1), value=1)}
    step["position_ids"] = positions[rows, -1:] + 1
    got = model(ids[rows, :1], past_key_values=cache, **step).logits
    assert difference(got, model(ids[rows, :1], past_key_values=again, **step).logits) <= 1e-5

    columns = cache.padding.columns
    assert columns == 2 * GROUP + cache.layers[0].first_tokens
    with pytest.raises(ValueError, match=rf"would leave {columns - 1} of {LENGTH + 1} tokens.* end at {columns}"):
        cache.crop(columns - 1 - cache.get_seq_length())
    cache.crop(columns - cache.get_seq_length())
    cache.reset()
    assert cache.padding is None
    model(ids, past_key_values=cache)
    assert cache.padding is None  # a mask of ones, or none


@torch.no_grad()
def test_generation_of_a_padded_batch_does_not_depend_on_the_attention(options):
    """Prefill in the expanded form, steps in the latent one; beams reorder rows."""
    ids, mask, _ = batch(PADS[:4])
    tokens = []
    for implementation in ("sdpa", "eager"):
        model = tiny_model(attn_implementation=implementation)
        for beams in (1, 2):
            cache = EGMLACache(model.config, **options)
            given = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "past_key_values": cache}
            tokens.append(model.generate(ids, attention_mask=mask, **given))
            assert cache.padding is not None
    assert torch.equal(tokens[0], tokens[2]) and torch.equal(tokens[1], tokens[3])
