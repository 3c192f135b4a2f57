"""Presses: what is dropped is gone for good and nothing else changes, in every format and mode of generation."""

import copy
import re
from pathlib import Path

import pytest
import torch
from cases import ALLOCATED_CASES, EXPANDED_CASES, MODEL_CASES, tiny_model, token_ids
from transformers import DynamicCache

from egmla import EGMLACache
from egmla.compression import (
    PRESSES,
    EvictionGate,
    GivenScoresPress,
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    RandomPress,
    RecentPress,
    SnapKVPress,
    TOVAPress,
    layer_shares,
)
from egmla.compression import press as press_module
from egmla.compression.press import spread
from egmla.eviction_egmla import drop_entries


SMALL = {"sinks": 2, "window": 3}
PRESSED_CASES = [name for name in MODEL_CASES if name not in EXPANDED_CASES]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
BITS = {"group_tokens": 8, "first_tokens": 2, "recent_tokens": 4}


def formats(config):
    """Arguments of `EGMLACache` for each format."""
    layers = []
    for rank in config.layer_kv_lora_ranks:
        layers.append({"latent": [[8, rank // 2], [4, rank // 4]], "rope": [[8, config.qk_rope_head_dim // 2]]})
    return {
        "as they are": {"bits": 16},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4", "quantization_group_size": 8},
        "bits": {"bits": {**BITS, "layers": layers}},
    }


FORMATS = list(formats(tiny_model().config))


@pytest.fixture(params=FORMATS)
def form(request) -> str:
    """Each format of the cache, one a test."""
    return request.param


def make_cache(model, form: str = "as they are") -> EGMLACache:
    return EGMLACache(model.config, **formats(model.config)[form])


@torch.no_grad()
def read(model, ids, cache, chunk: int = 1000):
    """Read ids in parts, and return the logits of the last one."""
    for part in ids.split(chunk, dim=1):
        logits = model(part, past_key_values=cache, use_cache=True).logits
    return logits


def kept_by(press, ids, layers: int) -> list[torch.Tensor]:
    """Indices that a press with given scores keeps in each layer, found anew."""
    T = ids.shape[1]
    scores = press.scores.clone()
    scores[:, : press.sinks] = scores[:, T - press.window :] = torch.inf
    if press.layers == "global":
        chosen = torch.zeros(layers * T, dtype=torch.bool)
        chosen[scores.flatten().topk(round(press.tokens(T) * layers)).indices] = True
        return [row.nonzero()[:, 0] for row in chosen.view(layers, T)]
    return [row.topk(round(press.tokens(T))).indices.sort().values for row in scores]


@pytest.mark.parametrize("layers", ["global", "equal", "first whole", "last whole"])
@pytest.mark.parametrize("new_tokens", [1, 5, 20])
@pytest.mark.parametrize("name", PRESSED_CASES)
@torch.no_grad()
def test_dropped_equals_masked(name, new_tokens, layers):
    """Whatever is dropped, with layers of different lengths: later tokens see what a mask over the rest shows."""
    model, ids = tiny_model(name), token_ids(1, 50)
    scores, keep = torch.rand(2, 30), 0.4
    if "whole" in layers:
        scores[0 if layers == "first whole" else 1] += 1
        layers, keep = "global", 0.8
    press = GivenScoresPress(scores, keep=keep, layers=layers, **SMALL)
    cache, full = (EGMLACache(model.config, bits=16) for _ in range(2))
    with press(model):
        read(model, ids[:, :30], cache)
    read(model, ids[:, :30], full)
    kept = kept_by(press, ids[:, :30], 2)
    assert [layer.stored for layer in cache.layers] == [len(each) for each in kept]
    assert cache.get_seq_length() == 30 and sum(map(len, kept)) == 60 * keep
    for layer, whole, own in zip(cache.layers, full.layers, kept, strict=True):
        assert torch.equal(layer.entries.to_tensor(), whole.entries.to_tensor()[:, :, own])

    def mask(attention, args, kwargs):
        held = torch.zeros(30 + new_tokens, dtype=torch.bool)
        held[kept[attention.layer_idx]] = True
        held[30:] = True
        seen = torch.ones(new_tokens, 30 + new_tokens, dtype=torch.bool).tril(30) & held
        return args, {**kwargs, "attention_mask": seen[None, None]}

    hooks = [layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True) for layer in model.model.layers]
    expected = read(model, ids[:, 30 : 30 + new_tokens], full)
    for hook in hooks:
        hook.remove()
    found = read(model, ids[:, 30 : 30 + new_tokens], cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    unpressed = EGMLACache(model.config, bits=16)
    assert (read(model, ids[:, : 30 + new_tokens], unpressed)[:, -1] - found[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_agree(implementation):
    """Masks of either kind are fitted to each layer, for tokens attended to expanded and in the latent space."""
    model, ids = tiny_model(), token_ids(1, 60)
    caches = []
    for kind in ("sdpa", implementation):
        model.set_attn_implementation(kind)
        cache = make_cache(model)
        with GivenScoresPress(torch.rand(2, 30, generator=torch.Generator().manual_seed(3)), keep=0.5)(model):
            read(model, ids[:, :30], cache)
        caches.append(torch.cat([read(model, part, cache) for part in ids[:, 30:].split([4, 25, 1], dim=1)], dim=1))
    torch.testing.assert_close(*caches, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("name", PRESSES)
def test_keeping_all_changes_nothing(name, form, chunk):
    model, ids = tiny_model(), token_ids(2, 30)
    caches = make_cache(model, form), make_cache(model, form)
    with PRESSES[name](keep=1)(model):
        found = read(model, ids, caches[0], chunk)
        tokens = model.generate(ids, past_key_values=make_cache(model, form), num_beams=2, **GREEDY)
    assert torch.equal(found, read(model, ids, caches[1], chunk))
    assert torch.equal(tokens, model.generate(ids, past_key_values=make_cache(model, form), num_beams=2, **GREEDY))
    assert caches[0].nbytes == caches[1].nbytes and not caches[0].evicted


@pytest.mark.parametrize("layers", ["equal", [0.3, 0.7]])
@pytest.mark.parametrize("name", PRESSES)
def test_bytes_fall(name, layers):
    model, ids = tiny_model(), token_ids(2, 200)
    full, pressed = make_cache(model), make_cache(model)
    read(model, ids, full)
    with PRESSES[name](keep=0.25, layers=layers, **SMALL)(model):
        read(model, ids, pressed)
    assert pressed.get_seq_length() == 200
    stored = [layer.stored for layer in pressed.layers]
    assert stored == ([50, 50] if layers == "equal" else [30, 70])
    assert pressed.nbytes == full.nbytes / 4
    assert pressed.allocated_nbytes == pressed.nbytes  # no spare room either
    # Behind it, the cache goes on as any other.
    assert torch.isfinite(read(model, token_ids(2, 9), pressed)).all()
    assert pressed.get_seq_length() == 209 and pressed.layers[0].stored == stored[0] + 9


@pytest.mark.parametrize("name", PRESSES)
def test_a_budget_bounds_a_prompt_in_parts(name):
    model, ids, cache = tiny_model(), token_ids(1, 240), make_cache(tiny_model())
    most = []
    with PRESSES[name](budget=24, **SMALL)(model):
        for part in ids.split(20, dim=1):
            read(model, part, cache)
            most.append(max(layer.stored for layer in cache.layers))
    assert most[0] == 20 and set(most[1:]) == {24}
    assert cache.get_seq_length() == 240
    assert cache.allocated_nbytes == 24 * model.config.cache_elements_per_token * 4


@pytest.mark.parametrize("chunk", [1000, 25])
def test_quantised_caches_get_what_is_kept(form, chunk):
    """A prompt is quantised after it is pressed: codes are those of the kept entries alone."""
    model, ids = tiny_model(), token_ids(1, 100)
    press = GivenScoresPress(torch.rand(2, 100), keep=0.5, **SMALL)
    cache, plain, expected = make_cache(model, form), make_cache(model), make_cache(model, form)
    with press(model):
        read(model, ids, plain, chunk)
    with press(model):
        read(model, ids, cache, chunk)
        assert type(cache.layers[0]).__name__ == "GrowingLatentLayer"
    for layer_idx, layer in enumerate(plain.layers):
        expected.append(*layer.entries.split(), layer_idx)
    assert cache.nbytes == expected.nbytes and cache.get_seq_length() == 100
    assert type(cache.layers[0]) is type(expected.layers[0])
    for found, wanted in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(found.entries.to_tensor(), wanted.entries.to_tensor())
        assert found.seen == 100 and found.evicted


def test_generation_under_a_press(form):
    """The prompt is pressed, the tokens that follow are not: as with the press around the prompt alone."""
    model, ids = tiny_model(), token_ids(2, 40)
    cache, again = make_cache(model, form), make_cache(model, form)
    with SnapKVPress(keep=0.5, **SMALL)(model):
        tokens = model.generate(ids, past_key_values=cache, **GREEDY)
    with SnapKVPress(keep=0.5, **SMALL)(model):
        logits = read(model, ids, again)[:, -1:]
    found = []
    for _ in range(8):
        found.append(logits.argmax(-1))
        logits = read(model, found[-1], again)
    assert torch.equal(tokens[:, 40:], torch.cat(found, dim=1))
    assert cache.layers[0].stored == 20 + 7 and cache.get_seq_length() == 47


@pytest.mark.parametrize("layers", ["equal", [0.4, 0.6]])
def test_beams(layers, form):
    """As many sequences as beams, each pressed like one of them."""
    model, ids = tiny_model(), token_ids(2, 40)
    press = KnormPress(keep=0.5, layers=layers, **SMALL)
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    found = []
    for rows in (ids, ids[:1], ids[1:]):
        with press(model):
            cache = make_cache(model, form)
            found.append(model.generate(rows, past_key_values=cache, **options, **GREEDY))
    torch.testing.assert_close(found[0].sequences, torch.cat([found[1].sequences, found[2].sequences]))


def test_cropping_stops_at_a_gap():
    model, ids, cache = tiny_model(), token_ids(1, 40), make_cache(tiny_model())
    with GivenScoresPress(torch.arange(80.0).view(2, 40).flip(1), keep=0.5, **SMALL)(model):
        read(model, ids, cache)
    before = copy.deepcopy(cache)
    read(model, ids[:, :4], cache)
    cache.crop(-4)
    for layer, was in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.entries.to_tensor(), was.entries.to_tensor()) and layer.seen == 40
    cache.crop(-3)  # the window
    lengths = [layer.stored for layer in cache.layers]
    with pytest.raises(ValueError, match=r"crop\(-1\) reaches entries that were evicted: layer 0 holds the newest 0"):
        cache.crop(-1)
    assert [layer.stored for layer in cache.layers] == lengths
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.evicted
    assert torch.equal(read(model, ids, cache), read(model, ids, make_cache(model)))


def test_one_compressed_prompt_serves_many_questions():
    model, ids, cache = tiny_model(), token_ids(1, 40), make_cache(tiny_model())
    with TOVAPress(keep=0.5, **SMALL)(model):
        read(model, ids, cache)
    questions = token_ids(3, 6, seed=5)
    together = copy.deepcopy(cache)
    together.batch_repeat_interleave(3)
    found = read(model, questions, together)
    for row in range(3):
        alone = read(model, questions[row : row + 1], copy.deepcopy(cache))
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=0)


def test_nothing_stays_behind():
    model, ids = tiny_model(), token_ids(1, 30)
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    press = SnapKVPress(keep=0.5, **SMALL)
    with pytest.raises(RuntimeError, match="stop"), press(model):
        read(model, ids, make_cache(model))
        raise RuntimeError("stop")
    assert before == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    cache = make_cache(model)
    read(model, ids, cache)
    assert not cache.evicted
    with press(model):  # without a cache nothing is pressed
        assert torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_each_prompt_under_a_press_is_a_new_one():
    model, ids = tiny_model(), token_ids(1, 40)
    with KeyDiffPress(keep=0.5, **SMALL)(model):
        caches = [make_cache(model) for _ in range(2)]
        for cache in caches:
            read(model, ids, cache)
        caches[0].reset()
        read(model, ids, caches[0])
    assert [[layer.stored for layer in cache.layers] for cache in caches] == [[20, 20]] * 2
    torch.testing.assert_close(caches[0].layers[0].entries.to_tensor(), caches[1].layers[0].entries.to_tensor())


@pytest.mark.parametrize("kind", ["adapters", "trunk", "bf16"])
def test_other_forms_of_a_model(kind):
    """Inside of PEFT's wrapper, without a head, and in bf16."""
    model, ids = tiny_model(), token_ids(2, 40)
    if kind == "adapters":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    elif kind == "trunk":
        model = model.model
    else:
        model = model.to(torch.bfloat16)
    for name, press in PRESSES.items():
        cache = EGMLACache(model.config)
        with press(keep=0.5, **SMALL)(model), torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        assert [layer.stored for layer in cache.layers] == [20, 20], name
        with torch.no_grad():
            assert torch.isfinite(model(ids[:, :3], past_key_values=cache, use_cache=True)[0]).all()


def test_short_prompts_stay_whole():
    model, ids, cache = tiny_model(), token_ids(1, 20), make_cache(tiny_model())
    with RecentPress(keep=0.1)(model):
        read(model, ids, cache)
    assert [layer.stored for layer in cache.layers] == [20, 20] and not cache.evicted


@torch.no_grad()
def scores_of(press, model, ids, monkeypatch) -> list[torch.Tensor]:
    """Scores that a press gave each layer."""
    found, score = [], press.score
    monkeypatch.setattr(press, "score", lambda reading: found.append(score(reading)) or found[-1])
    with press(model):
        read(model, ids, make_cache(model))
    return found


@torch.no_grad()
def test_scores_are_their_formulas(monkeypatch):
    """Against eager attention's own weights, and keys written out."""
    model, ids = tiny_model(attn_implementation="eager"), token_ids(2, 30)
    model.set_attn_implementation("eager")
    cache = make_cache(model)
    out = model(ids, past_key_values=cache, output_attentions=True)
    weights = [layer.mean(dim=1) for layer in out.attentions]  # over heads
    attentions = [layer.self_attn for layer in model.model.layers]
    keys = [own.expand_kv(*layer.entries.split())[0] for own, layer in zip(attentions, cache.layers, strict=True)]
    expected = {
        RecentPress: [torch.arange(30.0).expand(2, -1)] * 2,
        KnormPress: [-each.norm(dim=-1).mean(dim=1) for each in keys],
        ObservedAttentionPress: [each.sum(dim=1) / torch.arange(30, 0, -1) for each in weights],
        TOVAPress: [each[:, -1] for each in weights],
    }
    smooth = torch.nn.Conv1d(1, 1, 5, padding=2, bias=False)
    smooth.weight.fill_(0.2)
    expected[SnapKVPress] = [smooth(each[:, -10:].mean(dim=1)[:, None])[:, 0] for each in weights]
    unit = [each / each.norm(dim=-1, keepdim=True) for each in keys]
    means = [each.mean(dim=2, keepdim=True) for each in unit]
    expected[KeyDiffPress] = [
        -((each * mean).sum(-1) / mean.norm(dim=-1)).mean(dim=1) for each, mean in zip(unit, means, strict=True)
    ]
    assert set(expected) == set(PRESSES.values()) - {RandomPress}
    for kind, wanted in expected.items():
        press = kind(keep=0.5, **SMALL)
        if kind is SnapKVPress:
            press.queries = 10
        for found, right in zip(scores_of(press, model, ids, monkeypatch), wanted, strict=True):
            torch.testing.assert_close(found.float(), right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_random_is_random(monkeypatch):
    found = scores_of(RandomPress(keep=0.5), tiny_model(), token_ids(2, 30), monkeypatch)
    assert found[0].shape == (2, 30) and not torch.equal(found[0], found[1])


def test_layer_shares_make_lengths_known():
    model = tiny_model()
    scores = torch.rand(2, 60) + torch.tensor([[0.0], [0.3]])
    shares = layer_shares(model, [token_ids(1, 60)], GivenScoresPress(scores, keep=0.5, **SMALL))
    assert sum(shares) == pytest.approx(1.0) and shares[1] > shares[0] + 0.2
    cache = make_cache(model)
    with SnapKVPress(keep=0.5, layers=shares, **SMALL)(model):
        read(model, token_ids(3, 60), cache)
    assert [layer.stored for layer in cache.layers] == [round(60 * share) for share in shares]


@pytest.mark.parametrize(
    ("mean", "numbers", "found"),
    [(50, [1, 1], [50, 50]), (50, [0.2, 0.8], [20, 80]), (80, [0.1, 10], [60, 100]), (6, [1, 1e-3], [7, 5])],
)
def test_spread(mean, numbers, found):
    assert spread(mean, numbers, least=5, most=100) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of them"),
        ({"keep": 0.5, "budget": 100}, "give one of them"),
        ({"keep": 0}, "keep=0: must be above 0 and at most 1"),
        ({"keep": 1.5}, "keep=1.5: must be above 0"),
        ({"budget": 19}, "budget=19 tokens, and the first 4"),
        ({"keep": 0.5, "window": -1}, "window=-1: must be 0 or more"),
        ({"keep": 0.5, "sinks": 0, "window": 0}, "one token together"),
        ({"keep": 0.5, "layers": "best"}, "layers='best': must be 'global', 'equal'"),
        ({"keep": 0.5, "layers": [0.5, 0]}, r"layers=\[0.5, 0\]: must be a positive number"),
        ({"keep": 0.5, "layers": []}, r"layers=\[\]: must be a positive number"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RecentPress(**options)


def test_bad_input():
    model, ids, press = tiny_model(), token_ids(2, 30), RecentPress(keep=0.5, **SMALL)

    def refused(message, kind=ValueError, press=press, model=model, ids=ids, **given):
        given = {"past_key_values": make_cache(model), "use_cache": True, **given}
        with pytest.raises(kind, match=message), press(model):
            model(ids, **given)

    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    refused("takes sequences of one length, without padding", attention_mask=padded)
    refused("needs a growing cache", past_key_values=EGMLACache(model.config, max_cache_len=64))
    refused("drops entries of an EGMLACache and got a DynamicCache", TypeError, past_key_values=DynamicCache())
    refused("2 sequences with layers='global'", press=RecentPress(keep=0.5, layers="global"))
    refused("layers has 3 numbers, and this model 2", press=RecentPress(keep=0.5, layers=[1, 1, 1]))
    with press(model), pytest.raises(ValueError, match="under a press already"), press(model):
        pass
    with pytest.raises(TypeError, match="needs an EG-MLA model and got Linear"), press(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="kv_gate='expanded'"), press(tiny_model("expanded gate")):
        pass
    refused("more than the 20 tokens", press=GivenScoresPress(torch.rand(2, 20), keep=0.5), ids=ids[:1])
    with pytest.raises(ValueError, match="layers='global'"):
        layer_shares(model, [ids], press)

    cache = make_cache(model)
    with press(model):
        read(model, ids, cache)
    mask = torch.ones(2, 31)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask hides tokens, and entries were evicted"):
        model(ids[:, :1], past_key_values=cache, attention_mask=mask)
    with pytest.raises(ValueError, match=r"kept has shape \(1, 2\)"):
        drop_entries(cache.layers[0], torch.tensor([[0, 1]]))
    for kept in ([[1, 0]] * 2, [[0, 99]] * 2, [[0, 0]] * 2, [[-1, 0]] * 2, [[]] * 2):
        with pytest.raises(ValueError, match="ascending indices"):
            drop_entries(cache.layers[0], torch.tensor(kept, dtype=torch.long))
    int4 = make_cache(model, "int4")
    read(model, ids, int4)
    with pytest.raises(ValueError, match="Int4LatentLayer: entries leave growing layers"):
        drop_entries(int4.layers[0], torch.tensor([[0, 1]] * 2))


def test_cases_with_bits_are_pressed_too():
    """A model whose configuration allocates bits makes a cache with bits by itself."""
    for name in ALLOCATED_CASES:
        model, ids = tiny_model(name), token_ids(1, 40)
        with SnapKVPress(keep=0.5, **SMALL)(model):
            out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
        cache = out.past_key_values
        assert type(cache.layers[0]).__name__ == "AllocatedLatentLayer" and cache.layers[0].stored == 27


def test_the_readme_example_runs(tmp_path):
    folder, model, context = tmp_path, tiny_model(), token_ids(1, 60)
    EvictionGate(torch.randn(2, 48), torch.zeros(2), torch.ones(2)).save(folder)
    text = (Path(press_module.__file__).parent / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)
    names = {"folder": folder, "model": model, "context": context}
    with torch.no_grad():
        exec(code, names)
    assert sum(layer.stored for layer in names["cache"].layers) == 60
