"""Names, errors, and the contract of one environment of each suite."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.names import DM_CONTROL, LOCOMOTION, MANIPULATION, NAMES
from rlx.environment import random_action
from rlx.errors import UserError
from rlx.types import Box, Discrete

KEY = jax.random.key(3)
SAMPLES = (
    "brax/fast",
    "brax/inverted_pendulum",
    "gymnax/CartPole-v1",
    "gymnax/Pendulum-v1",
    "particle/simple_speaker_listener",
    "multi_brax/reacher_2x1",
    "multi_playground/ReacherEasy_2x1",
    "playground/CartpoleBalance",
    "probe/lqr",
)
sample = pytest.mark.parametrize("name", SAMPLES)


@functools.cache
def built(name: str):
    """An environment, limited to 3 steps where it can be, its jitted reset and step."""
    env = envs.make(name, episode_length=3, **({"backend": "spring"} if name == "brax/inverted_pendulum" else {}))
    return env, jax.jit(env.reset), jax.jit(env.step)


def play(name: str, num_steps: int, key=KEY):
    env, reset, step = built(name)
    state, obs = reset(key, env.spec.params)
    out = [(state, obs)]
    for i in range(num_steps):
        action_key, step_key = jax.random.split(jax.random.fold_in(key, i))
        out.append(step(out[-1][0], random_action(env.spec, action_key), step_key))
    return out


def abstract(env):
    """Types of (state, obs) after reset and (state, time step) after step; nothing runs."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state, obs = jax.eval_shape(env.reset, key, env.spec.params)
    action = jax.eval_shape(lambda: random_action(env.spec, jax.random.key(0)))
    return (state, obs), jax.eval_shape(env.step, state, action, key)


def same(obs, other):
    return jax.tree.all(jax.tree.map(np.array_equal, obs, other))


def assert_fixed_point(env):
    (state, obs), (after, timestep) = abstract(env)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.leaves(state) == jax.tree.leaves(after)
    assert obs == timestep.obs == timestep.final_obs == env.spec.obs
    paid_apart = env.spec.num_agents > 1 and timestep.reward.shape != ()
    assert timestep.reward == jax.ShapeDtypeStruct((env.spec.num_agents,) if paid_apart else (), jnp.float32)
    assert timestep.terminated == timestep.truncated == jax.ShapeDtypeStruct((), jnp.bool_)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, timestep)))


def test_importing_envs_and_checking_a_name_imports_no_jax():
    code = "import envs, sys; envs.check_name('brax/ant'); print(sorted({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_are_those_of_the_packages():
    import brax.envs
    import gymnax.registration as registration
    from mujoco_playground import dm_control_suite, locomotion, manipulation

    from envs.probes import NAMES as probes

    classic = [n for n, f in registration._registry.items() if ".classic_control." in f.__module__]
    assert sorted(NAMES["brax"]) == sorted(brax.envs._envs)
    assert sorted(NAMES["gymnax"]) == sorted(classic)
    assert sorted(DM_CONTROL) == sorted(dm_control_suite.ALL_ENVS)
    assert sorted(LOCOMOTION) == sorted(locomotion.ALL_ENVS)
    assert sorted(MANIPULATION) == sorted(manipulation.ALL_ENVS)
    assert sorted(NAMES["probe"]) == sorted(probes)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("playground/CheetaRun", "playground/CheetahRun"), ("ant", "brax/ant"), ("braks/hopper", "brax/hopper")],
)
def test_a_misspelt_name_gets_the_close_ones(wrong, right):
    with pytest.raises(UserError, match=right):
        envs.check_name(wrong)


@pytest.mark.parametrize(
    ("name", "physics", "overrides", "message"),
    [
        ("probe/lqr", "mjxx", {}, "Did you mean mjx"),
        ("probe/lqr", "warp", {}, "warp.*not available for probe/lqr"),
        ("brax/ant", "warp", {}, "not available for brax/ant"),
        ("brax/ant", "mjx", {"backend": "spring"}, "contradicts"),
        ("brax/ant", "auto", {"backend": "sprng"}, "Did you mean spring"),
        ("brax/swimmer", "auto", {"backend": "spring"}, "it has generalized"),
        ("brax/fast", "auto", {"backend": "spring"}, "none at all"),
        ("brax/ant", "auto", {"helthy_reward": 1.0}, "Did you mean healthy_reward"),
        ("brax/ant", "auto", {"healthy_reward": "much"}, "healthy_reward = 'much'"),
        ("gymnax/Pendulum-v1", "auto", {"max_torqe": 1.0}, "Did you mean max_torque"),
        ("playground/CartpoleBalance", "auto", {"ctrl_d": 0.02}, "Did you mean ctrl_dt"),
        ("playground/CartpoleBalance", "auto", {"ctrl_dt": "slow"}, "ctrl_dt = 'slow'"),
        ("playground/CartpoleBalance", "auto", {"impl": "warp"}, "override 'impl' does not exist"),
        ("playground/CartpoleBalance", "auto", {"vision": True}, "Warp"),
        ("gymnax/Pendulum-v1", "auto", {"episode_length": -5}, "episode_length = -5"),
        ("gymnax/Pendulum-v1", "auto", {"episode_length": "long"}, "episode_length = 'long'"),
        ("probe/truncate_only", "auto", {"action_repeat": 0}, "action_repeat = 0"),
        ("probe/truncate_only", "auto", {"action_chunk": 0}, "action_chunk = 0"),
        ("gymnax/CartPole-v1", "auto", {"action_chunk": 2}, "action_chunk = 2 needs continuous actions"),
    ],
)
def test_what_cannot_be_had_is_said_plainly(name, physics, overrides, message):
    with pytest.raises(UserError, match=message):
        envs.make(name, physics, **overrides)


