"""The model against the oracle, and its execution paths against each other: same numbers on every way."""

import pytest
import torch
from cases import (
    CORE_CASES,
    EXPANDED_CASES,
    MODEL_CASES,
    ROPE_CASES,
    difference,
    perturb,
    tiny_config,
    tiny_model,
    token_ids,
)
from reference import reference_forward
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from egmla import (
    EGMLACache,
    EGMLAForCausalLM,
    EGMLAForSequenceClassification,
    EGMLAForTokenClassification,
    EGMLAModel,
    entries_egmla,
)
from egmla import modeling_egmla as modeling


pytestmark = pytest.mark.long  # in front, see conftest.py


# fp32 sums in another order, logits up to 6: measured 5e-6 or less against fp64 after two layers.
TOLERANCE = 1e-5
# Gradients are sums over tokens of larger terms (up to 40), so they are compared relative to the largest of a tensor.
GRADIENT_TOLERANCE = 2e-5
# bf16 keeps 8 bits: a value up to 6 is rounded by up to 0.02, some twenty times on the way to a logit.
# Measured against fp64: 0.13 expanded, 0.11 cached and absorbed (the rounding's own noise, not the path's).
BF16_TOLERANCE = 0.25
# Three bits more in the fraction.
FP16_TOLERANCE = BF16_TOLERANCE / 8
# Autocast rounds weights as well, and leaves a mixture of both formats: measured 0.23.
AUTOCAST_TOLERANCE = 0.4


@pytest.fixture
def absorb(monkeypatch):
    """Forces the choice between the latent-space and the expanded attention."""
    return lambda value: monkeypatch.setattr(EGMLAModel, "_absorb", lambda *args: value)


def make_cache(kind: str, config, length: int = 24):
    if kind.startswith("stock") and config.kv_gate == "expanded":
        pytest.skip("holds no token ids; that it is refused is tested in test_expanded_gate.py")
    return {
        "growing": lambda: EGMLACache(config),
        "fixed": lambda: EGMLACache(config, max_cache_len=length, bits=16),
        "stock dynamic": lambda: DynamicCache(config=config),
        "stock static": lambda: StaticCache(config=config, max_cache_len=length),
    }[kind]()


CACHES = ("growing", "fixed", "stock dynamic", "stock static")


def gradients(model) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: parameter.grad.clone() for name, parameter in trained.items()}


def assert_same_gradients(left: dict, right: dict, tolerance: float = GRADIENT_TOLERANCE):
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        assert gradient.abs().max() > 0, f"{name} has a gradient of zero"
        assert difference(gradient, right[name]) <= tolerance * max(1.0, gradient.abs().max().item()), name


# --- oracle ---


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_equals_oracle(case, implementation):
    model, ids = tiny_model(case, attn_implementation=implementation), token_ids(2, 9)
    expected = reference_forward(model.config, model.state_dict(), ids)
    out = model(ids, output_hidden_states=True, output_attentions=implementation == "eager", use_cache=True)
    assert difference(out.logits, expected.logits) <= TOLERANCE
    assert len(out.hidden_states) == len(expected.hidden_states)
    for given, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert difference(given, wanted) <= TOLERANCE
    for layer, latents, rope_keys in zip(
        out.past_key_values.layers, expected.latents, expected.rope_keys, strict=True
    ):
        assert difference(layer.keys[:, 0], latents) <= TOLERANCE
        assert (
            difference(layer.values[:, 0], rope_keys) <= TOLERANCE if rope_keys.numel() else layer.values.numel() == 0
        )
    if implementation == "eager":
        for given, wanted in zip(out.attentions, expected.attentions, strict=True):
            assert difference(given, wanted) <= TOLERANCE


@torch.no_grad()
def test_oracle_notices_the_gate():
    """The oracle test can fail: a gate left out, or slightly moved, changes the logits far beyond the tolerance."""
    model, ids = tiny_model("input-gate"), token_ids(1, 9)
    weights = model.state_dict()
    expected = reference_forward(model.config, weights, ids).logits
    ungated = reference_forward(tiny_config("gate-off"), weights, ids).logits
    assert (expected - ungated).abs().max() > 1000 * TOLERANCE
    for name, parameter in model.named_parameters():
        if "kv_gate_norm" in name:
            parameter.add_(1e-3)
    assert difference(model(ids).logits, expected) > 10 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("rope", list(ROPE_CASES))
