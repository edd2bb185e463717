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
from rlx.learners import tuned
from rlx.logging import Progress
from rlx.networks import MLP
from rlx.off_policy import make_critics
from rlx.schedule import TrainConfig, make_schedule
from rlx.training import train, train_many
from tests.kinds import of_each_kind

TRAIN = TrainConfig(total_steps=64 * 16 * 60, num_envs=64, unroll_length=16, num_evals=1, eval_episodes=256)
OFF_POLICY = {
    "actor_learning_rate": 3e-3,
    "critic_learning_rate": 3e-3,
    "gamma": 0.9,
    "tau": 0.05,
    "batch_size": 128,
    "utd_ratio": (40, 1024),
    "replay_size": TRAIN.total_steps,  # nothing is forgotten: values are asked for of what is seldom seen in the end
    "prefill_steps": 2_048,
    "actor_hidden": (32, 32),
    "critic_hidden": (32, 32),
}
CONTINUOUS_ALONE = ("sac", "td3", "fpo", "dppo")
ON_POLICY = {"learning_rate": 3e-3, "gamma": 0.9, "num_epochs": 4, "num_minibatches": 4, "anneal_lr": True}
FAST = {
    "bc": {"learning_rate": 3e-3},
    "ppo": ON_POLICY,
    "fpo": ON_POLICY | {"learning_rate": 1e-3, "flow_loss": "velocity", "clip_eps": 0.2, "num_flow_steps": 4},
    "dppo": ON_POLICY
    | {
        "learning_rate": 1e-3,
        "critic_lr_scale": 3.0,
        "num_epochs": 8,
        "num_denoising_steps": 4,
        "gamma_denoising": 1.0,
    },
    "mappo": ON_POLICY,
    "sac": OFF_POLICY | {"init_alpha": 1e-3, "alpha_learning_rate": 1e-2},
    "td3": OFF_POLICY,
    "hasac": OFF_POLICY | {"init_alpha": 1e-3, "alpha_learning_rate": 1e-2},
    "maddpg": OFF_POLICY | {"output_penalty": 0.0},
}


def learn(name, world, train_config=TRAIN, **changes):
    module = importlib.import_module(ALGORITHMS[name])
    overrides = changes.pop("env", {})
    config = dataclasses.replace(module.Config(), **{**FAST.get(name, {}), **changes})
    env, keywords = envs.make(world, **overrides), {"progress": Progress(quiet=True)}
    found = demonstrations(world) if name == "bc" else None
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


def values(name, config, run, env, obs):
    """V(obs) of a critic over observations, or the smallest Q(obs, greedy action) of critics over actions too."""
    learner, obs = run.state.learner, jnp.asarray(obs, jnp.float32)
    if name in ("ppo", "fpo", "dppo", "mappo"):
        critic = MLP(config.critic_hidden, 1, config.activation)
        statistics = learner.statistics if name in ("ppo", "mappo") else learner.learned.statistics
        seen = normalize.normalize(statistics, obs, clip=10.0)
        return np.asarray(critic.apply(learner.params["critic"], seen)).squeeze(-1)
    algorithm = importlib.import_module(ALGORITHMS[name]).make(config, env.spec, make_schedule(env, TRAIN).plan)
    _, action, _ = algorithm.act(run.policy, (), obs, jax.random.key(0), "greedy")
    seen = normalize.normalize(learner.experience.statistics, obs, clip=10.0)
    critic = learner.params["critic"]
    critic = jax.tree.map(lambda x: x[0], critic) if name == "maddpg" else critic  # of the one agent
    return np.asarray(make_critics(config, env.spec).apply(critic, seen, action)).min(axis=0)


def observations(world):
    """The observations [n, d] of one episode, in their order, the final one left out."""
    env = envs.make(world)
    state, obs = env.reset(jax.random.key(0), env.spec.params)
    seen = [obs]
    for _ in range((env.spec.episode_length or 1) - 1):
        state, timestep = env.step(state, jnp.zeros(env.spec.action.shape), jax.random.key(0))
        seen.append(timestep.final_obs)
    return np.stack(seen)


def valued(name, world, obs=None, **changes):
    """What algorithm `name` values observations at once it has learnt; those of an episode, if none are given."""
    config, run = learn(name, f"probe/{world}", **changes)
    obs = observations(f"probe/{world}") if obs is None else obs
    return values(name, config, run, envs.make(f"probe/{world}"), obs)


