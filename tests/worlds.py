"""Small environments whose every number is known, and an algorithm that does what it is told, for tests of the core."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlx.algorithm import Algorithm, Plan
from rlx.types import Box, Discrete, Spec, TimeStep


class CounterState(NamedTuple):
    t: jax.Array
    start: jax.Array  # where the episode began: drawn at reset, so that resets can be told apart


class Counter:
    """obs = [start, t]; reward = t; ends after `length` steps in the way that `ending` names."""

    def __init__(
        self,
        length: int = 3,
        ending: str = "truncated",
        nan_at: float = jnp.inf,
        action: Box | Discrete = Box((1,)),  # noqa: B008  (frozen)
        asymmetric: bool = False,
    ):
        self.length, self.ending, self.nan_at, self.asymmetric = length, ending, nan_at, asymmetric
        obs = jax.ShapeDtypeStruct((2,), jnp.float32)
        obs = {"state": obs, "privileged_state": jax.ShapeDtypeStruct((3,), jnp.float32)} if asymmetric else obs
        self.spec = Spec(obs=obs, action=action, episode_length=length)

    def obs(self, state: CounterState) -> Any:
        obs = jnp.stack([state.start, state.t.astype(jnp.float32)])
        return {"state": obs, "privileged_state": jnp.append(obs, 1.0)} if self.asymmetric else obs

    def reset(self, key: jax.Array, params: Any):
        state = CounterState(jnp.zeros((), jnp.int32), jax.random.uniform(key))
        return state, self.obs(state)

    def step(self, state: CounterState, action: jax.Array, key: jax.Array):
        state = state._replace(t=state.t + 1)
        ended = state.t >= self.length
        never = jnp.zeros((), bool)
        obs = jax.tree.map(lambda x: jnp.where(state.start > self.nan_at, jnp.nan, x), self.obs(state))
        terminated, truncated = (ended, never) if self.ending == "terminated" else (never, ended)
        return state, TimeStep(
            obs, state.t.astype(jnp.float32), terminated, truncated, obs, {"t": state.t.astype(jnp.float32)}
        )


class ConstantPolicy(NamedTuple):
    bias: jax.Array


def constant_algorithm(plan: Plan, bias: float = 0.5) -> Algorithm:
    """Acts `bias` + noise, remembers how many steps the episode has, learns nothing but counts its updates."""

    def init(key, policy=None):
        return ConstantPolicy(jnp.full((), bias, jnp.float32)) if policy is None else policy

    def act(policy, memory, obs, key, mode):
        noise = 0.0 if mode == "greedy" else 0.1 * jax.random.normal(key, (obs.shape[0], 1))
        action = policy.bias.reshape(1, 1) + jnp.zeros((obs.shape[0], 1)) + noise
        return memory + 1, action, memory

    def update(learner, trajectory, iteration, key):
        mean = trajectory.obs.mean()
        return ConstantPolicy(learner.bias + 1e-3 * mean), {"mean_obs": mean}

    return Algorithm(init, lambda learner, mode: learner, lambda key: jnp.zeros((), jnp.int32), act, update)