def test_rope_types_equal_oracle(rope, length):
    # 40 tokens are beyond the original length of `dynamic` and `longrope`, which change their frequencies there.
    longest = 32 if rope == "dynamic" else 256
    model = tiny_model(rope_parameters=dict(ROPE_CASES[rope]), max_position_embeddings=longest)
    ids = token_ids(1, length)
    expected = reference_forward(model.config, model.state_dict(), ids).logits
    assert difference(model(ids).logits, expected) <= TOLERANCE
    plain = reference_forward(tiny_config(), model.state_dict(), ids).logits
    assert (plain - expected).abs().max() > 1000 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("rope", list(ROPE_CASES))
def test_rope_types_decode(rope):
    model = tiny_model(rope_parameters=dict(ROPE_CASES[rope]))
    ids = token_ids(2, 12)
    assert difference(decode(model, ids, EGMLACache(model.config), [5] + [1] * 7), model(ids).logits) <= TOLERANCE


# --- absorbed and expanded ---


def causal_mask(length: int) -> torch.Tensor:
    return torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)


@pytest.mark.parametrize("implementation", ["sdpa", "sdpa heads apart", "eager"])
def test_absorbed_equals_expanded_with_gradients(case, implementation, absorb, monkeypatch):
    """Outputs and the gradients of the inputs and of every parameter, over a whole sequence."""
    if case in EXPANDED_CASES:
        pytest.skip("nothing to absorb")
    if implementation == "sdpa heads apart":
        monkeypatch.setattr(entries_egmla, "PACK_MAX_ROWS", 1)
    ids = token_ids(2, 7)
    results = []
    for value in (False, True):
        absorb(value)
        model = tiny_model(case, attn_implementation=implementation.split()[0])
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        inputs = {"inputs_embeds": embeddings, "attention_mask": causal_mask(7)}
        if model.config.kv_gate_embedding_dim is not None:
            inputs["kv_gate_input_ids"] = ids
        logits = model(**inputs, use_cache=False).logits
        logits.square().mean().backward()
        if not model.config.tie_word_embeddings:
            model.get_input_embeddings().requires_grad_(False)  # its output is the input here
        results.append((logits, embeddings.grad, gradients(model)))
    (expanded, expanded_input, expanded_all), (absorbed, absorbed_input, absorbed_all) = results
    assert difference(absorbed, expanded) <= TOLERANCE
    assert difference(absorbed_input, expanded_input) <= TOLERANCE
    assert_same_gradients(expanded_all, absorbed_all)


def test_training_through_a_continuation(case, absorb):
    """The loss on a continuation reaches, through the cache, what the prefix was made of: as in one forward."""
    ids = token_ids(2, 11)
    model = tiny_model(case).train()
    whole = model(ids, use_cache=False).logits[:, 6:]
    whole.square().mean().backward()
    expected = gradients(model)
    for value in (False, case not in EXPANDED_CASES):
        model.zero_grad()
        cache = EGMLACache(model.config, bits=16)
        absorb(False)
        model(ids[:, :6], past_key_values=cache)
        absorb(value)
        logits = model(ids[:, 6:], past_key_values=cache).logits
        assert difference(logits, whole) <= TOLERANCE
        logits.square().mean().backward()
        assert_same_gradients(expected, gradients(model))


@pytest.mark.parametrize("trained", ["kv_b_proj", "q_proj", "o_proj"])
def test_training_a_part_through_steps(trained):
    """What is cached has no gradient, and what attends to it has."""
    ids, model = token_ids(2, 9), tiny_model(num_hidden_layers=1).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    model(ids, use_cache=False).logits[:, 6:].square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    cache = EGMLACache(model.config)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 9)]
    torch.cat(steps, dim=1).square().sum().backward()
    assert_same_gradients(expected, gradients(model))