VALUED = [name for name in ALGORITHMS if name != "bc"]  # which has no values
SELDOM = ("fpo", "dppo", "hasac", "maddpg")  # whose updates take longest; who equal SAC and TD3 here (their tests)
every = pytest.mark.parametrize("name", of_each_kind(VALUED, tuple(name for name in VALUED if name not in SELDOM)))
one = pytest.mark.parametrize("name", of_each_kind(VALUED, ("ppo",)))  # below all of them value both endings


@one
def test_a_constant_reward_is_its_value(name):
    np.testing.assert_allclose(valued(name, "constant_reward"), [1.0], atol=0.05)


@one
def test_a_reward_that_the_observation_tells_is_its_value(name):
    np.testing.assert_allclose(valued(name, "obs_reward", [[-1.0], [1.0]]), [-1.0, 1.0], atol=0.1)


@one
def test_a_delayed_reward_is_valued_by_the_discount(name):
    np.testing.assert_allclose(valued(name, "delayed_reward", [[0.0], [1.0]]), [0.9, 1.0], atol=0.1)


@one
def test_values_bootstrap_at_time_limits(name):
    """A reward of 1 for ever, cut every 10 steps: 1 / (1 - gamma) everywhere."""
    found = valued(name, "truncate_only")
    np.testing.assert_allclose(found, np.full(len(found), 10.0), rtol=0.05)


@one
def test_values_do_not_bootstrap_at_terminations(name):
    found = valued(name, "terminate_only")
    left = len(found) - np.arange(len(found))
    np.testing.assert_allclose(found, (1 - 0.9**left) / (1 - 0.9), rtol=0.1)


@every
def test_of_two_ways_that_differ_in_their_ending_alone_each_has_its_value(name):
    """Terminated: 1. Truncated: 1 / (1 - gamma) = 10. Before, the better one's: 9."""
    # A faster actor may stay at the border that it meets first.
    changes = {"actor_learning_rate": 3e-4} if name in ("td3", "maddpg") else {}
    found = valued(name, "fork", [[1.0], [-1.0], [0.0]], **changes)
    np.testing.assert_allclose(found, [1.0, 10.0, 9.0], rtol=0, atol=0.5)


@pytest.mark.parametrize("name", of_each_kind(ALGORITHMS, tuple(name for name in ALGORITHMS if name not in SELDOM)))
@pytest.mark.parametrize(
    "world", [pytest.param("action_reward_continuous", marks=pytest.mark.slow), "obs_action_reward_continuous"]
)
def test_every_algorithm_finds_the_best_continuous_action(name, world):
    # Where every action ends the episode, a wide trust region drifts once all actions are good: what is left of the
    # normalised advantages is then the critic's error.
    changes = {"clip_eps": 0.05} if name == "fpo" else {}
    _, run = learn(name, f"probe/{world}", **changes)
    assert run.history[-1]["eval/return"] > -0.01  # minus the squared distance to the best action


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in CONTINUOUS_ALONE])
@pytest.mark.parametrize("world", [pytest.param("action_reward", marks=pytest.mark.slow), "obs_action_reward"])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fpo", "ppo"])
def test_fpo_keeps_two_modes_of_which_a_gaussian_takes_one(name):
    """With the presets, five seeds in one program: `rlx train fpo probe/two_modes --num-seeds 5`."""
    module, env = importlib.import_module(ALGORITHMS[name]), envs.make("probe/two_modes")
    train_config, config = tuned(env, module)
    wanted = {str(seed): (dataclasses.replace(train_config, seed=seed), config) for seed in range(5)}
    algorithm = module.make(config, env.spec, make_schedule(env, train_config).plan)
    for run in train_many(env, module, wanted, progress=Progress(quiet=True)).values():
        actions = algorithm.act(run.policy, (), jnp.zeros((4000, 1)), jax.random.key(0), "sample")[1]
        shares = np.asarray([(jnp.abs(actions - mode) < 0.3).mean() for mode in (-0.8, 0.8)])
        if name == "fpo":
            assert 0.3 <= shares.min() and shares.sum() > 0.9
            assert jax.vmap(lambda action: env.reward(None, action))(actions).mean() > 0.75  # uniform actions: 0.327
        else:
            assert shares.min() < 0.05 and shares.max() > 0.8
