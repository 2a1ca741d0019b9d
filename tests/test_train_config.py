"""The settings of a run: strict, exact, and the same after a trip through TOML."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wkv import RWKV4Config, RWKV7Config
from wkv.errors import ConfigError
from wkv.training.config import DataSettings, ModelSettings, TrainConfig, check_names, to_toml


def test_settings_survive_a_trip_through_toml():
    tables = {
        "model": ModelSettings(init='a "quoted" näme\\with\nlines\x7f.pth', n_layer=3),
        "data": DataSettings(data=("one", "two"), held_out=0.25),
        "training": TrainConfig(tokens=7, minutes=2.5, recompute="cheap", adam_eps=1e-18, schedule="wsd"),
    }
    back = tomllib.loads(to_toml(tables))
    assert ModelSettings.from_dict(back["model"]) == tables["model"]
    assert DataSettings.from_dict(back["data"]) == tables["data"]
    assert TrainConfig.from_dict(back["training"]) == tables["training"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_toml(text):
    settings = DataSettings(field=text)
    assert DataSettings.from_dict(tomllib.loads(to_toml({"data": settings}))["data"]) == settings


def test_a_misspelt_setting_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'lerning_rate'.*Try: learning_rate"):
        TrainConfig.from_dict({"lerning_rate": 1e-3})
    with pytest.raises(ConfigError, match=r"no table is named 'trainin'.*Try: training"):
        check_names({"trainin": {}}, {"training", "model"}, "table")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "a whole number from 1"),
        ("batch_size", True, "a whole number"),
        ("batch_size", 8.0, "a whole number"),
        ("learning_rate", "fast", "a number from 0"),
        ("learning_rate", float("nan"), "a number from 0"),
        ("final", 1.5, "a number from 0 to 1"),
        ("order", "random", "one of 'magic', 'shuffled', 'documents', 'streams'"),
        ("recompute", True, "one of 'nothing', 'cheap'"),
        ("minutes", 0, "leaving it out"),
        ("micro_batch", 0, "leaving it out"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_range(name, value, expected):
    with pytest.raises(ConfigError, match=f"{name} is .*{expected}"):
        TrainConfig(**{name: value})


def test_a_whole_number_is_a_number():
    assert TrainConfig.from_dict({"learning_rate": 1}).learning_rate == 1


def test_a_list_of_numbers_is_no_list_of_sources():
    with pytest.raises(ConfigError, match="a list of texts"):
        DataSettings.from_dict({"data": [1]})


def test_a_model_of_any_size_has_the_official_proportions():
    config = ModelSettings(n_layer=2, n_embd=768).config(65536)
    named = RWKV7Config.named("0.1B")
    assert config == named.replace(n_layer=2)
    assert ModelSettings(arch="rwkv4", size="169M").config(50277) == RWKV4Config.named("169M")
    assert ModelSettings(arch="rwkv6", n_embd=512, n_layer=1, dim_ffn=96).config(10).dim_ffn == 96
    assert ModelSettings(arch="rwkv5", n_embd=512, n_layer=1).config(10).dim_ffn == 1792


def test_sizes_that_make_no_model_are_refused():
    with pytest.raises(ConfigError, match="whole heads"):
        ModelSettings(n_embd=100).config(10)