@torch.no_grad()
def test_choice_of_path():
    """The switch is the arithmetic of the design: `T (2R - N - V) < R (N + V)`, and never without a past."""
    model = tiny_model("input-gate")
    past = model(token_ids(1, 4)).past_key_values
    body, like = model.model, torch.zeros(1)
    assert not body._absorb(1, None, like) and not body._absorb(5, None, like)
    assert not body._absorb(5, EGMLACache(model.config), like)
    assert body._absorb(1, EGMLACache(model.config), like)
    assert body._absorb(17, past, like) and not body._absorb(18, past, like)
    always = tiny_model("always-absorbed")
    past = always(token_ids(1, 4)).past_key_values
    assert always.model._absorb(10_000, past, like)


# --- cached, chunked, padded ---


def decode(model, ids, cache, chunks) -> torch.Tensor:
    """Logits at every position, the sequence given in chunks."""
    logits, start = [], 0
    for size in chunks:
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [7] + [1] * 5, [5, 1, 4, 2], [1, 11]], ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_cached_equals_uncached(case, kind, chunks):
    model, ids = tiny_model(case), token_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    assert difference(decode(model, ids, make_cache(kind, model.config), chunks), expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_cached_equals_uncached_eager(case, kind):
    model, ids = tiny_model(case, attn_implementation="eager"), token_ids(2, 12)
    expected = tiny_model(case)(ids, use_cache=False).logits
    assert difference(decode(model, ids, make_cache(kind, model.config), [5, 1, 4, 1, 1]), expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_decode_beyond_the_packing_limit(case, kind, monkeypatch):
    monkeypatch.setattr(entries_egmla, "PACK_MAX_ROWS", 6)
    model, ids = tiny_model(case), token_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    assert difference(decode(model, ids, make_cache(kind, model.config), [4, 1, 3, 4]), expected) <= TOLERANCE


def test_long_chunks_need_no_mask_where_nothing_is_hidden():
    """By the mask a caller gives; block masks and masks of other lengths stay with Transformers."""
    block_mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 128, 128, device="cpu")
    cases = {None: True, torch.ones(2, 9): True, torch.ones(2, 8): False, torch.ones(1, 1, 3, 9): False}
    cases |= {torch.ones(2, 9).tril(3): False, block_mask: False}
    with torch.no_grad():
        for mask, expected in cases.items():
            assert entries_egmla.needs_no_mask(mask, 600, 9, torch.device("cpu")) is expected
        assert not entries_egmla.needs_no_mask(None, 600, 9, torch.device("cuda"))
        assert not entries_egmla.needs_no_mask(None, 512, 9, torch.device("cpu"))
    assert not entries_egmla.needs_no_mask(None, 600, 9, torch.device("cpu"))  # gradients


@torch.no_grad()
@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("kind", CACHES)
def test_long_chunks_are_masked_where_tokens_are_hidden(kind, hidden, monkeypatch):
    """A mask of a chunk on a long past is larger than the cache, so there is one only where it hides something."""
    monkeypatch.setattr(entries_egmla, "PACK_MAX_ROWS", 6)
    masks, make_mask = [], modeling.create_causal_mask
    monkeypatch.setattr(
        modeling, "create_causal_mask", lambda **inputs: masks.append(make_mask(**inputs)) or masks[-1]
    )
    model, ids = tiny_model(), token_ids(2, 12)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :hidden] = 0
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits
    cache, logits = make_cache(kind, model.config), []
    masks.clear()
    for start, end in ((0, 4), (4, 8), (8, 12)):
        out = model(
            ids[:, start:end],
            attention_mask=attention_mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        logits.append(out.logits)
    assert difference(torch.cat(logits, dim=1)[:, hidden:], expected[:, hidden:]) <= TOLERANCE
    own = kind in ("growing", "fixed")
    assert [mask is None for mask in masks[1:]] == ([] if own and not hidden else [False, False])


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_left_padding_changes_nothing(case, kind):
    """A batch of unequal lengths, prefill and five decode steps, against each sequence alone without a cache."""
    model = tiny_model(case)
    lengths, steps = (9, 4, 1), 5
    rows = [token_ids(1, length + steps, seed=length)[0] for length in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.cat((torch.zeros(longest + steps - len(row), dtype=torch.long), row)) for row in rows])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits, start = make_cache(kind, model.config), [], 0
    for end in range(longest, longest + steps + 1):
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        logits.append(out.logits)
        start = end
    logits = torch.cat(logits, dim=1)
    for row, length, given in zip(rows, lengths, logits, strict=True):
        expected = model(row[None], use_cache=False).logits[0]
        assert difference(given[longest - length :], expected) <= TOLERANCE


