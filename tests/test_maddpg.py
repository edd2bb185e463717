"""MADDPG's update against closed forms and against TD3, its rewards, its padding and its switches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import rlx
from rlx.algorithms import maddpg, td3
from rlx.logging import Progress
from rlx.schedule import TrainConfig
from rlx.types import UserError
from tests.off_policy import CONTINUOUS, DISCRETE_TEAM, PLAN, SMALL, TEAM, constant_critic, trajectory_of

CONFIG = maddpg.Config(**SMALL)
STILL = dataclasses.replace(CONFIG, utd_ratio=(1, 24), gamma=0.9, critic_learning_rate=1e-20)


def start(config, spec=TEAM):
    algorithm = maddpg.make(config, spec, PLAN)
    return algorithm, jax.jit(algorithm.update), algorithm.init(jax.random.key(0))


def with_learned(state, params, targets=None):
    learned = state.learned._replace(params=state.params | params, targets=state.learned.targets | (targets or {}))
    return state._replace(learned=learned)


def of_agents(state, values):
    """Critics of each agent that are the constants `values` [N, E]."""
    return {"critic": jax.vmap(constant_critic)(state.params["critic"], jnp.asarray(values, jnp.float32))}


def paid(reward, terminated=False, truncated=False):
    trajectory = trajectory_of(TEAM)
    never = jnp.zeros_like(trajectory.terminated)
    reward = jnp.asarray(reward, jnp.float32)
    reward = jnp.broadcast_to(reward, trajectory.reward.shape + reward.shape)
    return trajectory._replace(reward=reward, terminated=never | terminated, truncated=never | truncated)


def test_matd3_of_one_agent_is_td3(monkeypatch):
    """Where noise is the same in every draw."""
    trajectories = [trajectory_of(CONTINUOUS), trajectory_of(CONTINUOUS, 1)]

    def noise(key, shape, dtype):
        return jnp.broadcast_to(jnp.sin(jnp.arange(shape[0], dtype=dtype)).reshape(-1, *(1,) * (len(shape) - 1)), shape)

    monkeypatch.setattr(jax.random, "normal", noise)
    settings = SMALL | {"utd_ratio": (5, 24), "num_critics": 2, "policy_delay": 2, "target_noise": 0.2, "gamma": 0.99}
    settings |= {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "tau": 0.01, "max_grad_norm": 0.5}
    one = td3.make(td3.Config(**settings), CONTINUOUS, PLAN)
    _, several, state = start(maddpg.Config(**settings, output_penalty=0.0), CONTINUOUS)
    other = one.init(jax.random.key(0))
    alone = jax.tree.map(lambda x: x[None], other.params)
    state = with_learned(state, alone, alone)
    for iteration, trajectory in enumerate(trajectories):  # of five gradient steps each
        step = (trajectory, jnp.int32(iteration), jax.random.key(iteration))
        state, metrics = several(state, *step)
        other, expected = jax.jit(one.update)(other, *step)
    learnt = [(state.params, other.params), (state.learned.targets, other.learned.targets)]
    for mine, its in learnt:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=0, atol=1e-6), mine, its)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize(
    ("terminated", "truncated", "bootstraps"), [(False, False, 1), (True, False, 0), (False, True, 1), (True, True, 0)]
)
def test_every_agent_has_a_target_of_its_own_reward_and_critics(terminated, truncated, bootstraps):
    _, update, state = start(dataclasses.replace(STILL, num_critics=2))
    targets = of_agents(state, [[5.0, 3.0], [-1.0, 7.0]])
    state = with_learned(state, of_agents(state, [[0.0, 0.0], [0.0, 0.0]]), targets)
    _, metrics = update(state, paid([1.0, 10.0], terminated, truncated), jnp.int32(0), jax.random.key(0))
    wanted = np.array([1 + 0.9 * bootstraps * 3, 10 - 0.9 * bootstraps * 1])
    assert float(metrics["target"]) == pytest.approx(wanted.mean(), rel=1e-5)
    assert float(metrics["critic_loss"]) == pytest.approx((wanted**2).mean(), rel=1e-5)  # half of it, of two critics


@pytest.mark.parametrize(
    ("team_reward", "reward", "expected"), [(False, [1.0, 10.0], 5.5), (True, [1.0, 10.0], 11.0), (False, 3.0, 3.0)]
)
def test_a_reward_of_all_is_that_of_each_and_those_of_each_may_be_added(team_reward, reward, expected):
    _, update, state = start(dataclasses.replace(STILL, gamma=0.0, team_reward=team_reward))
    _, metrics = update(state, paid(reward), jnp.int32(0), jax.random.key(0))
    assert float(metrics["target"]) == pytest.approx(expected)


def test_n_step_rewards_are_each_agents_own():
    _, update, state = start(dataclasses.replace(STILL, n_step=2, gamma=0.5, batch_size=20_000))
    state = with_learned(state, {}, of_agents(state, [[0.0], [0.0]]))
    _, metrics = update(state, paid([1.0, 3.0]), jnp.int32(0), jax.random.key(0))
    assert float(metrics["target"]) == pytest.approx(2 * (5 * 1.5 + 1) / 6, abs=0.02)  # the newest row stands alone


def of_actions(state, weights):
    """Critics that are linear in the joint action: `weights` [N, N * a] of each agent's; for one hidden layer."""
    critic = jax.tree.map(jnp.zeros_like, state.params["critic"])
    joint = jnp.asarray(weights, jnp.float32)
    for column, sign in ((0, 1.0), (1, -1.0)):  # relu(x) - relu(-x) = x
        kernel = critic["params"]["Dense_0"]["kernel"]
        critic["params"]["Dense_0"]["kernel"] = kernel.at[:, :, -joint.shape[1] :, column].set(sign * joint[:, None])
        out = critic["params"]["output"]["kernel"]
        critic["params"]["output"]["kernel"] = out.at[:, :, column].set(sign)
    return {"critic": critic}


