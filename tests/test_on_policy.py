"""What on-policy learners share, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithms import dppo, fpo, mappo, ppo
from rlx.on_policy import clipped_surrogate
from rlx.types import Transition, UserError
from tests.on_policy import CONTINUOUS, PLAN, one_update, trajectory_of

SIZES = {"actor_hidden": (8,), "critic_hidden": (8,), "num_epochs": 1, "num_minibatches": 1}
MODULES = {"ppo": ppo, "fpo": fpo, "dppo": dppo, "mappo": mappo}
every = pytest.mark.parametrize("name", MODULES)


def small(name, **changes):
    return dataclasses.replace(MODULES[name].Config(), **SIZES | changes)


def with_critic_of(learner, constant):
    """`learner` with a critic that answers `constant` everywhere; of FPO and DPPO `learned` holds it."""
    outer = getattr(learner, "learned", None)
    inner = learner if outer is None else outer
    critic = jax.tree.map(jnp.zeros_like, inner.params["critic"])
    critic["params"]["output"]["bias"] = jnp.full(1, constant)
    inner = inner._replace(params=inner.params | {"critic": critic})
    return inner if outer is None else learner._replace(learned=inner)


def test_the_clipped_surrogate_by_hand():
    ratio, advantages = jnp.asarray([1.5, 0.5, 1.5, 0.5, 1.1]), jnp.asarray([1.0, 1.0, -1.0, -1.0, 2.0])
    np.testing.assert_allclose(clipped_surrogate(ratio, advantages, 0.2), [1.2, 0.5, -1.5, -0.8, 2.2], rtol=1e-6)


@every
def test_an_ended_episode_bootstraps_only_if_truncated(name):
    """Critic = constant 3, one step: the targets are 1 at a termination and 1 + .9 * 3 at a time limit."""
    plan = PLAN._replace(num_envs=2, unroll_length=1, num_iterations=1)
    algorithm = MODULES[name].make(small(name, gamma=0.9), CONTINUOUS, plan)
    learner = with_critic_of(algorithm.init(jax.random.key(0)), 3.0)
    obs = jnp.ones((2, 3))
    _, action, extras = algorithm.act(algorithm.policy(learner, "explore"), (), obs, jax.random.key(0), "explore")
    terminated = jnp.array([True, False])
    one = Transition(obs, action, jnp.ones(2), terminated, ~terminated, obs, extras)
    one = jax.tree.map(lambda x: x[None], one)
    _, metrics = algorithm.update(learner, one, jnp.asarray(0), jax.random.key(0))
    assert float(metrics["value_loss"]) == pytest.approx(0.5 * ((3 - 1) ** 2 + (3 - 3.7) ** 2) / 2, rel=1e-5)


@every
def test_statistics_of_observations_update_last_and_may_be_frozen(name):
    learner, trajectory, (state, metrics) = one_update(MODULES[name], small(name), CONTINUOUS)
    assert float(metrics["first_ratio_deviation"]) < 2e-6
    state = getattr(state, "learned", state)
    np.testing.assert_allclose(state.statistics.mean, trajectory.obs.mean((0, 1)), rtol=1e-5)
    *_, (state, _) = one_update(MODULES[name], small(name, freeze_statistics=True), CONTINUOUS)
    state = getattr(state, "learned", state)
    assert not state.statistics.count.any()


@every
def test_rewards_are_scaled_by_their_discounted_sums(name):
    """Sums start anew after each ending and go on in the next trajectory; gamma = .5."""
    config = small(name, normalize_reward=True, gamma=0.5, gae_lambda=1.0)
    algorithm = MODULES[name].make(config, CONTINUOUS, PLAN)
    learner = with_critic_of(algorithm.init(jax.random.key(0)), 0.0)
    trajectory = trajectory_of(algorithm, learner, CONTINUOUS)
    state, metrics = algorithm.update(learner, trajectory, jnp.asarray(0), jax.random.key(0))
    rewards, sums, running = np.asarray(trajectory.reward), np.zeros((6, 4)), np.zeros(4)
    for t in range(6):
        running = 0.5 * running + rewards[t]
        sums[t] = running
        running = np.where(trajectory.terminated[t] | trajectory.truncated[t], 0.0, running)
    targets = np.zeros((7, 4))
    for t in reversed(range(6)):
        ended = trajectory.terminated[t] | trajectory.truncated[t]
        targets[t] = rewards[t] / sums.std() + np.where(ended, 0.0, 0.5 * targets[t + 1])
    assert float(metrics["value_loss"]) == pytest.approx(0.5 * np.square(targets[:6]).mean(), rel=1e-5)
    scale = getattr(state, "learned", state).reward_scale
    np.testing.assert_allclose(scale.discounted.sums, running, rtol=1e-6)
    assert float(scale.statistics.std) == pytest.approx(sums.std(), rel=1e-5)


@every
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gamma": -0.5}, "gamma"),
        ({"clip_eps": 0.0}, "clip_eps"),
        ({"num_minibatches": 7}, "num_minibatches"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"critic_hidden": (0,)}, "critic_hidden"),
        ({"adaptive_lr": True, "learning_rate": 0.05}, "learning_rate"),
        ({"critic_obs_key": "state", "activation": "reluu"}, "relu"),
    ],
)
def test_impossible_settings_are_refused_by_name(name, change, field):
    change = {"finetuned_steps": 1, **change} if name == "dppo" else change
    with pytest.raises(UserError, match=field):
        MODULES[name].check(small(name, **change), CONTINUOUS, PLAN)