@torch.no_grad()
def test_right_padding_changes_nothing(case):
    """With a mask, and without one (lm-eval pads on the right and passes no mask)."""
    model, ids = tiny_model(case), token_ids(2, 10)
    padded = ids.clone()
    padded[1, 6:] = 0
    alone = model(ids[1:, :6], use_cache=False).logits[0]
    for mask in (None, (padded != 0).long()):
        logits = model(padded, attention_mask=mask).logits
        assert difference(logits[1, :6], alone) <= TOLERANCE
        assert difference(logits[0], model(ids[:1]).logits[0]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "fixed", "stock dynamic"])
@pytest.mark.parametrize("name", CORE_CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BF16_TOLERANCE), (torch.float16, FP16_TOLERANCE)])
def test_half_precision_paths_agree_with_the_oracle(name, kind, dtype, tolerance, absorb):
    model, ids = tiny_model(name), token_ids(2, 12)
    model = model.to(dtype)
    expected = reference_forward(model.config, model.state_dict(), ids).logits
    assert difference(model(ids, use_cache=False).logits, expected) <= tolerance
    cached = decode(model, ids, make_cache(kind, model.config), [6, 1, 4, 1])
    assert cached.dtype == dtype
    assert difference(cached, expected) <= tolerance


@torch.no_grad()
def test_autocast_decodes(case):
    """fp32 weights under bf16 autocast, with a cache."""
    model, ids = tiny_model(case), token_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        cached = decode(model, ids, EGMLACache(model.config), [6, 1, 4, 1])
    assert difference(cached, expected) <= AUTOCAST_TOLERANCE


# --- outputs ---


