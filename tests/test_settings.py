"""Settings: flattening, files, layers and their precedence, types, presets."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Literal

import pytest

import envs
from rlx import settings
from rlx.algorithms import ALGORITHMS
from rlx.errors import UserError
from rlx.schedule import TrainConfig
from rlx.settings import Setting


@dataclasses.dataclass(frozen=True)
class Train:
    num_envs: int = 4
    reset: Literal["pool", "always"] = "pool"


@dataclasses.dataclass(frozen=True)
class Algo:
    gamma: float = 0.99
    hidden: tuple[int, ...] = (64, 64)
    recurrent: bool = False
    name: str = "a"
    pair: tuple[int, str] = (1, "b")
    limit: int | None = None


def merge(*layers):
    return settings.merge(Train, Algo, layers)


def test_nested_and_dotted_keys_are_the_same_setting():
    assert settings.flatten({"algo": {"gamma": 0.9}, "num_envs": 2}) == {"algo.gamma": 0.9, "num_envs": 2}
    assert settings.flatten({"algo.gamma": 0.9}) == settings.flatten({"algo": {"gamma": 0.9}})


@pytest.mark.parametrize(
    "name, text",
    [("a.json", '{"num_envs": 2, "algo": {"gamma": 0.9}}'), ("a.toml", "num_envs = 2\nalgo.gamma = 0.9")],
)
def test_a_file_is_json_or_toml(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert settings.read_file(tmp_path / name) == {"num_envs": 2, "algo.gamma": 0.9}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "", "must end in .json or .toml"),
        ("a.json", "{", "cannot be read"),
        ("a.toml", "x =", "cannot be read"),
        ("a.json", "[1]", "must hold a table of settings, not list"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        settings.read_file(tmp_path / name)
    assert name in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="missing.json"):
        settings.read_file(tmp_path / "missing.json")


def test_the_last_layer_wins_and_every_value_says_where_it_came_from():
    merged = merge(
        ("preset", {"num_envs": 8, "algo.gamma": 0.9, "algo.name": "p"}),
        ("config", {"num_envs": 16, "algo.gamma": 0.8}),
        ("command line", {"num_envs": 32, "env.length": 5}),
    )
    assert merged["num_envs"] == Setting(32, "command line")
    assert merged["algo.gamma"] == Setting(0.8, "config")
    assert merged["algo.name"] == Setting("p", "preset")
    assert merged["reset"] == Setting("pool", "default")
    assert merged["env.length"] == Setting(5, "command line")


def test_a_value_given_on_the_command_line_that_equals_the_default_says_so():
    assert merge(("command line", {"num_envs": 4}))["num_envs"] == Setting(4, "command line")


def test_parts_of_the_merged_settings_build_their_dataclasses():
    merged = merge(("config", {"num_envs": 2, "algo.hidden": [8], "env.length": 5}))
    assert settings.build(Train, settings.values(merged)) == Train(num_envs=2)
    assert settings.build(Algo, settings.values(merged, "algo.")) == Algo(hidden=(8,))
    assert settings.values(merged, "env.") == {"length": 5}


def test_settings_survive_json():
    config = Algo(gamma=float("inf"), hidden=(1, 2, 3), pair=(3, "c"), limit=5)
    assert settings.build(Algo, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_recorded_field_that_no_longer_exists_is_named():
    with pytest.raises(UserError, match="'old'"):
        settings.build(Algo, {"old": 1})


def test_a_key_that_does_not_exist_is_named_with_close_ones_and_its_layer():
    with pytest.raises(UserError, match=r"from the config.*'algo.gama'.*Did you mean algo.gamma"):
        merge(("config", {"algo.gama": 0.9}))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("num_envs", 2.5, "num_envs = 2.5 is not possible: it must be int"),
        ("num_envs", True, "it must be int"),
        ("num_envs", "8", "it must be int"),
        ("reset", "never", "one of 'pool', 'always'"),
        ("algo.gamma", "x", "it must be float"),
        ("algo.gamma", True, "it must be float"),
        ("algo.recurrent", 1, "it must be bool"),
        ("algo.hidden", 64, "it must be tuple"),
        ("algo.hidden", [64, "x"], "it must be int"),
        ("algo.pair", [1, "b", 2], "it must be tuple"),
        ("algo.limit", "x", "algo.limit"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key, value, message):
    with pytest.raises(UserError, match=message) as error:
        merge(("config", {key: value}))
    assert str(error.value).startswith(key)


def test_an_int_serves_as_a_float_and_a_list_as_a_tuple():
    merged = merge(("config", {"algo.gamma": 1, "algo.hidden": [32, 16], "algo.limit": 3}))
    assert repr(merged["algo.gamma"].value) == "1.0"
    assert merged["algo.hidden"].value == (32, 16) and merged["algo.limit"].value == 3


def test_the_description_names_what_is_not_default_and_counts_the_rest():
    text = settings.describe(merge(("preset", {"num_envs": 8}), ("command line", {"algo.gamma": 0.5})))
    assert text == "settings: num_envs=8 (preset), algo.gamma=0.5 (command line), 6 at their defaults"


def test_a_preset_of_an_environment_stands_above_its_suites(monkeypatch):
    found = {"a/*": {"ppo": {"num_envs": 1, "seed": 7}}, "a/b": {"ppo": {"num_envs": 2}}, "a/c": {"sac": {"seed": 1}}}
    monkeypatch.setattr(settings, "presets", lambda: found)
    assert settings.preset("a/b", "ppo") == {"num_envs": 2, "seed": 7}
    assert settings.preset("a/c", "ppo") == {"num_envs": 1, "seed": 7}
    assert settings.preset("x/b", "ppo") == {} and settings.preset("a/b", "sac") == {}
    found["default/*"] = {"ppo": {"seed": 3, "num_evals": 2}}
    assert settings.preset("a/c", "ppo") == {"num_envs": 1, "seed": 7, "num_evals": 2}
    assert settings.preset("my_env.py:make", "ppo") == {"seed": 3, "num_evals": 2}


PRESETS = [(env, algorithm) for env, table in settings.presets().items() for algorithm in table]


def test_presets_ship_with_the_package():
    assert ("playground/WalkerWalk", "ppo") in PRESETS and ("gymnax/*", "ppo") not in PRESETS


@pytest.mark.parametrize("env, algorithm", PRESETS)
def test_every_environment_algorithm_and_field_of_a_preset_exists(env, algorithm):
    names = set(envs.names())
    every = env == "default/*" or (env.endswith("/*") and any(name.startswith(env[:-1]) for name in names))
    assert env in names or every
    assert algorithm in ALGORITHMS
    module = importlib.import_module(ALGORITHMS[algorithm])
    merged = settings.merge(TrainConfig, module.Config, [("preset", settings.presets()[env][algorithm])])
    assert any(setting.origin == "preset" for setting in merged.values())
    overrides = settings.values(merged, "env.")
    if overrides:  # only building an environment tells which it takes
        envs.make(next(name for name in sorted(names) if name.startswith(env.removesuffix("*"))), **overrides)