@sample
def test_reset_and_step_agree_in_shape_dtype_and_weak_type(name):
    assert_fixed_point(built(name)[0])


@sample
def test_the_key_decides_everything(name):
    def observations(key):
        return [x if i == 0 else x.final_obs for i, (_, x) in enumerate(play(name, 2, key))]

    once = observations(KEY)
    jax.tree.map(np.testing.assert_array_equal, once, observations(KEY))
    if name != "brax/fast":  # which starts where it always starts
        assert not same(once[0], observations(jax.random.key(4))[0])


@sample
def test_a_truncation_keeps_the_final_observation(name):
    steps = play(name, 3)
    last = steps[3][1]
    assert bool(last.truncated) and not bool(last.terminated)
    assert not bool(steps[2][1].truncated)
    assert same(last.obs, last.final_obs) and not same(last.final_obs, steps[0][1])


def test_a_termination_keeps_the_final_observation():
    env = envs.make("gymnax/CartPole-v1")
    step = jax.jit(env.step)
    state, obs = env.reset(KEY, env.spec.params)
    for _ in range(50):  # pushing one way only fells the pole at about the tenth step
        state, timestep = step(state, jnp.ones((), jnp.int32), KEY)
        if bool(timestep.terminated):
            break
    assert bool(timestep.terminated) and not bool(timestep.truncated)
    assert abs(float(timestep.final_obs[2])) > 12 * 2 * np.pi / 360


def test_pendulum_gets_its_torque_from_the_unit_box():
    env = envs.make("gymnax/Pendulum-v1")
    assert env.spec.action == Box((1,), low=(-2.0,), high=(2.0,)) and env.spec.episode_length == 200
    state, obs = env.reset(KEY, env.spec.params)
    theta, speed = np.arctan2(obs[1], obs[0]), obs[2]
    _, timestep = env.step(state, jnp.array([0.5]), KEY)  # a torque of 1
    np.testing.assert_allclose(timestep.reward, -(theta**2 + 0.1 * speed**2 + 0.001), rtol=1e-5)
    np.testing.assert_allclose(timestep.obs[2], speed + (15.0 * np.sin(theta) + 3.0) * 0.05, rtol=1e-5)


def test_an_override_of_gymnax_reaches_the_dynamics_and_the_params():
    env = envs.make("gymnax/Pendulum-v1", max_torque=3, g=0.0, episode_length=0)
    assert env.spec.action.high == (3.0,) and env.spec.episode_length is None
    assert env.spec.params.g == 0.0 and env.spec.params.max_torque.dtype == jnp.float32


def test_discrete_actions_are_counted():
    spec = envs.make("gymnax/CartPole-v1").spec
    assert spec.action == Discrete(2) and spec.episode_length == 500


class Scribbler:
    """Like brax's environments, writes its metrics into the dict of the state that it is given."""

    action_size = 1

    def reset(self, key):
        from brax.envs import State

        return State(None, jnp.zeros(1), jnp.zeros(()), jnp.zeros(()), {"speed": jnp.zeros(())})

    def step(self, state, action):
        state.metrics.update(speed=action[0])
        return state.replace(reward=action[0])


def test_brax_metrics_are_logged_and_the_argument_is_left_alone():
    from envs.brax import Brax

    env = Brax(Scribbler())
    state, _ = env.reset(KEY, ())
    _, timestep = env.step(state, jnp.ones(1), KEY)
    assert timestep.info == {"speed": 1.0} and state.metrics == {"speed": 0.0}


@pytest.mark.parametrize("backend", ["mjx", "spring", "positional", "generalized"])
def test_brax_has_its_backends(backend):
    assert_fixed_point(envs.make("brax/inverted_pendulum", backend=backend))


def test_brax_swimmer_gets_the_one_backend_that_it_has():
    assert_fixed_point(envs.make("brax/swimmer"))


def test_observations_may_be_a_dict():
    env = envs.make("brax/fast", obs_mode="dict_state", asymmetric_obs=True, action_repeat=2)
    assert_fixed_point(env)
    assert {k: v.shape for k, v in env.spec.obs.items()} == {"state": (2,), "privileged_state": (4,)}


