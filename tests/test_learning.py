"""Seconds of learning on worlds whose right answers are known: values, actions, memory."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from rlx import normalize
from rlx.algorithms import ALGORITHMS, ppo
from rlx.collection import Part, collect
from rlx.data import read
from rlx.logging import Progress
from rlx.networks import MLP
from rlx.schedule import TrainConfig, make_schedule
from rlx.training import train

TRAIN = TrainConfig(total_steps=64 * 16 * 60, num_envs=64, unroll_length=16, num_evals=1, eval_episodes=256)
FAST = {
    "bc": {"learning_rate": 3e-3},
    "ppo": {"learning_rate": 3e-3, "gamma": 0.9, "num_epochs": 4, "num_minibatches": 4, "anneal_lr": True},
}


def learn(name, world, train_config=TRAIN, **changes):
    module = importlib.import_module(ALGORITHMS[name])
    overrides = changes.pop("env", {})
    config = dataclasses.replace(module.Config(), **{**FAST.get(name, {}), **changes})
    env, keywords = envs.make(world, **overrides), {"progress": Progress(quiet=True)}
    found = demonstrations(world) if getattr(module, "NEEDS_DATA", False) else None
    return config, train(env, module, train_config, config, data=found, **keywords)


@functools.cache
def demonstrations(world):
    """Data of a policy that PPO has learnt."""
    config, run = learn("ppo", world)
    env = envs.make(world)
    part = Part(ppo.make(config, env.spec, make_schedule(env, TRAIN).plan), run.policy, 4096)
    with tempfile.TemporaryDirectory() as folder:
        collect(env, [part], f"{folder}/a.npz", mode="greedy", progress=Progress(quiet=True))
        return read([(f"{folder}/a.npz", None)], env)


def values(config, run, obs):
    """V(obs) of PPO's critic."""
    obs = normalize.normalize(run.state.learner.statistics, jnp.asarray(obs, jnp.float32), clip=10.0)
    critic = MLP(config.critic_hidden, 1, config.activation)
    return np.asarray(critic.apply(run.state.learner.params["critic"], obs)).squeeze(-1)


def observations(world):
    """The observations [n, d] of one episode, in their order, the final one left out."""
    env = envs.make(world)
    state, obs = env.reset(jax.random.key(0), env.spec.params)
    seen = [obs]
    for _ in range((env.spec.episode_length or 1) - 1):
        state, timestep = env.step(state, jnp.zeros(env.spec.action.shape), jax.random.key(0))
        seen.append(timestep.final_obs)
    return np.stack(seen)


def test_ppo_values_a_constant_reward():
    config, run = learn("ppo", "probe/constant_reward")
    np.testing.assert_allclose(values(config, run, observations("probe/constant_reward")), [1.0], atol=0.05)


def test_ppo_values_a_reward_that_the_observation_tells():
    config, run = learn("ppo", "probe/obs_reward")
    np.testing.assert_allclose(values(config, run, [[-1.0], [1.0]]), [-1.0, 1.0], atol=0.1)


def test_ppo_values_a_delayed_reward_by_the_discount():
    config, run = learn("ppo", "probe/delayed_reward")
    np.testing.assert_allclose(values(config, run, [[0.0], [1.0]]), [0.9, 1.0], atol=0.1)


def test_ppo_bootstraps_at_time_limits():
    """A reward of 1 for ever, cut every 10 steps: 1 / (1 - gamma) everywhere."""
    config, run = learn("ppo", "probe/truncate_only")
    seen = observations("probe/truncate_only")
    np.testing.assert_allclose(values(config, run, seen), np.full(len(seen), 10.0), rtol=0.05)


def test_ppo_does_not_bootstrap_at_terminations():
    config, run = learn("ppo", "probe/terminate_only")
    seen = observations("probe/terminate_only")
    left = len(seen) - np.arange(len(seen))
    np.testing.assert_allclose(values(config, run, seen), (1 - 0.9**left) / (1 - 0.9), rtol=0.1)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("world", ["action_reward_continuous", "obs_action_reward_continuous"])
def test_every_algorithm_finds_the_best_continuous_action(name, world):
    _, run = learn(name, f"probe/{world}")
    assert run.history[-1]["eval/return"] > -0.01  # minus the squared distance to the best action


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("world", ["action_reward", "obs_action_reward"])
def test_every_algorithm_finds_the_best_discrete_action(name, world):
    _, run = learn(name, f"probe/{world}")
    assert run.history[-1]["eval/return"] == 1.0


@pytest.mark.slow
def test_memory_solves_what_a_feedforward_policy_cannot():
    """The cue is seen in the first observation alone, the answer is paid at the end: chance is 0, the best 1."""
    longer = dataclasses.replace(TRAIN, total_steps=64 * 16 * 150)
    _, blind = learn("ppo", "probe/memory", longer)
    _, run = learn("ppo", "probe/memory", longer, recurrent=True)
    assert abs(blind.history[-1]["eval/return"]) < 0.3
    assert run.history[-1]["eval/return"] > 0.95
