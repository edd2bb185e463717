"""Classic control of gymnax 1.0. Its `step_env` is used, not its `step`, which resets by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp

from envs.wrappers import adapt, check_overrides
from rlx.environment import Environment
from rlx.errors import require
from rlx.types import Box, Discrete, PyTree, Spec, TimeStep


class GymnaxState(NamedTuple):
    env: Any
    params: PyTree  # gymnax's EnvParams of this episode


class Gymnax:
    """`spec.params` are gymnax's EnvParams: gravity, masses, lengths. Actions in native bounds."""

    def __init__(self, name: str):
        self._env, params = gymnax.make(name)
        space = self._env.action_space(params)
        action = Box(space.shape) if isinstance(space, gymnax.environments.spaces.Box) else Discrete(int(space.n))
        self.bounds = (space.low, space.high) if isinstance(action, Box) else (None, None)
        self.max_steps = int(params.max_steps_in_episode)
        # Time is the wrapper's business; here it never runs out.
        params = params.replace(max_steps_in_episode=jnp.iinfo(jnp.int32).max)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32), params)
        obs = jax.eval_shape(self._env.reset_env, jax.random.key(0), params)[0]
        self.spec = Spec(obs=jax.ShapeDtypeStruct(obs.shape, obs.dtype), action=action, params=params)

    def reset(self, key: jax.Array, params: PyTree) -> tuple[GymnaxState, jax.Array]:
        obs, state = self._env.reset_env(key, params)
        return GymnaxState(state, params), obs

    def step(self, state: GymnaxState, action: jax.Array, key: jax.Array) -> tuple[GymnaxState, TimeStep]:
        obs, env_state, reward, terminated, _ = self._env.step_env(key, state.env, action, state.params)
        reward = jnp.asarray(reward, jnp.float32).reshape(())
        never = jnp.zeros((), bool)
        return GymnaxState(env_state, state.params), TimeStep(
            obs, reward, jnp.asarray(terminated, bool), never, obs, {}
        )


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Overrides: `episode_length` (the task's own by default), `action_repeat`."""
    require(physics == "auto", "physics", physics, "gymnax has its own dynamics, so only auto")
    check_overrides(f"gymnax/{name}", overrides, ("episode_length", "action_repeat"))
    env = Gymnax(name)
    length = overrides.get("episode_length", env.max_steps)
    return adapt(env, length, overrides.get("action_repeat", 1), *env.bounds)
