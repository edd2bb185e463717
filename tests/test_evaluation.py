"""Evaluation: N instances, each counted once from reset to its first end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithm import Plan
from rlx.evaluation import make_evaluate, make_player
from rlx.types import Box, Spec, TimeStep, UserError
from tests.worlds import Counter, constant_algorithm


class RandomLength:
    """Ends after a number of steps drawn at reset, 1 to 5; a reward of 1 a step, NaN behind the end."""

    spec = Spec(obs=jax.ShapeDtypeStruct((), jnp.float32), action=Box((1,)), episode_length=10)

    def reset(self, key, params):
        length = jax.random.randint(key, (), 1, 6)
        return (jnp.zeros((), jnp.int32), length), length.astype(jnp.float32)

    def step(self, state, action, key):
        t, length = state[0] + 1, state[1]
        reward = jnp.where(t > length, jnp.nan, 1.0)
        obs = length.astype(jnp.float32)
        return (t, length), TimeStep(obs, reward, t == length, jnp.zeros((), bool), obs, {})


def evaluate(env, episodes=16, mode="greedy", **kwargs):
    algorithm = constant_algorithm(Plan(1, 1, 1))
    run = jax.jit(make_evaluate(env, algorithm, episodes, mode, **kwargs))
    return lambda key: run(algorithm.init(jax.random.key(0)), key)


def test_each_instance_counts_once_until_its_first_end():
    result = evaluate(RandomLength(), 64)(jax.random.key(0))
    np.testing.assert_array_equal(result.returns, result.lengths)  # nothing is added behind the end, NaN least of all
    assert set(np.asarray(result.lengths).tolist()) == {1, 2, 3, 4, 5}


def test_truncation_ends_an_episode_too():
    result = evaluate(Counter(3, "truncated"))(jax.random.key(0))
    np.testing.assert_array_equal(result.returns, np.full(16, 6.0))
    np.testing.assert_array_equal(result.lengths, np.full(16, 3.0))


def test_same_key_same_episodes():
    run = evaluate(RandomLength(), mode="sample")
    np.testing.assert_array_equal(run(jax.random.key(1)).lengths, run(jax.random.key(1)).lengths)
    assert (np.asarray(run(jax.random.key(1)).lengths) != np.asarray(run(jax.random.key(2)).lengths)).any()


def test_an_episode_without_end_needs_a_cut():
    env = Counter(1000)
    env.spec = env.spec.__class__(obs=env.spec.obs, action=env.spec.action)
    with pytest.raises(UserError, match="max_decisions"):
        evaluate(env)
    assert float(evaluate(env, max_decisions=4)(jax.random.key(0)).lengths[0]) == 4


class Fragile(RandomLength):
    """Every episode of one step diverges in it; NaN behind the end."""

    def step(self, state, action, key):
        (t, length), timestep = super().step(state, action, key)
        diverged = jnp.where(t > length, jnp.nan, ((t == 1) & (length == 1)).astype(jnp.float32))
        return (t, length), timestep._replace(info={"diverged": diverged})


def test_episodes_whose_simulation_diverged_are_told_of_where_the_environment_tells():
    result = evaluate(Fragile(), 64)(jax.random.key(0))
    np.testing.assert_array_equal(result.diverged, result.lengths == 1)
    assert 0 < result.diverged.sum() < 64
    assert evaluate(RandomLength(), 4)(jax.random.key(0)).diverged is None


class PaidApart(Counter):
    """Two agents, of whom the second is paid twice what the first is."""

    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return state, timestep._replace(reward=timestep.reward * jnp.array([1.0, 2.0]))


def test_agents_that_are_paid_apart_have_returns_of_their_own():
    result = evaluate(PaidApart(3), 5)(jax.random.key(0))
    np.testing.assert_array_equal(result.agent_returns, np.tile([6.0, 12.0], (5, 1)))
    np.testing.assert_array_equal(result.returns, np.full(5, 18.0))
    assert evaluate(Counter(3), 5)(jax.random.key(0)).agent_returns is None


def test_step_by_step_an_evaluation_is_the_same():
    algorithm, key = constant_algorithm(Plan(1, 1, 1)), jax.random.key(0)
    policy, player = algorithm.init(key), make_player(RandomLength(), algorithm, 6, "sample", 0, None)
    now, decisions = player.begin(policy, key), 0
    while player.running(now):
        now, decisions = player.advance(policy, now), decisions + 1
    expected = evaluate(RandomLength(), 6, "sample")(key)
    np.testing.assert_array_equal(now.result.lengths, expected.lengths)
    assert decisions == expected.lengths.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "greedy", 0), "num_episodes = 0"),
        ((4, "gredy", 0), "mode = 'gredy' is not possible: explore or sample or greedy"),
        ((4, "greedy", -1), "max_decisions = -1"),
    ],
)
def test_numbers_and_modes_that_make_no_evaluation_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        make_player(Counter(3), constant_algorithm(Plan(1, 1, 1)), *arguments, None)
