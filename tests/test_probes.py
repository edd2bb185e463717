"""Probes: their dynamics by hand, and the linear-quadratic optimum against simulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import probes
from envs.names import PROBE
from rlx.environment import random_action
from rlx.types import Discrete, UserError

VALUE_PROBES = (
    "constant_reward",
    "obs_reward",
    "delayed_reward",
    "truncate_only",
    "terminate_only",
    "final_code",
    "nan",
)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree)


def episode(env, action=None, seed=0):
    """One episode: observations [T + 1, d] (the first one and all that followed), time steps stacked [T]."""
    key = jax.random.key(seed)
    state, obs = env.reset(key, env.spec.params)
    if action is None:
        action = jnp.zeros((), jnp.int32) if isinstance(env.spec.action, Discrete) else jnp.zeros(1)
    observations, timesteps = [obs], []
    for step_key in jax.random.split(key, env.spec.episode_length):
        state, timestep = env.step(state, action, step_key)
        observations.append(timestep.obs)
        timesteps.append(timestep)
    return np.stack(observations), jax.tree.map(lambda *xs: np.stack(xs), *timesteps)


def seed_of_draw(env, sign):
    """A seed whose episode draws `sign`."""
    return next(s for s in range(50) if env.reset(jax.random.key(s), ())[0].draw == sign)


def test_names_are_those_that_the_registry_lists():
    assert sorted(probes.NAMES) == sorted(PROBE)


@pytest.mark.parametrize("name", probes.NAMES)
def test_step_returns_the_types_that_reset_returned_and_the_spec_promises(name):
    env = probes.make(name)
    key = jax.random.key(0)
    state, obs = env.reset(key, env.spec.params)
    action = random_action(env.spec, key)
    next_state, timestep = env.step(state, action, key)
    assert types(next_state) == types(state)
    assert types(timestep.obs) == types(timestep.final_obs) == types(obs)
    assert (obs.shape, obs.dtype) == (env.spec.obs.shape, env.spec.obs.dtype)
    assert types(timestep.reward) == ((), jnp.float32, False)
    assert types(timestep.terminated) == types(timestep.truncated) == ((), jnp.bool_, False)
    _, again = jax.jit(env.step)(next_state, action, key)
    assert types(again) == types(timestep)


@pytest.mark.parametrize("name", probes.NAMES)
def test_obs_is_final_obs_and_equal_keys_give_equal_episodes(name):
    env = probes.make(name)
    observations, timesteps = episode(env)
    np.testing.assert_array_equal(timesteps.obs, timesteps.final_obs)
    np.testing.assert_array_equal(observations, episode(env)[0])


@pytest.mark.parametrize("name", ["obs_reward", "obs_action_reward", "truncate_only", "lqr", "memory"])
def test_other_keys_give_other_episodes(name):
    env = probes.make(name)
    first = jax.vmap(lambda key: env.reset(key, ())[1])(jax.random.split(jax.random.key(0), 64))
    assert len(np.unique(first, axis=0)) > 1


@pytest.mark.parametrize("name", probes.NAMES)
def test_every_episode_ends_once_and_at_its_length(name):
    terminated = name not in ("truncate_only", "final_code", "nan", "lqr")
    env = probes.make(name)
    _, timesteps = episode(env)
    last = np.arange(env.spec.episode_length) == env.spec.episode_length - 1
    np.testing.assert_array_equal(timesteps.terminated, last & terminated)
    np.testing.assert_array_equal(timesteps.truncated, last & (not terminated))


@pytest.mark.parametrize("name", VALUE_PROBES)
def test_worlds_without_choice_take_either_kind_of_action_and_ignore_it(name):
    box, discrete = probes.make(name), probes.make(name, discrete=True)
    assert discrete.spec.action == Discrete(2)
    for x, y in zip(episode(box, jnp.full(1, 0.3)), episode(discrete, jnp.ones((), jnp.int32)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)


def test_constant_reward_pays_one():
    observations, timesteps = episode(probes.make("constant_reward"))
    assert observations.tolist() == [[0.0], [0.0]]
    assert timesteps.reward.tolist() == [1.0]


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_obs_reward_pays_what_it_shows(sign):
    env = probes.make("obs_reward")
    observations, timesteps = episode(env, seed=seed_of_draw(env, sign))
    assert observations[0].tolist() == [sign]
    assert timesteps.reward.tolist() == [sign]


def test_delayed_reward_pays_at_the_second_step():
    observations, timesteps = episode(probes.make("delayed_reward"))
    assert observations[:2].tolist() == [[0.0], [1.0]]
    assert timesteps.reward.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("action", "reward"), [(0, -1.0), (1, 1.0)])
def test_action_reward_pays_for_action_one(action, reward):
    assert episode(probes.make("action_reward"), jnp.int32(action))[1].reward.tolist() == [reward]


@pytest.mark.parametrize(("sign", "action", "reward"), [(1, 1, 1), (1, 0, -1), (-1, 0, 1), (-1, 1, -1)])
def test_obs_action_reward_pays_for_the_action_that_matches(sign, action, reward):
    env = probes.make("obs_action_reward")
    observations, timesteps = episode(env, jnp.int32(action), seed_of_draw(env, sign))
    assert observations[0].tolist() == [sign]
    assert timesteps.reward.tolist() == [reward]


def test_continuous_variants_pay_the_negative_squared_distance():
    assert episode(probes.make("action_reward_continuous"), jnp.full(1, 0.25))[1].reward.tolist() == [-0.0625]
    env = probes.make("obs_action_reward_continuous")
    for sign, reward in [(1, -0.0625), (-1, -0.5625)]:
        timesteps = episode(env, jnp.full(1, 0.25), seed_of_draw(env, sign))[1]
        assert timesteps.reward.tolist() == [reward]


@pytest.mark.parametrize(("action", "reward"), [(0.8, 1.0), (-0.8, 1.0), (1.0, np.exp(-1)), (-0.6, np.exp(-1)), (0, 0)])
def test_two_modes_pays_alike_on_either_side_and_nothing_between(action, reward):
    observations, timesteps = episode(probes.make("two_modes"), jnp.full(1, action, jnp.float32))
    assert observations.tolist() == [[0.0], [0.0]]
    np.testing.assert_allclose(timesteps.reward, [reward], rtol=1e-5, atol=2e-5)


def test_two_modes_pays_uniform_actions_what_it_says():
    env = probes.make("two_modes")
    actions = jnp.linspace(-1.0, 1.0, 20_001)
    assert abs(jax.vmap(lambda a: env.reward(None, a[None]))(actions).mean() - 0.327) < 1e-3


def test_the_modes_of_two_modes_can_be_moved():
    env = probes.make("two_modes", mode=0.5, width=0.1)
    np.testing.assert_allclose(env.reward(None, jnp.asarray([-0.6])), np.exp(-1), rtol=1e-5)
    for wrong in ({"mode": 1.5}, {"mode": 0.0}, {"width": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} = "):
            probes.make("two_modes", **wrong)


def test_truncate_only_pays_one_and_turns_by_a_tenth_of_a_circle():
    observations, timesteps = episode(probes.make("truncate_only"))
    assert timesteps.reward.tolist() == [1.0] * 10
    np.testing.assert_allclose(np.sum(observations**2, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.sum(observations[1:] * observations[:-1], axis=1), np.cos(np.pi / 5), rtol=1e-5)


def test_terminate_only_pays_one_and_shows_the_time():
    observations, timesteps = episode(probes.make("terminate_only", episode_length=3))
    assert timesteps.reward.tolist() == [1.0] * 3
    assert observations.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(("action", "side"), [(0.5, 1.0), (0.0, 1.0), (-0.5, -1.0)])
def test_the_ways_of_the_fork_differ_in_their_ending_alone(action, side):
    observations, timesteps = episode(probes.make("fork"), jnp.full(1, action))
    assert observations.tolist() == [[0.0], [side], [side]]
    assert timesteps.reward.tolist() == [0.0, 1.0]
    assert timesteps.terminated.tolist() == [False, side > 0]
    assert timesteps.truncated.tolist() == [False, side < 0]


def test_the_second_action_at_the_fork_changes_nothing():
    env = probes.make("fork", discrete=True)
    state, _ = env.reset(jax.random.key(0), ())
    state, _ = env.step(state, jnp.int32(0), jax.random.key(0))
    one, other = (env.step(state, jnp.int32(action), jax.random.key(0))[1] for action in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert one.obs.tolist() == [-1.0] and bool(one.truncated)


def test_final_code_marks_the_final_observation_alone():
    observations, timesteps = episode(probes.make("final_code"))
    assert observations.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 7]]
    assert timesteps.reward.tolist() == [0.0] * 5


@pytest.mark.parametrize(("cue", "action", "reward"), [(1, 1, 1), (1, 0, -1), (-1, 0, 1), (-1, 1, -1)])
def test_memory_shows_the_cue_once_and_pays_the_answer_at_the_question(cue, action, reward):
    env = probes.make("memory", delay=2)
    observations, timesteps = episode(env, jnp.int32(action), seed_of_draw(env, cue))
    assert observations.tolist() == [[cue, 0], [0, 0], [0, 0], [0, 1], [0, 0]]
    assert timesteps.reward.tolist() == [0, 0, 0, reward]


def test_nan_comes_at_its_step_in_its_share_of_episodes():
    sure = episode(probes.make("nan", nan_step=3, probability=1.0))[0]
    assert np.isnan(sure[:, 0]).tolist() == [False] * 3 + [True] * 8
    np.testing.assert_allclose(episode(probes.make("nan", probability=0.0))[0][:, 0], np.arange(11) / 10, rtol=1e-6)
    env = probes.make("nan", nan_step=1)

    def first_step_is_nan(key):
        _, timestep = env.step(env.reset(key, ())[0], jnp.zeros(1), key)
        return jnp.isnan(timestep.obs[0])

    share = jax.vmap(first_step_is_nan)(jax.random.split(jax.random.key(0), 10_000)).mean()
    assert abs(share - 0.1) < 0.015  # 5 standard errors


def test_lqr_step_is_the_linear_system_and_its_cost():
    env = probes.make("lqr", noise=0.0)
    state, _ = env.reset(jax.random.key(0), ())
    state = state._replace(x=jnp.array([1.0, 2.0]))
    _, timestep = env.step(state, jnp.full(1, 0.5), jax.random.key(0))
    # u = 4: position 1 + 0.1 * 2 + 0.005 * 4, velocity 0.9 * 2 + 0.1 * 4; cost 1 + 0.1 * 4 + 0.1 * 16
    np.testing.assert_allclose(timestep.obs, [1.22, 2.2], rtol=1e-6)
    np.testing.assert_allclose(timestep.reward, -3.0, rtol=1e-6)
    a, b, q, r = env.matrices()
    x, u = np.array([1.0, 2.0]), np.array([4.0])
    np.testing.assert_allclose(a @ x + b @ u, timestep.obs, rtol=1e-6)
    np.testing.assert_allclose(x @ q @ x + u @ r @ u, -timestep.reward, rtol=1e-6)


def test_lqr_optimum_of_two_steps_is_the_one_worked_out_by_hand():
    # The last control is wasted, so u_1 = 0. The first one moves x_1 = (p + 0.1 v + 0.005 u, 0.9 v + 0.1 u), of which
    # p_1^2 + 0.1 v_1^2 + 0.1 u^2 is paid: u = -(0.005 (p + 0.1 v) + 0.009 v) / (0.005^2 + 0.1 * 0.1^2 + 0.1).
    gains, expected = probes.lqr_optimum(probes.Lqr(episode_length=2))
    denominator = 0.000025 + 0.001 + 0.1
    np.testing.assert_allclose(gains[:, 0], [[0.005 / denominator, 0.0095 / denominator], [0.0, 0.0]], atol=1e-12)
    # Without control: (1 + 0.001) + (1 + 0.01 * 0.01 + 0.1 * (0.81 * 0.01 + 0.0025)); control saves
    # (cov-weighted numerator^2) / denominator.
    free = 1.001 + 1 + 0.0001 + 0.1 * (0.0081 + 0.0025)
    saved = (0.005**2 + 0.01 * 0.0095**2) / denominator
    np.testing.assert_allclose(expected, -(free - saved), rtol=1e-12)


@functools.partial(jax.jit, static_argnums=0)
def simulate(env, gains):
    """Mean return and share of saturated actions of u = -K_t x, K [T, 2]."""

    def one(key):
        reset_key, step_key = jax.random.split(key)

        def step(state, inputs):
            gain, key = inputs
            action = -(gain * state.x).sum()[None] / env.scale
            state, timestep = env.step(state, action, key)
            return state, (timestep.reward, jnp.abs(action[0]) > 1)

        state, _ = env.reset(reset_key, ())
        _, (reward, saturated) = jax.lax.scan(step, state, (gains, jax.random.split(step_key, env.length)))
        return reward.sum(), saturated.mean()

    returns, saturated = jax.vmap(one)(jax.random.split(jax.random.key(0), 20_000))
    return returns.mean(), saturated.mean()


def test_lqr_optimum_is_what_its_gains_earn_and_better_than_other_gains():
    env = probes.Lqr()
    gains, expected = probes.lqr_optimum(env)
    gains = jnp.asarray(gains[:, 0], jnp.float32)
    best, saturated = simulate(env, gains)
    assert abs(best / expected - 1) < 0.02  # 2 standard errors
    assert saturated < 1e-3
    # The same episodes for all, so that differences far below the spread of the returns show.
    for factor in ([0.8, 1.0], [1.2, 1.0], [1.0, 0.8], [1.0, 1.2]):
        assert simulate(env, gains * jnp.array([factor]))[0] < best
    stationary = jnp.broadcast_to(gains[:1], gains.shape)
    assert best * 1.005 < simulate(env, stationary)[0] < best
    close = stationary * jnp.array([[1.03, 0.97]])
    assert best * 1.01 < simulate(env, close)[0] < best
    assert simulate(env, jnp.zeros_like(gains))[0] < 2 * best


def test_overrides_reach_the_probe():
    assert probes.make("truncate_only", episode_length=4).spec.episode_length == 4
    assert probes.make("memory", delay=1).spec.episode_length == 3


def test_an_unknown_name_or_override_is_a_user_error_that_says_what_exists():
    with pytest.raises(UserError, match="Did you mean lqr"):
        probes.make("lqrr")
    with pytest.raises(UserError, match="'length' does not exist.*episode_length"):
        probes.make("final_code", length=3)
    with pytest.raises(UserError, match="Allowed: action_chunk, action_repeat, drag, episode_length, noise, scale"):
        probes.make("lqr", horizon=3)


@pytest.mark.parametrize(
    ("name", "override"),
    [("memory", {"delay": -1}), ("nan", {"probability": 2.0}), ("nan", {"nan_step": 0}), ("lqr", {"scale": 0.0}),
     ("truncate_only", {"episode_length": 0})],
)  # fmt: skip
def test_impossible_values_are_user_errors_that_name_the_field(name, override):
    with pytest.raises(UserError, match=f"{next(iter(override))} = "):
        probes.make(name, **override)
