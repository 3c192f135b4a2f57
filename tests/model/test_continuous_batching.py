"""`generate_batch`: the tokens of `generate()`, from pages that hold latents and nothing more."""

import pytest
import torch
from cases import CORE_CASES, tiny_model, token_ids
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from egmla import EGMLACache, EGMLAForCausalLM


NEW_TOKENS = 8
SETTINGS = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 64}
# All layers of one width, and an even one.
PAGED = [case for case in CORE_CASES if case != "rank-per-layer"]


def prompts() -> list[list[int]]:
    """Of different lengths, one longer than a page and one longer than a batch."""
    return [token_ids(1, length, seed=length)[0].tolist() for length in (5, 1, 23, 70)]


def batch(model: EGMLAForCausalLM, inputs: list[list[int]], **settings) -> list[list[int]]:
    """New tokens of each prompt."""
    outputs = model.generate_batch(
        inputs,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**{**SETTINGS, **settings}),
    )
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [found[tuple(ids)] for ids in inputs]


def one_by_one(model: EGMLAForCausalLM, inputs: list[list[int]]) -> list[list[int]]:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in inputs]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", PAGED)
def test_tokens_are_those_of_generate(case, attention):
    model, inputs = tiny_model(case, tie_word_embeddings=False, attn_implementation=attention), prompts()
    expected = one_by_one(model, inputs)
    assert batch(model, inputs) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(inputs)
    assert model.config._attn_implementation == attention
    assert one_by_one(model, inputs) == expected


def test_pages_hold_latents(monkeypatch):
    """Bytes of a page: `R + P` elements for each token and layer."""
    model, seen = tiny_model(), []
    init = EGMLAForCausalLM.init_continuous_batching

    def watch(self, *args, **kwargs):
        manager = init(self, *args, **kwargs)
        create = manager._create_batch_processor
        manager._create_batch_processor = lambda: seen.append(create()) or seen[-1]
        return manager

    monkeypatch.setattr(EGMLAForCausalLM, "init_continuous_batching", watch)
    batch(model, prompts())
    allocators = [*seen[0].cache.cache_allocators.values()]
    page = SETTINGS["page_size"] * model.config.cache_elements_per_layer[0] * 4
    assert [allocator.bytes_per_page for allocator in allocators] == [page]
    assert allocators[0].bytes_per_block == page * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("case", "attention", "message"),
    [
        (
            "rank-per-layer",
            "sdpa",
            r"20 to 36 elements per token and layer: all layers must have the same.*generate\(\)",
        ),
        ("input-gate", "flash_attention_2", "attn_implementation='flash_attention_2'.*attn_implementation='sdpa'"),
    ],
)
def test_refused(case, attention, message):
    model = tiny_model(case)
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=message):
        batch(model, prompts())


@pytest.mark.parametrize("make", [EGMLACache, lambda config: DynamicCache(config=config), lambda config: "pages"])
def test_cache_is_for_pages_alone(make):
    """The keyword argument `cache` is how continuous batching hands over its pages."""
    model = tiny_model()
    cache = make(model.config)
    with pytest.raises(
        TypeError, match=f"cache is of type {type(cache).__name__}.*PagedAttentionCache.*past_key_values"
    ):
        model(token_ids(1, 3), cache=cache)
