"""What the tests of off-policy learners share: small sizes, random trajectories, one update."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithm import Plan
from rlx.distributions import Normal
from rlx.types import Box, Discrete, Spec, Transition

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
TEAM = Spec(  # two agents, the second with fewer observations and actions
    obs={"agents": jax.ShapeDtypeStruct((2, 4), jnp.float32), "state": jax.ShapeDtypeStruct((5,), jnp.float32)},
    action=Box((2, 3)),
    num_agents=2,
    obs_mask=np.array([[True] * 4, [True, True, False, False]]),
    action_mask=np.array([[True, True, True], [True, False, False]]),
    episode_length=10,
)
DISCRETE_TEAM = dataclasses.replace(
    TEAM, action=Discrete(3, (2,)), action_mask=np.array([[True] * 3, [True, True, False]])
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
    if isinstance(spec.action, Discrete):
        action = jax.random.randint(action_key, (*shape, *spec.action.shape), 0, spec.action.num_values)
    else:
        action = jax.random.uniform(action_key, (*shape, *spec.action.shape), minval=-1.0, maxval=1.0)
    chance = jax.random.uniform(end_key, shape)
    obs, next_obs = draw_obs(spec, obs_key, shape), draw_obs(spec, next_key, shape)
    return Transition(obs, action, jax.random.normal(reward_key, shape), chance < 0.2, chance > 0.8, next_obs, ())


def alike(trajectory):
    """Its first transition everywhere: whatever is drawn of it, batches are the same."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:1, :1], x.shape), trajectory)


@pytest.fixture
def same_noise(monkeypatch):
    """Normals draw the same whatever their key, and each entry and agent of a batch too."""

    def sample(self, key):
        noise = 1.5 * jnp.sin(1.0 + jnp.arange(len(self.mean), dtype=jnp.float32))
        return self.mean + self.std * noise.reshape(-1, *(1,) * (self.mean.ndim - 1))

    monkeypatch.setattr(Normal, "sample", sample)


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


def entropy_of_squashed_normal(std, dims):
    """Of tanh(u), u normal about 0: by quadrature."""
    u = np.linspace(-12 * std, 12 * std, 20_001)
    density = np.exp(-0.5 * (u / std) ** 2) / (std * np.sqrt(2 * np.pi))
    log_det = np.log(np.maximum(1 - np.tanh(u) ** 2, 1e-300))
    return dims * (0.5 * np.log(2 * np.pi * np.e * std**2) + np.sum(density * log_det) * (u[1] - u[0]))
