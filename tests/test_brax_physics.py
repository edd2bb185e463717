"""brax's environments on the native engine: against brax's own pipeline on MJX, and against MuJoCo itself."""

from __future__ import annotations

import functools
import inspect

import brax.envs
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from brax.envs.base import PipelineEnv
from mujoco.batch import Batch

import envs
from envs.adapter import building
from envs.brax import BraxMJX, adapt, choose
from envs.brax_pipeline import model_of, simulate_natively
from envs.names import NAMES
from envs.physics import raw
from envs.physics.native import NativeData
from rlx.environment import random_action
from rlx.errors import UserError

KEY = jax.random.key(0)
MJX = [name for name in NAMES["brax"] if name not in ("fast", "swimmer")]
NUM_STATES = 100
# What makes up a state; the rest MJX computes anew.
STATE = ("time", "qpos", "qvel", "act", "ctrl", "qacc_warmstart", "qfrc_applied", "xfrc_applied", "q", "qd", "x", "xd")


@functools.cache
def adapter(name: str, engine: str) -> BraxMJX:
    """The adapter alone, without time limit and fixed types."""
    env = envs.make(f"brax/{name}", engine)
    while not isinstance(env, BraxMJX):
        env = env.env
    return env


def play(env, key, length, most):
    """The state after `length` of at most `most` steps under random actions."""
    state, _ = env.reset(key, {})

    def step(state, inputs):
        i, key = inputs
        after, _ = env.step(state, random_action(env.spec, key), key)
        return jax.tree.map(lambda x, y: jnp.where(i < length, x, y), after, state), None

    return jax.lax.scan(step, state, (jnp.arange(most), jax.random.split(key, most)))[0]


def one_step_of_both(native, xla):
    """What one step gives, natively and on MJX, from the same states of native episodes, 0 to 99 steps old."""
    keys = jax.random.split(KEY, NUM_STATES)
    states = jax.jit(jax.vmap(lambda k, n: play(native, k, n, NUM_STATES)))(keys, jnp.arange(NUM_STATES))
    pipeline = states.task.pipeline_state
    other = jax.jit(jax.vmap(lambda key: xla.reset(key, {})[0]))(keys).task.pipeline_state
    other = other.replace(**{field: getattr(pipeline, field) for field in STATE})
    others = states._replace(task=states.task.replace(pipeline_state=other))
    actions = jax.vmap(functools.partial(random_action, native.spec))(keys)
    return [jax.jit(jax.vmap(env.step))(start, actions, keys) for env, start in ((native, states), (xla, others))]


def check_parity(native, xla, median, nine_of_ten, worst):
    """Largest errors of the median state, of nine states of ten, of all; relative to the largest value, or 1."""
    (after, timestep), (other, reference) = one_step_of_both(native, xla)
    ours, theirs = (
        {field: getattr(state.task.pipeline_state, field) for field in ("q", "qd", "x", "xd")} | {"timestep": step}
        for state, step in ((after, timestep), (other, reference))
    )

    def compare(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).reshape(NUM_STATES, -1).max(axis=1) / max(1.0, np.abs(y).max())
        found = np.quantile(error, (0.5, 0.9, 1.0))
        assert (found <= (median, nine_of_ten, worst)).all(), f"{jax.tree_util.keystr(path)}: {found}"

    jax.tree_util.tree_map_with_path(compare, ours, theirs)


# Free motion differs by the rounding of float32 alone, 1e-6 in a step of two substeps; where a pendulum is at its stop,
# by the solver's tolerance as well: 4e-5 was the worst.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["inverted_pendulum", "reacher"])
def test_one_step_is_that_of_brax_on_mjx(name):
    check_parity(adapter(name, "mujoco"), adapter(name, "mjx"), 2e-6, 1e-5, 3e-4)


# Four or five substeps with contacts. The solvers agree where they converge. Ant and humanoid allow them one iteration,
# and a state in ten, at a hard impact, shows it: the worst of ant is off by 0.3, after 30 iterations by 3e-6 (below).
# Humanoidstandup allows eight: its worst was 1e-2.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "median", "nine_of_ten", "worst"),
    [
        ("inverted_double_pendulum", 2e-6, 1e-5, 1e-4),
        ("hopper", 2e-6, 1e-5, 1e-4),
        ("walker2d", 1e-5, 3e-5, 3e-4),
        ("halfcheetah", 1e-5, 1e-4, 1e-3),
        ("pusher", 2e-6, 1e-5, 1e-4),
        ("ant", 1e-5, 1e-3, 1.0),
        ("humanoid", 1e-4, 1e-2, 1.0),
        ("humanoidstandup", 2e-6, 1e-5, 3e-2),
    ],
)
def test_one_step_with_contacts_is_that_of_brax_on_mjx(name, median, nine_of_ten, worst):
    check_parity(adapter(name, "mujoco"), adapter(name, "mjx"), median, nine_of_ten, worst)


