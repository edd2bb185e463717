"""What the tests of off-policy learners share: small sizes, random trajectories, one update."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from rlx.algorithm import Plan
from rlx.types import Box, Spec, Transition

CONTINUOUS = Spec(obs=jax.ShapeDtypeStruct((3,), jnp.float32), action=Box((2,)), episode_length=10)
ASYMMETRIC = Spec(
    obs={
        "state": jax.ShapeDtypeStruct((3,), jnp.float32),
        "privileged_state": jax.ShapeDtypeStruct((5,), jnp.float32),
        "unused": jax.ShapeDtypeStruct((9,), jnp.float32),
    },
    action=Box((2,)),
    episode_length=10,
)
PLAN = Plan(num_envs=4, unroll_length=6, num_iterations=10)
SMALL = {
    "actor_hidden": (8,),
    "critic_hidden": (8,),
    "batch_size": 16,
    "utd_ratio": (2, 24),
    "replay_size": 100,
    "prefill_steps": 0,
}


def draw_obs(spec, key, shape):
    leaves, tree = jax.tree.flatten(spec.obs)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([3 + 2 * jax.random.normal(k, shape + x.shape) for k, x in zip(keys, leaves, strict=True)])


def trajectory_of(spec, seed=0, plan=PLAN):
    """Random from end to end, with both kinds of ending in it."""
    obs_key, next_key, action_key, reward_key, end_key = jax.random.split(jax.random.key(seed), 5)
    shape = (plan.unroll_length, plan.num_envs)
    action = jax.random.uniform(action_key, (*shape, 2), minval=-1.0, maxval=1.0)
    chance = jax.random.uniform(end_key, shape)
    obs, next_obs = draw_obs(spec, obs_key, shape), draw_obs(spec, next_key, shape)
    return Transition(obs, action, jax.random.normal(reward_key, shape), chance < 0.2, chance > 0.8, next_obs, ())


@functools.cache
def built(module, config, asymmetric=False):
    """The algorithm, its update, jitted once for all tests, and a learner."""
    algorithm = module.make(config, ASYMMETRIC if asymmetric else CONTINUOUS, PLAN)
    return algorithm, jax.jit(algorithm.update), algorithm.init(jax.random.key(0))  # jitted, it would compile each time


def one_update(module, config, asymmetric=False, iteration=0):
    """The algorithm, its learner before, and what one update makes of it: (state, metrics)."""
    algorithm, update, learner = built(module, config, asymmetric)
    trajectory = trajectory_of(ASYMMETRIC if asymmetric else CONTINUOUS)
    return algorithm, learner, update(learner, trajectory, jnp.int32(iteration), jax.random.key(3))


def constant_critic(critic, values):
    """Parameters of an ensemble of which critic i is `values[i]` everywhere."""
    critic = jax.tree.map(jnp.zeros_like, critic)
    critic["params"]["output"]["bias"] = jnp.asarray(values, jnp.float32)[:, None]
    return critic
