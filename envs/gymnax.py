"""gymnax's classic control. Its `step` resets by itself and is not used: `step_env` keeps the last observation.

Overrides: `episode_length` and the scalar parameters of the environment (`gravity`, `max_torque`, ...), which are also
`spec.params`. gymnax keeps derived quantities apart: CartPole's `total_mass` and `polemass_length` do not follow its
`masspole`. Continuous actions are mapped from [-1, 1] to gymnax's bounds; `info` is empty.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

from envs.adapter import check_physics, foreign, limit_and_repeat, read_options
from envs.wrappers import FixedPoint, ScaleAction
from rlx.environment import Environment
from rlx.types import Box, Discrete, PyTree, Spec, TimeStep

FOREVER = np.iinfo(np.int32).max


class GymnaxState(NamedTuple):
    env: Any  # gymnax's own state
    params: Any  # gymnax's EnvParams, leaves float32 or int32


class Gymnax:
    """One gymnax environment, its native actions. `params` are gymnax's EnvParams, the time limit among them."""

    def __init__(self, env: Any, params: Any):
        self.env = env
        space = env.action_space(params)
        action = Discrete(int(space.n)) if isinstance(space, spaces.Discrete) else Box(tuple(space.shape))
        limit = int(params.max_steps_in_episode)
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32), params)
        self.spec = Spec(obs=None, action=action, episode_length=None if limit == FOREVER else limit, params=arrays)

    def reset(self, key: jax.Array, params: PyTree):
        with foreign():
            obs, state = self.env.reset_env(key, params)
        return GymnaxState(state, params), obs

    def step(self, state: GymnaxState, action: jax.Array, key: jax.Array):
        with foreign():
            obs, env_state, reward, terminated, _ = self.env.step_env(key, state.env, action, state.params)
            truncated = self.env.is_truncated(env_state, state.params) & ~terminated
        return GymnaxState(env_state, state.params), TimeStep(obs, reward, terminated, truncated, obs, {})


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `gymnax/<name>`. Raises UserError for an override that is no parameter of it."""
    full_name = f"gymnax/{name}"
    check_physics(full_name, physics, ())
    env, params = gymnax.make(name)
    fields = dataclasses.asdict(params)
    limit = fields.pop("max_steps_in_episode")
    scalars = {key: value for key, value in fields.items() if isinstance(value, int | float)}
    options = read_options(full_name, overrides, scalars, episode_length=limit)
    params = params.replace(max_steps_in_episode=options.episode_length or FOREVER, **options.rest)
    adapted: Any = Gymnax(env, params)
    if isinstance(adapted.spec.action, Box):
        space = env.action_space(params)
        adapted = ScaleAction(adapted, space.low, space.high)
    # The limit is among the parameters: gymnax's own clock keeps it.
    return limit_and_repeat(FixedPoint(adapted), options._replace(episode_length=None))