def converging_ant(engine):
    with building("brax/ant"):
        env = brax.envs.get_environment("ant", backend="mjx")
        env.sys = env.sys.tree_replace({"opt.iterations": 30, "opt.ls_iterations": 50, "opt.tolerance": 0.0})
        return adapt("brax/ant", env, engine, {})


@pytest.mark.slow
def test_one_step_of_ant_is_that_of_brax_on_mjx_once_the_solver_may_converge():
    check_parity(converging_ant("mujoco"), converging_ant("mjx"), 2e-6, 1e-5, 1e-4)


@pytest.mark.parametrize("name", MJX)
def test_every_environment_of_backend_mjx_steps_natively(name):
    env = envs.make(f"brax/{name}", "mujoco")
    assert env.spec.physics == "mujoco"

    @jax.jit
    @jax.vmap
    def two_steps(key):
        def step(state, key):
            state, timestep = env.step(state, random_action(env.spec, key), key)
            return state, timestep

        return jax.lax.scan(step, env.reset(key, env.spec.params)[0], jax.random.split(key, 2))[1]

    timestep = two_steps(jax.random.split(KEY, 3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((timestep.obs, timestep.reward, timestep.info)))
    assert not timestep.info["diverged"].any()
    assert (np.asarray(timestep.obs[:, 0]) != np.asarray(timestep.obs[:, 1])).any()


def test_the_raw_simulator_takes_the_substeps_of_native_physics_and_stands_beside_no_other(monkeypatch):
    batches = []
    monkeypatch.setattr(raw, "Batch", lambda *arguments: batches.append(Batch(*arguments)) or batches[-1])
    env = envs.make("brax/inverted_pendulum", "mujoco")
    roll = raw.raw_rollout(env, 4)
    assert roll is not None
    roll(3)
    task = adapter("inverted_pendulum", "mujoco").env
    assert task._n_frames > 1
    np.testing.assert_allclose(batches[0].bind("time"), 3 * task._n_frames * float(task.sys.opt.timestep), rtol=1e-6)
    assert raw.raw_rollout(envs.make("brax/inverted_pendulum", "mjx"), 4) is None
    assert raw.raw_rollout(envs.make("brax/fast"), 4) is None
    adapted = env
    while not isinstance(adapted, BraxMJX):
        adapted = adapted.env
    monkeypatch.setattr(adapted, "substeps", None)  # an environment of a user's that has an engine and no more
    assert raw.raw_rollout(env, 4) is None


@pytest.mark.parametrize("name", MJX)
def test_the_model_simulated_is_that_of_the_environment(name):
    """Of ant and humanoid brax changes solver options after loading."""
    sys = adapter(name, "mujoco").env.sys
    model = model_of(sys)
    assert model.opt.iterations == sys.opt.iterations and model.opt.disableflags == sys.opt.disableflags
    assert model.opt.ls_iterations == sys.opt.ls_iterations and model.opt.solver == int(sys.opt.solver)
    np.testing.assert_allclose(model.opt.timestep, sys.opt.timestep, rtol=1e-6)
    for field in ("body_mass", "body_subtreemass", "actuator_gear", "actuator_gainprm", "dof_damping", "geom_friction"):
        np.testing.assert_allclose(getattr(model, field), getattr(sys, field), rtol=1e-6)


def test_what_an_environment_changes_after_loading_is_simulated_and_its_own_model_left_alone():
    sys = adapter("inverted_pendulum", "mujoco").env.sys
    changed = sys.tree_replace({"opt.timestep": 0.005, "actuator_gear": 2.0 * sys.actuator_gear})
    model = model_of(changed)
    assert model.opt.timestep == pytest.approx(0.005) and model.actuator_gear[0, 0] == 200.0
    assert sys.mj_model.opt.timestep == 0.02 and sys.mj_model.actuator_gear[0, 0] == 100.0
    unchanged = model_of(sys)
    assert unchanged.opt.timestep == 0.02  # the double, not the float32 nearest to it


def test_poses_and_velocities_of_bodies_are_those_of_mujoco():
    env = adapter("ant", "mujoco")
    state, _ = jax.jit(env.reset)(KEY, {})
    pipeline, model = state.task.pipeline_state, model_of(env.env.sys)
    data = mujoco.MjData(model)
    data.qpos, data.qvel = pipeline.q, pipeline.qd
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(pipeline.x.pos, data.xpos[1:], atol=1e-6)
    np.testing.assert_allclose(pipeline.x.rot, data.xquat[1:], atol=1e-6)
    velocity = np.zeros(6)
    for body in range(1, model.nbody):
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, body, velocity, 0)
        np.testing.assert_allclose(pipeline.xd.ang[body - 1], velocity[:3], atol=1e-6)
        np.testing.assert_allclose(pipeline.xd.vel[body - 1], velocity[3:], atol=1e-6)