@torch.no_grad()
@pytest.mark.parametrize("absorbed", [False, True])
def test_attention_weights_and_hidden_states_while_decoding(case, absorbed, absorb):
    if absorbed and case in EXPANDED_CASES:
        pytest.skip("nothing to absorb")
    model, ids = tiny_model(case, attn_implementation="eager"), token_ids(2, 8)
    expected = reference_forward(model.config, model.state_dict(), ids)
    past = model(ids[:, :5]).past_key_values
    absorb(absorbed)
    out = model(ids[:, 5:], past_key_values=past, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == model.config.num_hidden_layers
    for given, wanted in zip(out.attentions, expected.attentions, strict=True):
        assert difference(given, wanted[:, :, 5:]) <= TOLERANCE
    for given, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert difference(given, wanted[:, 5:]) <= TOLERANCE


@torch.no_grad()
def test_logits_to_keep():
    model, ids = tiny_model(), token_ids(2, 9)
    whole = model(ids).logits
    assert difference(model(ids, logits_to_keep=1).logits, whole[:, -1:]) <= TOLERANCE
    assert difference(model(ids, logits_to_keep=4).logits, whole[:, -4:]) <= TOLERANCE
    kept = torch.tensor([0, 5, 7])
    assert difference(model(ids, logits_to_keep=kept).logits, whole[:, kept]) <= TOLERANCE


def test_loss_is_the_shifted_cross_entropy():
    model, ids = tiny_model("table-gate"), token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert difference(out.loss, expected) <= TOLERANCE


def test_inputs_embeds_and_ids_exclude_each_other():
    model, ids = tiny_model(), token_ids(1, 3)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


# --- training ---


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["input-gate", "table-gate", "gate-off", "rank-per-layer"])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    """The gate's included: its weights, its table, and the embedding it reads."""
    ids = token_ids(2, 9)
    model = tiny_model(name).train()
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    assert_same_gradients(expected, gradients(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_gates_share_of_the_embedding_gradient(reentrant):
    """The embedding's gradient through the gate alone: the hidden states are cut off from it."""
    model, ids = tiny_model("input-gate").train(), token_ids(2, 9)
    attention = model.model.layers[1]
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        gate_input = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
        rope = tuple(torch.ones(1, 1, 9, 4) for _ in range(2))
        attention(
            hidden, gate_input, position_embeddings=rope, attention_mask=causal_mask(9)
        ).square().sum().backward()
        results.append(gate_input.grad)
    assert results[0].abs().max() > 0.1
    assert difference(*results) <= TOLERANCE * results[0].abs().max()


@pytest.mark.parametrize("name", CORE_CASES)
def test_weights_changed_after_a_forward_are_not_stale(name):
    """Decode, train a step, decode again: absorption must read the new weights."""
    model, ids = tiny_model(name), token_ids(2, 9)
    with torch.no_grad():
        before = decode(model, ids, EGMLACache(model.config), [5, 1, 1, 1, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = decode(model, ids, EGMLACache(model.config), [5, 1, 1, 1, 1])
        assert difference(after, reference_forward(model.config, model.state_dict(), ids).logits) <= TOLERANCE
        assert (after - before).abs().max() > 0.01
        model.load_state_dict(tiny_model(name).state_dict())
        assert difference(decode(model, ids, EGMLACache(model.config), [5, 1, 1, 1, 1]), before) == 0


class LoraLinear(nn.Linear):
    """What adapters do to a Linear: its weight stays, a low-rank product is added to its output."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        generator = torch.Generator().manual_seed(9)
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.2)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) * 0.2)

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class PackedLinear(nn.Module):
    """What quantisation does to a Linear: 8-bit numbers and scales, no `weight`, dequantised on the way."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        scales = base.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (base.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) * self.scales.to(x.dtype)).T


@torch.no_grad()
@pytest.mark.parametrize("wrapper", [LoraLinear, PackedLinear])
@pytest.mark.parametrize("name", CORE_CASES)
def test_wrapped_up_projection_is_not_bypassed(name, wrapper):
    """Absorption sees `kv_b_proj` as the expanded path does: with its adapter, or without a weight to read."""
    model, ids = tiny_model(name), token_ids(2, 9)
    plain = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = wrapper(layer.self_attn.kv_b_proj)
    wrapped = model(ids, use_cache=False).logits
    assert (wrapped - plain).abs().max() > 100 * TOLERANCE
    assert difference(decode(model, ids, EGMLACache(model.config), [5, 1, 2, 1]), wrapped) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["input-gate", "table-gate"])
def test_every_linear_may_be_packed(name):
    """A model quantised throughout decodes, as far as its Linears are modules without a `weight`."""
    model, ids = tiny_model(name), token_ids(2, 9)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, child_name, PackedLinear(child))
    expected = model(ids, use_cache=False).logits
    assert difference(decode(model, ids, EGMLACache(model.config), [5, 1, 2, 1]), expected) <= TOLERANCE


@torch.no_grad()
def test_peft_adapter_is_not_bypassed():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(), token_ids(2, 9)
    plain = model(ids).logits
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False))
    wrapped = model(ids, use_cache=False).logits
    assert (wrapped - plain).abs().max() > 100 * TOLERANCE
    assert difference(decode(model, ids, EGMLACache(model.config), [5, 1, 2, 1]), wrapped) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 24])  # as many as the latent has elements, too
@pytest.mark.parametrize("chunk", [None, 3])
def test_adapters_of_each_row(batch, chunk, monkeypatch):
    """A batch of mixed adapters on the map that is absorbed decodes each row as its own adapter does."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=False), config, adapter_name="a")
    model.add_adapter("b", config)
    model.eval()
    assert model.config.kv_lora_rank == 24
    ids, names = token_ids(batch, 7), ["a", "b"] * (batch // 2)
    options = {"max_new_tokens": 8, "do_sample": False, "prefill_chunk_size": chunk}
    monkeypatch.setattr(entries_egmla, "PACK_MAX_ROWS", 3)  # chunks that would need no mask if absorbed
    given = model.generate(input_ids=ids, adapter_names=names, **options)
    for name in ("a", "b"):
        model.set_adapter(name)
        rows = torch.tensor([own == name for own in names])
        assert torch.equal(given[rows], model.generate(input_ids=ids[rows], **options))


# --- embeddings, placement ---


@torch.no_grad()
@pytest.mark.parametrize("size", [120, 60])
def test_resize_token_embeddings(case, size, tmp_path):
    """Gate tables follow the vocabulary; what old tokens give does not change, also after saving."""
    model = tiny_model(case)
    ids = token_ids(2, 9, vocab_size=60)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    kept = min(size, before.shape[-1])
    assert model.config.vocab_size == size and model.get_output_embeddings().weight.shape[0] == size
    for layer in model.model.layers:
        if model.config.kv_gate_embedding_dim is not None:
            assert layer.self_attn.kv_gate_embedding.weight.shape[0] == size
    resized = model(ids).logits
    assert resized.shape[-1] == size
    assert torch.equal(resized[..., :kept], before[..., :kept])
    if size > before.shape[-1]:
        assert torch.isfinite(model(torch.full((1, 3), size - 1)).logits).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(EGMLAForCausalLM.from_pretrained(tmp_path)(ids).logits, resized)


@torch.no_grad()
@pytest.mark.parametrize("placement", ["disk", "cpu"])
@pytest.mark.parametrize("name", ["input-gate", "table-gate", "rope-slots", "rank-per-layer"])
def test_offloaded_layers_give_the_same_logits(name, placement, tmp_path):
    """accelerate's hooks: parameters are on the meta device except while their module runs."""
    from accelerate import cpu_offload

    model, ids = tiny_model(name), token_ids(1, 9)
    expected, tokens = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    if placement == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
        offloaded = model
    else:
        model.save_pretrained(tmp_path / "model")
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        offloaded = EGMLAForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
    assert offloaded.model.layers[1].self_attn.kv_b_proj.weight.device.type == "meta"
    assert difference(offloaded(ids).logits, expected) <= TOLERANCE
    assert torch.equal(offloaded.generate(ids, max_new_tokens=5, do_sample=False), tokens)


