"""SpftConfig: a value is either refused in one line or kept; saving, loading, copying and
pickling give an equal configuration, as PEFT expects of every method; density rounds to the
nearest number of neurons and to at least one. The first pattern that matches a layer sets its
number, also after saving, and `allocated` sets the number of those that no pattern matches."""

from __future__ import annotations

import copy
import json
import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, PeftType

from trainer_ext import SpftConfig, SpftError
from trainer_ext.config.registry import METRICS
from trainer_ext.config.spft_config import DEFAULT_R

EXAMPLES = [
    SpftConfig(),
    SpftConfig(r=3, target_modules=["q_proj", "up_proj"], seed=7),
    SpftConfig(density=0.25, importance="magnitude", exclude_modules=r".*\.0\..*"),
    SpftConfig(r=5, target_modules=r".*mlp.*", modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    SpftConfig(r=2, layers_to_transform=[0, 1], layers_pattern="layers"),
    SpftConfig(
        r=2, r_pattern={"q_proj": 3, r"0\..*": 5}, density_pattern={"down_proj": 0.5, "a": 1}
    ),
    SpftConfig(allocation="global", importance_file="scores.safetensors", allocation_floor=0.5),
    SpftConfig(
        density=0.1, allocation="global", allocation_ceiling=2, allocated={"b.x": 3, "a.x": 1}
    ),
]
FIRST_COUNTS = {"z_proj": 1, r"layers\.0\.a_proj": 2, "a_proj": 3, r"layers\..*": 4}
# what is matched -> r
MATCHES = [
    ("model.layers.0.a_proj", 2),
    ("model.layers.1.a_proj", 3),
    ("model.layers.0.mlp.z_proj", 1),
    ("model.layers.0.mlp.az_proj", 4),  # a name ends at a dot
    ("a_proj", 3),
    ("model.a_proj.other", 9),
    ("layers", 9),
]


def test_defaults():
    config = SpftConfig()
    assert (config.r, config.density) == (None, None)
    assert DEFAULT_R == 64
    assert config.neurons_of("layer", 1000) == 64
    assert config.neurons_of("small layer", 30) == 30
    assert SpftConfig(r=64).neurons_of("small layer", 30) == 30  # asked for or by default
    assert (config.importance, config.calibration_batches) == ("group_taylor", 8)
    assert (config.axis, config.peft_type) == ("rows", PeftType.SPFT)


def test_every_metric_registers_itself():
    assert set(METRICS) >= {
        "magnitude",
        "taylor",
        "group_taylor",
        "zo_taylor",
        "quantile_mean",
        "wanda",
        "random",
    }


@pytest.mark.parametrize("config", EXAMPLES)
def test_round_trip_through_files(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert SpftConfig.from_pretrained(tmp_path) == config
    generic = PeftConfig.from_pretrained(tmp_path)
    assert type(generic) is SpftConfig
    assert generic == config
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SPFT"


@pytest.mark.parametrize("config", EXAMPLES)
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(config, how):
    assert how(config) == config
    assert how(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(("layer", "count"), MATCHES)
def test_the_first_pattern_that_matches_counts_also_after_saving(layer, count, tmp_path):
    config = SpftConfig(r=9, r_pattern=FIRST_COUNTS)
    config.save_pretrained(tmp_path)
    for same in (config, SpftConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert list(same.r_pattern) == list(FIRST_COUNTS)
        assert same.neurons_of(layer, 10) == count


def test_patterns_of_density_take_shares_and_the_others_keep_theirs():
    config = SpftConfig(r=9, density_pattern={"down_proj": 0.25})
    assert config.neurons_of("layers.0.down_proj", 48) == 12
    assert config.neurons_of("layers.0.up_proj", 48) == 9


def test_allocated_numbers_count_where_no_pattern_does():
    config = SpftConfig(
        r=9, allocation="global", allocated={"a": 3, "b": 4}, r_pattern={"b": 5, "c": 6}
    )
    assert [config.neurons_of(layer, 10) for layer in "abc"] == [3, 5, 6]
    assert config.uniform_neurons_of(10) == 9
    for layer, size, fragment in (("d", 10, "no neurons for layer d"), ("a", 2, "3 neurons")):
        with pytest.raises(SpftError, match=fragment):
            config.neurons_of(layer, size)


def test_mappings_of_front_ends_become_plain_dicts():
    class Mapping(dict):
        pass

    config = SpftConfig(r_pattern=Mapping(a=1), density_pattern=Mapping(b=0.5))
    assert type(config.r_pattern) is type(config.density_pattern) is dict
    assert config == SpftConfig(r_pattern={"a": 1}, density_pattern={"b": 0.5})


def test_unknown_fields_of_later_versions_are_dropped(tmp_path, recwarn):
    SpftConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    assert SpftConfig.from_pretrained(tmp_path).r == 3
    assert any("from_the_future" in str(w.message) for w in recwarn)


def test_sets_become_sorted_lists():
    assert SpftConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]
    assert SpftConfig(exclude_modules={"b", "a"}).exclude_modules == ["a", "b"]


@given(
    density=st.floats(1e-6, 1.0, exclude_min=False),
    out_features=st.integers(1, 100_000),
)
def test_density_rounds_to_the_nearest_and_to_at_least_one(density, out_features):
    count = SpftConfig(density=density).neurons_of("layer", out_features)
    assert 1 <= count <= out_features
    exact = Fraction(density) * out_features
    # the product is formed in floating point: one rounding error beside the half
    assert count == 1 or abs(count - exact) <= Fraction(1, 2) + exact * Fraction(1, 2**52)


@given(r=st.integers(1, 1000), out_features=st.integers(1, 1000))
def test_r_is_taken_up_to_the_whole_layer(r, out_features):
    assert SpftConfig(r=r).neurons_of("some.layer", out_features) == min(r, out_features)
