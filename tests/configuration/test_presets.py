"""Presets: each loads through AutoConfig and has the published cache."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from egmla import EGMLAConfig
from egmla.configuration import load_preset, preset_names, preset_path
from egmla.utils.accounting import (
    cache_elements_per_layer,
    count_parameters,
    meta_model,
    mha_elements_per_token,
    mla_elements_per_token,
)


REPOSITORY = Path(__file__).parents[2]
CACHE_ELEMENTS = {
    "mla-kv256-120m": 3_840,
    "egmla-kv256-120m": 3_840,
    "egmla-kv64-120m": 1_536,
    "egmla-kv16-120m": 960,
    "egmla-kv64-1.2b": 2_304,
    "egmla-smollm2-135m": 5_760,
    "egmla-smollm2-360m": 10_240,
}


def test_preset_names():
    assert sorted(preset_names()) == sorted(CACHE_ELEMENTS)


@pytest.mark.parametrize("name", CACHE_ELEMENTS)
def test_preset_loads_from_its_folder(name):
    config = AutoConfig.from_pretrained(REPOSITORY / "configuration" / name)
    assert type(config) is EGMLAConfig
    assert config.cache_elements_per_token == CACHE_ELEMENTS[name]
    assert config.cache_bytes_per_token() == 2 * CACHE_ELEMENTS[name]
    assert load_preset(name).to_diff_dict() == config.to_diff_dict()
    assert (preset_path(name) / "config.json").is_file()


@pytest.mark.parametrize("name", CACHE_ELEMENTS)
def test_preset_model_caches_what_its_config_says(name):
    config = load_preset(name)
    assert cache_elements_per_layer(meta_model(config)) == config.cache_elements_per_layer


def test_published_reductions():
    config = load_preset("egmla-kv64-120m")
    assert (mha_elements_per_token(config), mla_elements_per_token(config)) == (18_432, 3_840)


@pytest.mark.parametrize(
    ("name", "millions", "table_millions"),
    [("mla-kv256-120m", 124.2, 0), ("egmla-kv64-120m", 119.1, 154.5), ("egmla-kv64-1.2b", 1245.3, 231.8)],
)
def test_parameters_of_presets(name, millions, table_millions):
    counts = count_parameters(meta_model(load_preset(name)))
    tables = counts.pop("gate tables")
    assert sum(counts.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert tables / 1e6 == pytest.approx(table_millions, abs=0.05)


def test_only_the_plain_mla_preset_has_no_gate():
    assert [name for name in preset_names() if load_preset(name).kv_gate is None] == ["mla-kv256-120m"]


def test_unknown_preset_names_near_matches():
    with pytest.raises(ValueError, match=r"'egmla-kv64' is no preset: did you mean egmla-kv64-120m"):
        load_preset("egmla-kv64")
    with pytest.raises(ValueError, match=r"'xyz' is no preset: use one of egmla-kv16-120m"):
        preset_path("xyz")