def check_playground(name: str):
    env = envs.make(f"playground/{name}")
    assert_fixed_point(env)
    assert env.spec.episode_length == 1000 and env.spec.action_repeat == 1
    model = env.env.env.env.mj_model  # time limit, fixed point, adapter
    np.testing.assert_array_equal(model.actuator_ctrlrange, np.tile([-1.0, 1.0], (model.nu, 1)))
    assert model.actuator_ctrllimited.all()


@pytest.mark.parametrize("name", ["CartpoleSwingupSparse", "CheetahRun", "ReacherHard"])
def test_a_playground_task_is_a_fixed_point_with_controls_in_the_unit_box(name):
    check_playground(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", DM_CONTROL)
def test_every_playground_task_is_a_fixed_point_with_controls_in_the_unit_box(name):
    check_playground(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES["brax"])
def test_every_brax_environment_is_a_fixed_point(name):
    assert_fixed_point(envs.make(f"brax/{name}"))


def test_building_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    envs.make("playground/CheetahRun", episode_length=5)
    assert list(tmp_path.iterdir()) == []


def test_robot_tasks_without_models_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("something was fetched"))
    monkeypatch.setenv("RLX_MENAGERIE_PATH", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="absent is no directory.*network.*RLX_MENAGERIE_PATH"):
        envs.make("playground/Go1JoystickFlatTerrain")
    with pytest.raises(UserError, match="Go1JoystickFlatTerrain cannot be built"):
        envs.make("playground/Go1JoystickFlatTerrain", menagerie_path=str(tmp_path))


def test_the_commit_of_the_models_is_the_one_playground_names():
    from mujoco_playground._src import mjx_env

    from envs.playground import MENAGERIE_COMMIT

    assert MENAGERIE_COMMIT == mjx_env.MENAGERIE_COMMIT_SHA


OWN = """
    import jax, jax.numpy as jnp
    from rlx.types import Box, Spec, TimeStep

    class Line:
        def __init__(self, speed):
            self.speed = speed
            self.spec = Spec(jax.ShapeDtypeStruct((1,), jnp.float32), Box((1,)))

        def reset(self, key, params):
            return jnp.zeros(1), jnp.zeros(1)

        def step(self, state, action, key):
            state, never = state + self.speed * action, jnp.zeros((), bool)
            return state, TimeStep(state, state[0], never, never, state, {})

    def make(speed=1.0):
        return Line(speed)

    def nothing():
        return 7
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "envs").mkdir()  # beside the file: must hide nothing
    (tmp_path / "envs" / "__init__.py").write_text("raise RuntimeError('the wrong envs')\n")
    path = tmp_path / "line.py"
    path.write_text(textwrap.dedent(OWN))
    return path


def test_own_work_takes_its_arguments_and_the_common_overrides(own):
    env = envs.make(f"{own}:make", speed=2, episode_length=4, action_repeat=3)
    state, _ = env.reset(KEY, ())
    _, timestep = env.step(state, jnp.ones(1), KEY)
    assert timestep.reward == 2.0 + 4.0 + 6.0 and env.spec.episode_length == 4


def test_chunks_go_around_repeats_and_both_around_the_time_limit(own):
    env = envs.make(f"{own}:make", speed=2, episode_length=5, action_repeat=2, action_chunk=2)
    state, _ = env.reset(KEY, ())
    state, first = env.step(state, jnp.array([1.0, -1.0]), KEY)
    _, second = env.step(state, jnp.array([1.0, -1.0]), KEY)
    assert (first.reward, first.obs, first.info["steps"]) == (2.0 + 4.0 + 2.0 + 0.0, 0.0, 4.0)
    assert (second.reward, second.obs, second.info["steps"]) == (2.0, 2.0, 1.0)
    assert not first.truncated and second.truncated and not second.terminated


@pytest.mark.parametrize("name", ["brax/fast", "gymnax/Pendulum-v1", "playground/CartpoleBalance", "probe/lqr"])
def test_every_suite_takes_actions_in_chunks(name):
    one, env = envs.make(name), envs.make(name, action_chunk=3)
    assert env.spec.action.shape == (3 * one.spec.action.shape[0],) and env.spec.name == name
    assert (env.spec.action_chunk, env.spec.action_repeat) == (3, 3 * one.spec.action_repeat)
    assert env.spec.episode_length == one.spec.episode_length
    assert_fixed_point(env)


@pytest.mark.parametrize(
    ("function", "overrides", "message"),
    [
        ("mak", {}, "Did you mean make"),
        ("nothing", {}, "returned int, which lacks 'spec'"),
        ("make", {"sped": 1.0}, "Did you mean speed"),
    ],
)
def test_own_work_that_is_wrong_is_named(own, function, overrides, message):
    with pytest.raises(UserError, match=message):
        envs.make(f"{own}:{function}", **overrides)


def test_own_work_that_is_missing_is_named():
    with pytest.raises(UserError, match="no_such.py' does not exist"):
        envs.make("no_such.py:make")
    with pytest.raises(UserError, match="no module 'no_such_module'"):
        envs.make("no_such_module:make")