def test_each_actor_climbs_its_own_critic_by_its_own_action_alone():
    """Agent 0 is to raise its first entry; agent 1's critic wants its only entry low, and another's high."""
    config = dataclasses.replace(STILL, actor_learning_rate=1e-2, output_penalty=0.0)
    _, update, state = start(config)
    state = with_learned(state, of_actions(state, [[1, 0, 0, -9, 0, 0], [0, 9, 0, -1, 0, 0]]))
    after, metrics = update(state, paid(0.0), jnp.int32(0), jax.random.key(0))
    kernels = [s.params["actor"]["params"]["output"] for s in (state, after)]
    moved = kernels[1]["bias"] - kernels[0]["bias"]
    np.testing.assert_allclose(moved, [[1e-2, 0, 0], [-1e-2, 0, 0]], atol=1e-4)
    assert float(metrics["actor_grad_norm"]) > 0


def test_the_penalty_pulls_outputs_to_zero_and_not_those_of_padding():
    config = dataclasses.replace(STILL, actor_learning_rate=1e-2, output_penalty=1.0)
    _, update, state = start(config)
    actor = jax.tree.map(jnp.zeros_like, state.params["actor"])
    actor["params"]["output"]["bias"] = jnp.full((2, 3), 0.5)
    state = with_learned(state, {"actor": actor, **of_agents(state, [[0.0], [0.0]])})
    after, _ = update(state, paid(0.0), jnp.int32(0), jax.random.key(0))
    moved = after.params["actor"]["params"]["output"]["bias"] - 0.5
    np.testing.assert_allclose(moved, np.where(TEAM.action_mask, -1e-2, 0.0), atol=1e-4)


