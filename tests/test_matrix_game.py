"""Matrix games: payoffs, endings, and tables of any number of agents."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import matrix_game
from envs.matrix_game import MatrixGame
from envs.names import MATRIX
from rlx.environment import random_action
from rlx.errors import UserError
from rlx.types import Discrete
from tests.test_envs import assert_fixed_point

KEY = jax.random.key(0)


def table(env, *sizes):
    """What all joint actions pay; all of them terminate."""
    joint = jnp.array(list(itertools.product(*map(range, sizes))), jnp.int32)
    timestep = jax.jit(jax.vmap(lambda action: env.step((), action, KEY)[1]))(joint)
    assert timestep.terminated.all() and not timestep.truncated.any()
    return timestep.reward.reshape(sizes)


def test_names_are_those_that_the_registry_lists():
    assert sorted(matrix_game.NAMES) == sorted(MATRIX)


@pytest.mark.parametrize("name", MATRIX)
def test_every_game_is_an_environment_of_one_step_and_discrete_actions(name):
    env = envs.make(f"matrix/{name}")
    assert_fixed_point(env)
    assert env.spec.action == Discrete(3, (2,)) and (env.spec.num_agents, env.spec.episode_length) == (2, 1)
    assert env.spec.obs_mask.tolist() == [[True], [True]] and env.spec.action_mask.all()
    _, obs = env.reset(KEY, ())
    assert not any(x.any() for x in jax.tree.leaves((obs, env.step((), jnp.array([1, 1]), KEY)[1].final_obs)))


@pytest.mark.parametrize("k", [-25, -50.0, -75.0, -100.0])
def test_the_penalty_game_pays_its_optima_the_safe_choice_and_k(k):
    env = envs.make("matrix/penalty", k=k)
    assert table(env, 3, 3).tolist() == [[10, 0, k], [0, 2, 0], [k, 0, 10]]


def test_the_climbing_and_the_diagonal_game_pay_what_they_are_known_for():
    assert table(envs.make("matrix/climbing"), 3, 3).tolist() == [[11, -30, 0], [-30, 7, 6], [0, 0, 5]]
    assert table(envs.make("matrix/diagonal"), 3, 3).tolist() == [[5, 0, 0], [0, 10, 0], [0, 0, 20]]
    four = table(envs.make("matrix/diagonal", N=4, values=(1.0, 2.0)), 2, 2, 2, 2)
    assert (four[0, 0, 0, 0], four[1, 1, 1, 1], four.sum()) == (1.0, 2.0, 3.0)


def test_a_table_may_be_any_with_fewer_actions_for_some():
    payoff = np.arange(24.0).reshape(2, 4, 3)
    env = MatrixGame(payoff)
    assert_fixed_point(env)
    np.testing.assert_array_equal(table(env, 2, 4, 3), payoff)
    assert env.spec.action == Discrete(4, (3,)) and env.spec.action_mask.sum(axis=1).tolist() == [2, 4, 3]
    drawn = jax.vmap(lambda key: random_action(env.spec, key))(jax.random.split(KEY, 500))
    assert drawn.max(axis=0).tolist() == [1, 3, 2]
    assert env.step((), jnp.array([3, 1, 3]), KEY)[1].reward == payoff[1, 1, 2]  # the last that they have


def test_one_agent_alone_is_a_bandit():
    env = MatrixGame([1.0, 3.0])
    assert_fixed_point(env)
    assert env.spec.action == Discrete(2) and env.spec.num_agents == 1 and env.spec.obs.shape == (1,)
    assert [float(env.step((), jnp.int32(a), KEY)[1].reward) for a in range(2)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("penalti", {}, "Did you mean matrix/penalty"),
        ("penalty", {"k": 1.0}, "k = 1.0 .* 0 or less"),
        ("penalty", {"k": float("-inf")}, "k = -inf"),
        ("penalty", {"k": "much"}, "k = 'much'"),
        ("climbing", {"k": -30.0}, "override 'k' does not exist"),
        ("diagonal", {"N": 0}, "N = 0"),
        ("diagonal", {"values": ()}, "values = "),
        ("diagonal", {"values": ("a", "b")}, "values = .*finite numbers"),
        ("diagonal", {"values": (1.0, float("nan"))}, "values = .*finite numbers"),
        ("diagonal", {"N": 13}, "N = 13 .* a million"),
    ],
)
def test_what_cannot_be_had_is_said_plainly(name, options, message):
    with pytest.raises(UserError, match=message):
        envs.make(f"matrix/{name}", **options)


@pytest.mark.parametrize("payoff", [3.0, [], [[1.0, np.nan]], ["a", "b"], [[1, 2], [3]]])
def test_a_table_that_is_none_is_refused(payoff):
    with pytest.raises(UserError, match="payoff"):
        MatrixGame(payoff)


def test_there_is_no_physics_engine_to_choose():
    with pytest.raises(UserError, match="mjx.*not available for matrix/penalty"):
        envs.make("matrix/penalty", "mjx")
