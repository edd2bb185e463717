"""PPO's update against numbers worked out by hand, and its switches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithm import Plan
from rlx.algorithms import ppo
from rlx.networks import MLP
from rlx.types import Transition, UserError
from tests.on_policy import ASYMMETRIC, CONTINUOUS, DISCRETE, PLAN, draw_obs, one_update, trajectory_of

SMALL = ppo.Config(actor_hidden=(8,), critic_hidden=(8,), memory_size=4, num_epochs=1, num_minibatches=1)


@pytest.mark.parametrize(
    "spec",
    [CONTINUOUS, DISCRETE, pytest.param(ASYMMETRIC, marks=pytest.mark.slow)],
    ids=["continuous", "discrete", "asymmetric"],
)
@pytest.mark.parametrize("recurrent", [False, True], ids=["feedforward", "recurrent"])
@pytest.mark.parametrize("distribution", ["normal", pytest.param("tanh_normal", marks=pytest.mark.slow)])
def test_the_first_minibatch_has_a_ratio_of_one(spec, recurrent, distribution):
    config = dataclasses.replace(
        SMALL, recurrent=recurrent, distribution=distribution, critic_obs_key="privileged_state", num_minibatches=2
    )
    if spec is not ASYMMETRIC:
        config = dataclasses.replace(config, critic_obs_key="state")
    *_, (_, metrics) = one_update(ppo, config, spec)
    assert float(metrics["first_ratio_deviation"]) < 2e-6
    assert abs(float(metrics["kl"])) < 1e-2


def test_statistics_are_those_of_acting_and_update_last():
    learner, trajectory, (state, metrics) = one_update(ppo, SMALL, CONTINUOUS)
    assert float(metrics["first_ratio_deviation"]) < 2e-6
    np.testing.assert_allclose(state.statistics.mean, trajectory.obs.mean((0, 1)), rtol=1e-5)
    assert int(state.statistics.count[0]) == PLAN.num_envs * PLAN.unroll_length
    second = ppo.make(dataclasses.replace(SMALL, normalize_first=True), CONTINUOUS, PLAN)
    _, metrics = second.update(learner, trajectory, jnp.asarray(0), jax.random.key(3))
    assert float(metrics["first_ratio_deviation"]) > 1e-3


def test_value_targets_stop_at_endings():
    """With a critic of zero, lambda = 1 and gamma = .5 the targets are discounted sums within episodes."""
    config = dataclasses.replace(SMALL, gamma=0.5, gae_lambda=1.0, normalize_advantage=False, reward_scale=2.0)
    algorithm = ppo.make(config, CONTINUOUS, PLAN)
    learner = algorithm.init(jax.random.key(0))
    learner = learner._replace(
        params=learner.params | {"critic": jax.tree.map(jnp.zeros_like, learner.params["critic"])}
    )
    trajectory = trajectory_of(algorithm, learner, CONTINUOUS)
    _, metrics = algorithm.update(learner, trajectory, jnp.asarray(0), jax.random.key(0))
    rewards, targets = 2.0 * np.arange(6.0), np.zeros((6, 4))
    for env in range(4):
        for t in reversed(range(6)):
            ended = t in (env, env + 2) or t == 5
            targets[t, env] = rewards[t] + (0.0 if ended else 0.5 * targets[t + 1, env])
    assert float(metrics["value_loss"]) == pytest.approx(0.5 * (targets**2).mean(), rel=1e-5)
    assert float(metrics["policy_loss"]) == pytest.approx(-targets.mean(), rel=1e-5)


def test_an_ended_episode_bootstraps_only_if_truncated():
    """One step, critic = constant 3: the advantage is r - 3 at a termination and r + gamma 3 - 3 at a time limit."""
    plan = Plan(num_envs=2, unroll_length=1, num_iterations=1)
    config = dataclasses.replace(SMALL, gamma=0.9, normalize_advantage=False, clip_eps=100.0)
    algorithm = ppo.make(config, CONTINUOUS, plan)
    learner = algorithm.init(jax.random.key(0))
    critic = jax.tree.map(jnp.zeros_like, learner.params["critic"])
    critic["params"]["output"]["bias"] = jnp.full(1, 3.0)
    learner = learner._replace(params=learner.params | {"critic": critic})
    obs = jnp.ones((2, 3))
    _, action, extras = algorithm.act(algorithm.policy(learner, "explore"), (), obs, jax.random.key(0), "explore")
    terminated = jnp.array([[True, False]])
    one = jax.tree.map(
        lambda x: x[None], Transition(obs, action, jnp.ones(2), terminated[0], ~terminated[0], obs, extras)
    )
    _, metrics = algorithm.update(learner, one, jnp.asarray(0), jax.random.key(0))
    assert float(metrics["policy_loss"]) == pytest.approx(-((1 - 3) + (1 + 0.9 * 3 - 3)) / 2, rel=1e-5)


def test_annealing_reaches_zero_and_the_rate_adapts_to_the_kl():
    *_, (half, metrics) = one_update(ppo, dataclasses.replace(SMALL, anneal_lr=True), CONTINUOUS, iteration=5)
    assert float(metrics["learning_rate"]) == pytest.approx(1.5e-4)
    *_, (same, _) = one_update(ppo, dataclasses.replace(SMALL, learning_rate=1.5e-4), CONTINUOUS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), half.params, same.params)
    # the first minibatch's KL is 0 and tells nothing; the second's is far below target_kl / 2
    small = dataclasses.replace(SMALL, adaptive_lr=True, learning_rate=1e-4, target_kl=1.0, num_epochs=2)
    *_, (state, _) = one_update(ppo, small, CONTINUOUS)
    assert float(state.learning_rate) == pytest.approx(1.5e-4)
    eager = dataclasses.replace(SMALL, adaptive_lr=True, learning_rate=1e-2, target_kl=1e-6, num_epochs=3)
    *_, (state, _) = one_update(ppo, eager, CONTINUOUS)
    assert float(state.learning_rate) == pytest.approx(1e-2 / 1.5**2, rel=1e-4)


def test_advantages_from_the_current_critic_equal_the_first_ones_in_the_first_minibatch():
    columns = dataclasses.replace(SMALL, gae_per_minibatch=True)
    *_, (_, once) = one_update(ppo, SMALL, CONTINUOUS)
    *_, (_, every) = one_update(ppo, columns, CONTINUOUS)
    assert float(once["policy_loss"]) == pytest.approx(float(every["policy_loss"]), abs=1e-5)
    assert float(once["value_loss"]) == pytest.approx(float(every["value_loss"]), rel=1e-5)
    many = dataclasses.replace(SMALL, num_epochs=4)
    *_, (_, once) = one_update(ppo, many, CONTINUOUS)
    *_, (_, every) = one_update(ppo, dataclasses.replace(columns, num_epochs=4), CONTINUOUS)
    assert float(once["value_loss"]) != float(every["value_loss"])


def test_value_clipping_holds_the_critic_back():
    free = dataclasses.replace(SMALL, num_epochs=40, learning_rate=1e-2, clip_eps=0.01, max_grad_norm=float("inf"))
    *_, (_, loose) = one_update(ppo, free, CONTINUOUS)
    *_, (_, tight) = one_update(ppo, dataclasses.replace(free, clip_value=True), CONTINUOUS)
    assert float(tight["value_loss"]) > float(loose["value_loss"])


def test_value_clipping_also_works_with_advantages_from_the_current_critic():
    columns = dataclasses.replace(
        SMALL, gae_per_minibatch=True, num_epochs=40, learning_rate=1e-2, clip_eps=0.01, max_grad_norm=float("inf")
    )
    *_, (loose, _) = one_update(ppo, columns, CONTINUOUS)
    *_, (tight, _) = one_update(ppo, dataclasses.replace(columns, clip_value=True), CONTINUOUS)
    moved = [jnp.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (loose.params, tight.params)), strict=True)]
    assert max(map(float, moved)) > 1e-2


def test_recurrent_values_of_successors_are_the_values_of_the_next_step():
    """With reward 0, gamma = 1, lambda = 0 and no ending, value targets are V(next_obs[t]), which is V(obs[t + 1])."""
    config = dataclasses.replace(SMALL, recurrent=True, gamma=1.0, gae_lambda=0.0, normalize_obs=False)
    algorithm = ppo.make(config, CONTINUOUS, PLAN)
    learner = algorithm.init(jax.random.key(0))
    policy = algorithm.policy(learner, "explore")
    critic = MLP(config.critic_hidden, 1, config.activation)
    memory = jax.vmap(algorithm.memory)(jax.random.split(jax.random.key(1), PLAN.num_envs))
    obs = draw_obs(CONTINUOUS, jax.random.key(2), (PLAN.unroll_length + 1, PLAN.num_envs))
    steps, values = [], []
    for t in range(PLAN.unroll_length + 1):
        memory, _, extras = algorithm.act(policy, memory, obs[t], jax.random.key(t), "explore")
        inputs = jnp.concatenate([obs[t], memory], axis=-1)  # a GRU's output is its memory
        values.append(np.asarray(critic.apply(learner.params["critic"], inputs)).squeeze(-1))
        steps.append(extras)
    extras = jax.tree.map(lambda *x: jnp.stack(x), *steps[:-1])
    never = jnp.zeros((PLAN.unroll_length, PLAN.num_envs), bool)
    zeros = jnp.zeros(never.shape)
    trajectory = Transition(obs[:-1], jnp.zeros((*never.shape, 2)), zeros, never, never, obs[1:], extras)
    _, metrics = algorithm.update(learner, trajectory, jnp.asarray(0), jax.random.key(0))
    expected = 0.5 * np.square(np.stack(values[1:]) - np.stack(values[:-1])).mean()
    assert float(metrics["value_loss"]) == pytest.approx(expected, rel=1e-4)


def test_golden_numbers_of_one_update():
    config = dataclasses.replace(SMALL, num_epochs=2, num_minibatches=3, entropy_coef=0.01)
    *_, (state, metrics) = one_update(ppo, config, CONTINUOUS)
    measured = {k: float(metrics[k]) for k in ("policy_loss", "value_loss", "entropy", "grad_norm")}
    measured["params"] = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
    message = (
        "One PPO update gives other numbers than it did: its mathematics, its initialisation or its use of keys has "
        "changed. If that was meant, write the new numbers here and say in CHANGELOG.md that curves are not comparable."
    )
    assert measured == pytest.approx(GOLDEN, rel=1e-4), message


GOLDEN = {
    "policy_loss": -0.00392386,
    "value_loss": 12.77674,
    "entropy": 2.839842,
    "grad_norm": 6.190805,
    "params": 32.63024,
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"clip_eps": 0.0}, "clip_eps"),
        ({"num_minibatches": 7}, "num_minibatches"),
        ({"num_minibatches": 8, "recurrent": True}, "num_envs = 4"),
        ({"distribution": "nromal"}, "distribution"),
        ({"activation": "tahn"}, "tanh"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"actor_hidden": (0,)}, "actor_hidden"),
        ({"adaptive_lr": True, "learning_rate": 0.05}, "learning_rate"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        ppo.check(dataclasses.replace(SMALL, **change), CONTINUOUS, PLAN)


def test_an_observation_key_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match="privileged_state"):
        ppo.check(dataclasses.replace(SMALL, critic_obs_key="privileged"), ASYMMETRIC, PLAN)
