"""Trajectories for tests of on-policy learners: observations at random, both kinds of ending."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rlx.algorithm import Plan
from rlx.types import Box, Discrete, Spec, Transition

CONTINUOUS = Spec(obs=jax.ShapeDtypeStruct((3,), jnp.float32), action=Box((2,)), episode_length=10)
DISCRETE = dataclasses.replace(CONTINUOUS, action=Discrete(3))
ASYMMETRIC = dataclasses.replace(
    CONTINUOUS,
    obs={"state": jax.ShapeDtypeStruct((3,), jnp.float32), "privileged_state": jax.ShapeDtypeStruct((5,), jnp.float32)},
)
PLAN = Plan(num_envs=4, unroll_length=6, num_iterations=10)


def draw_obs(spec, key, shape):
    leaves, tree = jax.tree.flatten(spec.obs)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([3 + 2 * jax.random.normal(k, shape + x.shape) for k, x in zip(keys, leaves, strict=True)])


def trajectory_of(algorithm, learner, spec, seed=0):
    """A trajectory acted by the policy over observations drawn at random, with both kinds of ending in it."""
    keys = jax.random.split(jax.random.key(seed), PLAN.unroll_length)
    memory = jax.vmap(algorithm.memory)(jax.random.split(jax.random.key(1), PLAN.num_envs))
    obs = draw_obs(spec, jax.random.key(2), (PLAN.num_envs,))
    steps = []
    for t, key in enumerate(keys):
        memory, action, extras = algorithm.act(algorithm.policy(learner, "explore"), memory, obs, key, "explore")
        next_obs = draw_obs(spec, key, (PLAN.num_envs,))
        terminated = jnp.arange(PLAN.num_envs) == t
        truncated = jnp.arange(PLAN.num_envs) == t - 2
        steps.append(Transition(obs, action, jnp.full(4, float(t)), terminated, truncated, next_obs, extras))
        done = terminated | truncated
        memory = jax.tree.map(lambda m, done=done: jnp.where(done[:, None], 0.0, m), memory)
        obs = draw_obs(spec, jax.random.fold_in(key, 1), (PLAN.num_envs,)) if done.any() else next_obs
    return jax.tree.map(lambda *x: jnp.stack(x), *steps)


def one_update(module, config, spec, iteration=0, seed=0):
    """The learner before, a trajectory of its policy, and what one update makes of them."""
    algorithm = module.make(config, spec, PLAN)
    learner = algorithm.init(jax.random.key(0))
    trajectory = trajectory_of(algorithm, learner, spec, seed)
    update = jax.jit(algorithm.update)
    return learner, trajectory, update(learner, trajectory, jnp.asarray(iteration), jax.random.key(3))
