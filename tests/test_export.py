"""Exported policies: the same actions without rlx, in the environment's own units."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnxruntime
import pytest

import envs
from rlx import cli, export
from rlx.algorithm import Plan
from rlx.algorithms import ALGORITHMS
from rlx.export import export_policy
from rlx.types import Box, Spec, UserError
from tests.kinds import of_each_kind

KEY = jax.random.key(3)
TEAMS = {"hasac", "maddpg", "mappo"}
SIZES = {"actor_hidden": (8,), "critic_hidden": (8,), "activation": "tanh"}


def built(name, env, **settings):
    module = importlib.import_module(ALGORITHMS[name])
    fields = {field for field in module.Config.__dataclass_fields__}
    config = module.Config(**{k: v for k, v in (SIZES | settings).items() if k in fields})
    algorithm = module.make(config, env.spec, Plan(4, 4, 1))
    return algorithm, algorithm.policy(algorithm.init(KEY), "greedy")


def observations(spec, count):
    leaves, tree = jax.tree.flatten(spec.obs)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [rng.normal(size=(count, *x.shape)).astype(x.dtype) for x in leaves])


def call(folder, inputs):
    exported = jax.export.deserialize(bytearray((folder / "policy.stablehlo").read_bytes()))
    return exported.call(inputs)


@pytest.mark.parametrize("mode", ["greedy", "sample"])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_exported_policy_of_every_algorithm_acts_as_it_did(name, mode, tmp_path):
    env = envs.make("particle/simple_spread" if name in TEAMS else "gymnax/Pendulum-v1")
    algorithm, policy = built(name, env)
    about = export_policy(tmp_path, env.spec, algorithm, policy, mode)
    obs = observations(env.spec, 5)
    memory = jax.vmap(algorithm.memory)(jax.random.split(KEY, 5))
    after, expected, _ = algorithm.act(policy, memory, obs, jax.random.key(7), mode)
    inputs = export.named("obs", obs) | export.named("memory", memory)
    assert [entry["name"] for entry in about["inputs"]] == list(inputs)
    inputs |= {"key": jax.random.key_data(jax.random.key(7))} if mode == "sample" else {}
    found = call(tmp_path, inputs)
    expected = (1 + expected) / 2 if name in TEAMS else 2 * expected  # to 0..1 there, and Pendulum's torque to -2..2
    np.testing.assert_allclose(found["action"], expected, atol=1e-5)
    for path, leaf in export.named("memory", after).items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5)


def in_onnx(folder, inputs):
    session = onnxruntime.InferenceSession(folder / "policy.onnx")
    found = session.run(None, {name: np.asarray(x) for name, x in inputs.items()})
    return dict(zip([output.name for output in session.get_outputs()], found, strict=True))


@pytest.mark.parametrize("name", of_each_kind(sorted(ALGORITHMS), ("ppo", "fpo", "mappo")))
def test_a_policy_of_every_algorithm_acts_in_onnx_as_it_did(name, tmp_path):
    env = envs.make("particle/simple_spread" if name in TEAMS else "gymnax/Pendulum-v1")
    algorithm, policy = built(name, env)
    export_policy(tmp_path, env.spec, algorithm, policy, onnx=True)
    for count in (1, 6):
        inputs = export.named("obs", observations(env.spec, count))
        found = in_onnx(tmp_path, inputs)
        assert list(found) == ["action"]
        np.testing.assert_allclose(found["action"], call(tmp_path, inputs)["action"], atol=1e-5)
    export_policy(tmp_path, env.spec, algorithm, policy, overwrite=True)
    assert not (tmp_path / "policy.onnx").exists()  # of another policy than the rest of the folder


def test_memory_and_whole_numbers_pass_through_onnx(tmp_path):
    env = envs.make("gymnax/CartPole-v1")
    algorithm, policy = built("ppo", env, recurrent=True, memory_size=6)
    cumsum = jnp.cumsum
    export_policy(tmp_path, env.spec, algorithm, policy, onnx=True)
    assert jnp.cumsum is cumsum  # which jax2onnx replaces
    inputs = {"obs": observations(env.spec, 3), "memory": np.ones((3, 6), np.float32)}
    found, expected = in_onnx(tmp_path, inputs), call(tmp_path, inputs)
    np.testing.assert_array_equal(found["action"], expected["action"])
    np.testing.assert_allclose(found["next/memory"], expected["memory"], atol=1e-5)


def test_where_onnx_cannot_be_written_it_says_why(tmp_path, monkeypatch):
    env = envs.make("gymnax/CartPole-v1")
    algorithm, policy = built("ppo", env)
    with pytest.raises(UserError, match="mode = 'sample' is not possible: greedy in ONNX"):
        export_policy(tmp_path / "a", env.spec, algorithm, policy, "sample", onnx=True)
    monkeypatch.setattr(jax2onnx, "to_onnx", lambda *arguments, **options: 1 / 0)
    with pytest.raises(UserError, match="jax2onnx cannot convert this policy: ZeroDivisionError"):
        export_policy(tmp_path / "a", env.spec, algorithm, policy, onnx=True)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match=r"ONNX needs jax2onnx \(.*\): pip install 'rlx\[onnx\]'"):
        export_policy(tmp_path / "a", env.spec, algorithm, policy, onnx=True)
    assert not (tmp_path / "a").exists()


def test_what_a_policy_remembers_goes_in_as_it_came_out(tmp_path):
    env = envs.make("gymnax/CartPole-v1")
    algorithm, policy = built("ppo", env, recurrent=True, memory_size=6)
    about = export_policy(tmp_path, env.spec, algorithm, policy)
    obs, memory = observations(env.spec, 3), jax.vmap(algorithm.memory)(jax.random.split(KEY, 3))
    inputs = {
        entry["name"]: np.broadcast_to(entry.get("initial", 0), (3, *entry["shape"])) for entry in about["inputs"]
    }
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    for _ in range(3):
        memory, expected, _ = algorithm.act(policy, memory, obs, KEY, "greedy")
        found = call(tmp_path, inputs | {"obs": obs})
        inputs |= {name: x for name, x in found.items() if name.startswith("memory")}
        np.testing.assert_array_equal(found["action"], expected)
        np.testing.assert_allclose(found["memory"], memory, atol=1e-5)
    assert (about["action"]["dtype"], about["action"]["num_values"]) == ("int32", 2)


def test_native_bounds_of_each_entry_are_met():
    spec = Spec(jax.ShapeDtypeStruct((1,), jnp.float32), Box((2,), (0.0, -4.0), (2.0, 8.0)))
    np.testing.assert_allclose(export.native(spec, jnp.array([-1.0, 0.5])), [0, 5])


def test_the_command_exports_a_run_and_jax_alone_calls_it_as_documented(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = "--total-steps 512 --num-envs 4 --unroll-length 16 --num-evals 0 --quiet --run-dir run"
    small = "--algo.actor-hidden 8 --algo.critic-hidden 8 --algo.num-epochs 1 --algo.num-minibatches 2"
    assert cli.main(["train", "ppo", "gymnax/Pendulum-v1", *sizes.split(), *small.split()]) == 0
    assert cli.main(["export", "run", "--out", "policy"]) == 0, capsys.readouterr().err
    about = json.loads(Path("policy/policy.json").read_text())
    assert (about["env"], about["step"], about["action"]["high"]) == ("gymnax/Pendulum-v1", 512, [2.0])
    assert about["env_overrides"] == {} and about["needs"] == ["jax", "flatbuffers"]
    assert cli.main(["export", "run", "--out", "policy"]) == 2
    assert "already holds a policy" in capsys.readouterr().err
    assert cli.main(["export", "run", "--out", "policy", "--overwrite", "--onnx"]) == 0
    assert set(os.listdir("policy")) == {"policy.stablehlo", "policy.json", "policy.onnx"}
    *code, last = textwrap.dedent(re.search(r"\n\n((?:    .*\n)+)", export.__doc__)[1]).splitlines()
    alone = ["import sys", "sys.modules['rlx'] = sys.modules['envs'] = None", *code, f"print(({last}\n).shape)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(alone)], capture_output=True, text=True)
    assert done.stdout.strip() == "(8, 1)", done.stderr


def test_what_cannot_be_exported_is_refused(tmp_path):
    env = envs.make("gymnax/CartPole-v1")
    algorithm, policy = built("ppo", env)
    with pytest.raises(UserError, match=r"platforms = \['gpu'\] .* cpu, cuda, rocm, tpu"):
        export_policy(tmp_path, env.spec, algorithm, policy, platforms=["gpu"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder = .*file' is not possible"):
        export_policy(tmp_path / "file", env.spec, algorithm, policy)
    for mode in ("gredy", "explore"):
        with pytest.raises(UserError, match=f"mode = '{mode}' is not possible: greedy or sample"):
            export_policy(tmp_path, env.spec, algorithm, policy, mode)


def test_the_metadata_of_an_action_say_how_it_is_played():
    repeated = envs.make("gymnax/CartPole-v1", action_repeat=3).spec
    found = {"shape": [], "repeat": 3, "chunk": 1, "dtype": "int32", "num_values": 2}
    assert export.about_action(repeated) == found
    team = export.about_action(envs.make("particle/simple_speaker_listener").spec)
    assert np.asarray(team["mask"]).shape == tuple(team["shape"]) and not np.asarray(team["mask"]).all()
    chunked = export.about_action(envs.make("gymnax/Pendulum-v1", action_chunk=4).spec)
    assert (chunked["shape"], chunked["chunk"], chunked["repeat"], chunked["high"]) == ([4], 4, 1, [2.0] * 4)
