"""Behaviour cloning by likelihood, flow and diffusion, of actions that have two modes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithm import Plan
from rlx.algorithms import bc, fpo, ppo
from rlx.learners import check_policy
from rlx.types import Box, Discrete, Spec, Transition, UserError

SPEC = Spec(obs=jax.ShapeDtypeStruct((1,), jnp.float32), action=Box((1,)))
PLAN = Plan(num_envs=256, unroll_length=1, num_iterations=1500)
CONFIG = bc.Config(num_minibatches=1, activation="relu", learning_rate=3e-3, anneal_lr=True, ema_decay=0.99)


def clone(config, actions, num_iterations=PLAN.num_iterations):
    """The algorithm, and the policy that has seen `actions(key, obs)` [B, 1] of observations in [0, 1]."""
    algorithm = bc.make(config, SPEC, PLAN)

    def iterate(state, i):
        obs_key, action_key, update_key = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 3)
        obs = jax.random.uniform(obs_key, (1, PLAN.num_envs, 1))
        zeros, never = jnp.zeros(obs.shape[:2]), jnp.zeros(obs.shape[:2], bool)
        trajectory = Transition(obs, actions(action_key, obs), zeros, never, never, obs, ())
        state, metrics = algorithm.update(state, trajectory, i, update_key)
        return state, metrics["loss"]

    state, losses = jax.jit(lambda s: jax.lax.scan(iterate, s, jnp.arange(num_iterations)))(
        algorithm.init(jax.random.key(0))
    )
    return algorithm, state, losses


def two_modes(key, obs):
    """-.8 or .8, each half of the time, whatever is seen."""
    return 0.8 * jax.random.rademacher(key, obs.shape, jnp.float32)


def draws(algorithm, state, mode="sample", obs=0.5, number=2000):
    policy = algorithm.policy(state, mode)
    return np.asarray(algorithm.act(policy, (), jnp.full((number, 1), obs), jax.random.key(9), mode)[1])[:, 0]


@pytest.mark.parametrize("change", [{"distribution": "flow"}, {"distribution": "diffusion", "num_denoising_steps": 10}])
def test_flows_and_diffusions_keep_both_modes(change):
    algorithm, state, losses = clone(dataclasses.replace(CONFIG, **change), two_modes)
    assert losses[-100:].mean() < losses[:10].mean()
    action = draws(algorithm, state)
    near = np.abs(np.abs(action) - 0.8) < 0.15
    assert near.mean() > 0.9 and 0.4 < (action > 0).mean() < 0.6


def test_a_gaussian_sits_between_the_modes():
    algorithm, state, _ = clone(CONFIG, two_modes, 500)
    assert abs(draws(algorithm, state, "greedy").mean()) < 0.1
    assert np.abs(np.abs(draws(algorithm, state)) - 0.8).mean() > 0.2


@pytest.mark.parametrize("distribution", ["flow", "diffusion"])
def test_greedy_actions_follow_what_is_seen(distribution):
    config = dataclasses.replace(CONFIG, distribution=distribution, num_denoising_steps=10, statistics="range")
    algorithm, state, _ = clone(config, lambda key, obs: obs - 0.5)
    found = [draws(algorithm, state, "greedy", obs, 1)[0] for obs in (0.1, 0.5, 0.9)]
    np.testing.assert_allclose(found, [-0.4, 0.0, 0.4], atol=0.08)


def test_evaluation_plays_averaged_weights():
    algorithm = bc.make(dataclasses.replace(CONFIG, ema_decay=0.9), SPEC, PLAN)
    _, state, _ = clone(dataclasses.replace(CONFIG, ema_decay=0.9), two_modes, 1)
    first = algorithm.init(jax.random.key(0)).params["actor"]
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, first, state.params["actor"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.average, expected)
    jax.tree.map(np.testing.assert_array_equal, algorithm.policy(state, "sample").params["actor"], state.average)


def test_the_rate_falls_along_half_a_cosine():
    """Adam's first step is as long as its rate: the last iteration's is nearly 0."""
    algorithm = bc.make(CONFIG, SPEC, PLAN)
    state = algorithm.init(jax.random.key(0))
    obs = jnp.ones((1, PLAN.num_envs, 1))
    zeros, never = jnp.zeros(obs.shape[:2]), jnp.zeros(obs.shape[:2], bool)
    trajectory = Transition(obs, 0.5 * obs, zeros, never, never, obs, ())
    moves = []
    for iteration in (0, 750, 1499):
        after, _ = algorithm.update(state, trajectory, jnp.asarray(iteration), jax.random.key(1))
        moves.append(float(jnp.abs(after.params["actor"]["raw_std"] - state.params["actor"]["raw_std"]).max()))
    assert moves == pytest.approx([3e-3, 1.5e-3, 0.0], abs=2e-5)


@pytest.mark.parametrize(
    ("module", "cloned", "finetuned"),
    [
        (ppo, {"distribution": "normal"}, ppo.Config(activation="relu")),
        (ppo, {"distribution": "tanh_normal", "state_dependent_std": True}, None),
        (fpo, {"distribution": "flow"}, fpo.Config(activation="relu")),
    ],
)
def test_finetuning_begins_at_the_cloned_policy(module, cloned, finetuned):
    config = dataclasses.replace(CONFIG, min_std=1e-3, **cloned)
    finetuned = finetuned or ppo.Config(activation="relu", **cloned)
    teacher, student = bc.make(config, SPEC, PLAN), module.make(finetuned, SPEC, PLAN)
    policy = teacher.policy(teacher.init(jax.random.key(3)), "greedy")
    check_policy(student, policy)
    learner, obs = student.init(jax.random.key(4), policy), jnp.ones((5, 1))
    for mode in ("greedy", "sample"):
        own, its = (
            algorithm.act(p, (), obs, jax.random.key(1), mode)[1]
            for algorithm, p in ((teacher, policy), (student, student.policy(learner, mode)))
        )
        np.testing.assert_allclose(own, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"distribution": "flaw"}, "distribution"),
        ({"statistics": "median"}, "statistics"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"distribution": "flow", "num_flow_steps": 0}, "num_flow_steps"),
        ({"distribution": "diffusion", "ddim_steps": 99}, "ddim_steps"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        bc.check(dataclasses.replace(CONFIG, **change), SPEC, PLAN)


def test_flows_of_discrete_actions_are_refused():
    with pytest.raises(UserError, match="continuous"):
        bc.check(dataclasses.replace(CONFIG, distribution="flow"), dataclasses.replace(SPEC, action=Discrete(3)), PLAN)