# --- initialisation ---


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in MODEL_CASES if name != "gate-off"])
def test_new_model_starts_with_gates_at_identity(name):
    """Generic initialisation would zero a multiplicative gate, or its padding row."""
    model = EGMLAForCausalLM(tiny_config(name))
    for layer in model.model.layers:
        attention = layer.self_attn
        tokens = torch.tensor([[0, 1, 96]])  # 0 is the padding token
        given = tokens if model.config.kv_gate_embedding_dim is not None else model.get_input_embeddings()(tokens)
        gate = attention.gate(given)
        width = attention.kv_b_proj.out_features if name in EXPANDED_CASES else attention.kv_lora_rank
        assert gate.shape == (1, 3, width) and torch.equal(gate, torch.ones_like(gate))
        if model.config.kv_gate_embedding_dim is not None:
            assert attention.kv_gate_embedding.weight.abs().amax(dim=1).min() > 0


def test_gate_off_has_no_gate_parameters():
    assert not [
        name
        for name, _ in EGMLAForCausalLM(tiny_config("gate-off")).named_parameters()
        if "gate_" in name and "mlp" not in name
    ]


@torch.no_grad()
def test_missing_gate_weights_load_as_identity(tmp_path):
    """A checkpoint without gates, loaded with the gate on, is the same model."""
    plain, ids = tiny_model("gate-off"), token_ids(2, 9)
    plain.save_pretrained(tmp_path)
    for table in (None, 10):
        gated = EGMLAForCausalLM.from_pretrained(tmp_path, kv_gate="latent", kv_gate_embedding_dim=table)
        assert torch.equal(gated(ids).logits, plain(ids).logits)


# --- heads ---


@torch.no_grad()
@pytest.mark.parametrize("name", CORE_CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_reads_the_last_real_token(name, side):
    model = tiny_model(name, EGMLAForSequenceClassification, num_labels=3)
    perturb(model)
    rows = [token_ids(1, length, seed=length)[0] for length in (9, 5, 1)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[9 - len(tokens) :] = tokens if side == "left" else row[9 - len(tokens) :]
        if side == "right":
            row[: len(tokens)] = tokens
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, labels=torch.tensor([0, 2, 1]))
    assert out.logits.shape == (3, 3) and torch.isfinite(out.loss)
    for given, row in zip(out.logits, rows, strict=True):
        assert difference(given, model(row[None]).logits[0]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", CORE_CASES)
def test_token_classification(name):
    model, ids = tiny_model(name, EGMLAForTokenClassification, num_labels=5), token_ids(2, 9)
    ids[1, 6:] = 0
    out = model(ids, attention_mask=(ids != 0).long(), labels=torch.randint(0, 5, (2, 9)))
    assert out.logits.shape == (2, 9, 5) and torch.isfinite(out.loss)
    assert difference(out.logits[1, :6], model(ids[1:, :6]).logits[0]) <= TOLERANCE
