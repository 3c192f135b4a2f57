"""Cache elements and parameters, counted without weights."""

import pytest
from shapes import CONFIGS, LATENT, SHAPE
from transformers import GPT2Config, MambaConfig

from egmla import EGMLAConfig
from egmla.configuration import load_preset
from egmla.utils.accounting import cache_elements_per_layer, count_parameters, meta_model


@pytest.fixture(params=CONFIGS)
def kind(request) -> str:
    return request.param


def test_cache_elements_are_counted(kind):
    config, elements = CONFIGS[kind]
    assert cache_elements_per_layer(meta_model(config)) == [elements] * 2


def test_counting_leaves_the_configuration_alone():
    config = load_preset("egmla-kv16-120m")
    before = config.to_dict()
    meta_model(config)
    assert config.to_dict() == before


def test_cache_elements_of_an_unlike_cache():
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"MambaForCausalLM leaves .* so its elements cannot be counted"):
        cache_elements_per_layer(meta_model(config))


def test_parameters_add_up(kind):
    model = meta_model(CONFIGS[kind][0])
    counts = count_parameters(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["MLP"] == 2 * 3 * 32 * 48


def test_gate_tables_are_counted_apart():
    config = EGMLAConfig(**SHAPE, **LATENT, kv_gate_embedding_dim=5)
    counts = count_parameters(meta_model(config))
    assert counts["gate tables"] == 2 * 97 * 5
    assert counts["embeddings"] == 97 * 32


def test_parts_of_gpt2():
    counts = count_parameters(meta_model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=97, n_positions=16)))
    assert counts["attention"] == 8 * 24 + 24 + 8 * 8 + 8