def test_all_frames_are_one_call_of_the_engine_and_equal_a_loop_over_mujoco(monkeypatch):
    env = adapter("ant", "mujoco")
    calls = []
    step = env.engine.step
    monkeypatch.setattr(env.engine, "step", lambda *args: calls.append(args[-1]) or step(*args))
    state, _ = jax.jit(env.reset)(KEY, {})
    action = jnp.linspace(-1.0, 1.0, 8)
    after, _ = jax.jit(lambda *args: env.step(*args))(state, action, KEY)
    assert calls == [5]
    assert isinstance(after.task.pipeline_state._impl, NativeData)
    model = model_of(env.env.sys)
    data = mujoco.MjData(model)
    start = state.task.pipeline_state
    data.qpos, data.qvel, data.qacc_warmstart, data.ctrl = start.q, start.qd, start.qacc_warmstart, action
    for _ in range(5):
        mujoco.mj_step(model, data)
    np.testing.assert_array_equal(after.task.pipeline_state.q, data.qpos.astype(np.float32))
    np.testing.assert_array_equal(after.task.pipeline_state.qd, data.qvel.astype(np.float32))


def test_brax_still_simulates_by_the_two_functions_that_are_replaced():
    parameters = {
        name: list(inspect.signature(getattr(PipelineEnv, name)).parameters)
        for name in vars(PipelineEnv)
        if name.startswith("pipeline_")
    }
    assert parameters == {
        "pipeline_init": ["self", "q", "qd", "act", "ctrl"],
        "pipeline_step": ["self", "pipeline_state", "action"],
    }
    native, xla = adapter("inverted_pendulum", "mujoco").env, adapter("inverted_pendulum", "mjx").env
    assert native.pipeline_step.__module__ == "envs.brax_pipeline"
    assert xla.pipeline_step.__func__ is PipelineEnv.pipeline_step  # nothing is replaced but in that object


class Moved:
    def pipeline_init(self, q, qd):
        pass

    def pipeline_step(self, pipeline_state, action):
        pass


def test_a_brax_that_moved_its_functions_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="other parameters of pipeline_init"):
        simulate_natively(Moved(), adapter("inverted_pendulum", "mujoco").engine)
    env = adapter("inverted_pendulum", "mujoco")
    with monkeypatch.context() as patch:
        patch.delattr(env.env, "pipeline_init")  # brax's own again, as if it went by another name
        with pytest.raises(RuntimeError, match="simulates by other functions"):
            jax.eval_shape(env.reset, KEY, {})


def test_contacts_are_refused_on_the_native_engine():
    env = adapter("ant", "mujoco")
    with pytest.raises(UserError, match="contact"):
        jax.eval_shape(lambda key: env.reset(key, {})[0].task.pipeline_state.contact.dist, KEY)


@pytest.mark.parametrize("engine", ["mujoco", pytest.param("mjx", marks=pytest.mark.slow)])
def test_a_simulation_that_diverges_ends_its_episode(engine):
    env = adapter("inverted_pendulum", engine)
    state, obs = jax.jit(env.reset)(KEY, {})
    pipeline = state.task.pipeline_state
    broken = pipeline.replace(qvel=jnp.full(2, jnp.nan), qd=jnp.full(2, jnp.nan))
    _, timestep = jax.jit(env.step)(state._replace(task=state.task.replace(pipeline_state=broken)), jnp.zeros(1), KEY)
    assert bool(timestep.truncated) and not bool(timestep.terminated)
    assert timestep.reward == 0 and timestep.info["diverged"] == 1
    np.testing.assert_array_equal(timestep.final_obs, obs)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("ant", "auto", None), ("mjx", "mujoco")),
        (("ant", "mjx", None), ("mjx", "mjx")),
        (("ant", "mujoco", "mjx"), ("mjx", "mujoco")),
        (("ant", "auto", "spring"), ("spring", "")),
        (("swimmer", "auto", None), ("generalized", "")),
        (("fast", "auto", None), (None, "")),
    ],
)
def test_the_engine_of_an_environment_on_a_cpu(arguments, expected):
    assert choose(*arguments) == expected


def test_on_a_gpu_with_warp_auto_is_mjx(monkeypatch):
    monkeypatch.setattr("envs.physics.resolve", lambda physics: "warp")
    assert choose("ant", "auto", None) == ("mjx", "mjx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ant", "warp", None), "warp.*not available for brax/ant"),
        (("ant", "mujoco", "spring"), "contradicts"),
        (("swimmer", "mujoco", None), "no backend 'mjx'; it has generalized"),
        (("fast", "mujoco", None), "none at all"),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        choose(*arguments)


def test_threads_are_an_override_of_the_backend_mjx():
    one = envs.make("brax/inverted_pendulum", "mujoco", physics_threads=1)
    assert one.spec.physics == "mujoco"
    with pytest.raises(UserError, match="physics_threads needs the backend 'mjx'"):
        envs.make("brax/inverted_pendulum", backend="spring", physics_threads=1)