@pytest.mark.parametrize("spec", [TEAM, DISCRETE_TEAM], ids=["continuous", "discrete"])
def test_padding_is_never_acted_and_exploring_is_not_greedy(spec):
    algorithm, _, state = start(CONFIG, spec)
    obs = jax.tree.map(lambda x: jnp.tile(x[0], (50, *[1] * (x.ndim - 2))), trajectory_of(TEAM).obs)
    drawn = {
        mode: algorithm.act(algorithm.policy(state, mode), (), obs, jax.random.key(0), mode)[1]
        for mode in ("explore", "sample", "greedy")
    }
    for action in drawn.values():
        if spec is TEAM:
            assert (action[:, ~TEAM.action_mask] == 0).all() and float(jnp.abs(action).max()) <= 1
        else:
            assert action.dtype == jnp.int32 and int(action[:, 1].max()) <= 1 and int(action[:, 0].max()) <= 2
    assert (drawn["explore"] != drawn["greedy"]).any() and (drawn["sample"] != drawn["greedy"]).any()


def test_discrete_actors_learn_through_their_one_hot_actions():
    """Critics want value 1 of agent 0 and value 0 of agent 1."""
    config = dataclasses.replace(STILL, actor_learning_rate=1e-2, batch_size=512, output_penalty=0.0)
    _, update, state = start(config, DISCRETE_TEAM)
    actor = jax.tree.map(jnp.zeros_like, state.params["actor"])
    state = with_learned(state, of_actions(state, [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]) | {"actor": actor})
    trajectory = trajectory_of(DISCRETE_TEAM)._replace(obs=trajectory_of(TEAM).obs)
    trajectory = trajectory._replace(action=jnp.zeros_like(trajectory.action))
    after, _ = update(state, trajectory, jnp.int32(0), jax.random.key(0))
    bias = after.params["actor"]["params"]["output"]["bias"]
    np.testing.assert_allclose(bias, [[-1e-2, 1e-2, -1e-2], [1e-2, -1e-2, 0.0]], rtol=1e-3)


def test_actors_and_targets_wait_for_their_turn():
    config = dataclasses.replace(CONFIG, utd_ratio=(3, 24), policy_delay=2)
    _, update, state = start(config)
    for iteration, expected in enumerate([(3, 1), (6, 3)]):
        state, _ = update(state, trajectory_of(TEAM, iteration), jnp.int32(iteration), jax.random.key(iteration))
        counts = tuple(np.unique(state.learned.optimizers[name][1].count).tolist() for name in ("critic", "actor"))
        assert counts == tuple([n] for n in expected)


def test_shared_parameters_are_those_of_one_network():
    _, update, state = start(dataclasses.replace(CONFIG, share_params=True))
    assert state.params["actor"]["params"]["Dense_0"]["kernel"].shape == (4 + 2, 8)
    after, _ = update(state, trajectory_of(TEAM), jnp.int32(0), jax.random.key(0))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"policy_delay": 0}, "policy_delay"), ({"output_penalty": -1.0}, "output_penalty"), ({"tau": 2.0}, "tau")],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        maddpg.check(dataclasses.replace(CONFIG, **change), TEAM, PLAN)
    maddpg.check(CONFIG, TEAM, PLAN)


def test_a_team_finds_the_best_of_three_agreements():
    env = envs.make("matrix/diagonal")
    sizes = TrainConfig(total_steps=6_400, num_envs=16, unroll_length=4, num_evals=1, eval_episodes=8)
    settings = {"batch_size": 64, "utd_ratio": (4, 64), "replay_size": 6_400, "prefill_steps": 640}
    settings |= {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "critic_hidden": (32,)}
    config = dataclasses.replace(CONFIG, **settings)
    run = rlx.train(env, maddpg, sizes, config, progress=Progress(quiet=True))
    assert run.history[-1]["eval/return"] == 20.0


def test_golden_numbers_of_one_update():
    _, update, state = start(CONFIG)
    state, metrics = update(state, trajectory_of(TEAM), jnp.int32(0), jax.random.key(3))
    measured = {k: float(metrics[k]) for k in ("critic_loss", "actor_loss", "target")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One MADDPG update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {"critic_loss": 0.6597286, "actor_loss": -0.05247865, "target": 0.266565, "params": 86.63453}
