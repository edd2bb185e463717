"""Wrappers: an environment in, an environment out. Auto reset is not one: it belongs to the source (rlx.rollout)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlx.environment import Environment, EnvState, random_action, render
from rlx.errors import require, unknown
from rlx.types import Box, PyTree, Spec, TimeStep


class TimeLimitState(NamedTuple):
    env: EnvState
    steps: jax.Array  # () int32: inner steps of this episode


class TimeLimit:
    """Truncates an episode after `episode_length` inner steps. A termination in that step wins."""

    def __init__(self, env: Environment, episode_length: int):
        require(episode_length >= 1, "episode_length", episode_length, "at least 1")
        self._env, self._limit = env, episode_length
        self.spec = dataclasses.replace(env.spec, episode_length=episode_length)

    def reset(self, key: jax.Array, params: PyTree) -> tuple[TimeLimitState, PyTree]:
        state, obs = self._env.reset(key, params)
        return TimeLimitState(state, jnp.zeros((), jnp.int32)), obs

    def step(self, state: TimeLimitState, action: jax.Array, key: jax.Array) -> tuple[TimeLimitState, TimeStep]:
        env_state, timestep = self._env.step(state.env, action, key)
        steps = state.steps + 1
        truncated = (timestep.truncated | (steps >= self._limit)) & ~timestep.terminated
        return TimeLimitState(env_state, steps), timestep._replace(truncated=truncated)

    def render(self, states: Sequence[TimeLimitState]) -> Any:
        return render(self._env, [state.env for state in states])


class ActionRepeat:
    """One decision takes up to `repeat` inner steps: rewards are summed undiscounted, nothing counts behind an end.

    `info["steps"]` is the number of inner steps taken; the rest of `info` is that of the last one.
    """

    def __init__(self, env: Environment, repeat: int):
        require(repeat >= 1, "action_repeat", repeat, "at least 1")
        self._env, self._repeat = env, repeat
        self.spec = dataclasses.replace(env.spec, action_repeat=env.spec.action_repeat * repeat)

    def reset(self, key: jax.Array, params: PyTree) -> tuple[EnvState, PyTree]:
        return self._env.reset(key, params)

    def step(self, state: EnvState, action: jax.Array, key: jax.Array) -> tuple[EnvState, TimeStep]:
        def inner(carry, key):
            state, last = carry
            ended = last.terminated | last.truncated
            new_state, timestep = self._env.step(state, action, key)
            info = dict(timestep.info)
            info["steps"] = last.info["steps"] + info.get("steps", jnp.ones((), jnp.float32))
            timestep = timestep._replace(reward=last.reward + timestep.reward, info=info)
            return jax.tree.map(lambda old, new: jnp.where(ended, old, new), carry, (new_state, timestep)), None

        keys = jax.random.split(key, self._repeat)
        state, first = self._env.step(state, action, keys[0])
        first = first._replace(info={"steps": jnp.ones((), jnp.float32), **first.info})
        (state, timestep), _ = jax.lax.scan(inner, (state, first), keys[1:])
        return state, timestep

    def render(self, states: Sequence[EnvState]) -> Any:
        return render(self._env, states)


class ScaleAction:
    """Actions in [-1, 1]^d from outside become `low` .. `high` inside, by an affine map (clipped to the box first)."""

    def __init__(self, env: Environment, low: Any, high: Any):
        assert isinstance(env.spec.action, Box)
        shape = env.spec.action.shape
        self._env = env
        self._low = np.broadcast_to(np.asarray(low, np.float32), shape)
        self._high = np.broadcast_to(np.asarray(high, np.float32), shape)
        finite = bool(np.isfinite(self._low).all() and np.isfinite(self._high).all())
        require(finite and bool((self._low < self._high).all()), "low, high", (low, high), "finite, low below high")
        bounds = (tuple(bound.ravel().tolist()) for bound in (self._low, self._high))
        self.spec = dataclasses.replace(env.spec, action=Box(shape, *bounds))

    def reset(self, key: jax.Array, params: PyTree) -> tuple[EnvState, PyTree]:
        return self._env.reset(key, params)

    def step(self, state: EnvState, action: jax.Array, key: jax.Array) -> tuple[EnvState, TimeStep]:
        unit = 0.5 * (jnp.clip(action, -1.0, 1.0) + 1.0)
        native = jnp.asarray(self._low) + unit * jnp.asarray(self._high - self._low)
        return self._env.step(state, native, key)

    def render(self, states: Sequence[EnvState]) -> Any:
        return render(self._env, states)


class FixedPoint:
    """Makes `reset` return what `step` returns in dtype and weak type, so that a loop over it compiles once.

    `spec.obs` is measured with `jax.eval_shape`. Used by the adapters of suites that others keep.
    """

    def __init__(self, env: Environment):
        self._env = env
        # Jitted, so that Python runs once through a physics engine however often the environment is traced.
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state, obs = jax.eval_shape(self._reset, key, env.spec.params)
        action = jax.eval_shape(lambda key: random_action(env.spec, key), key)
        after, timestep = jax.eval_shape(self._step, state, action, key)
        self._state = jax.tree.map(_common_dtype, state, after)
        self._obs = jax.tree.map(_common_dtype, obs, timestep.obs)
        spec_obs = jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), obs, self._obs)
        self.spec: Spec = dataclasses.replace(env.spec, obs=spec_obs)

    def reset(self, key: jax.Array, params: PyTree) -> tuple[EnvState, PyTree]:
        state, obs = self._reset(key, params)
        return _cast(state, self._state), _cast(obs, self._obs)

    def step(self, state: EnvState, action: jax.Array, key: jax.Array) -> tuple[EnvState, TimeStep]:
        state, timestep = self._step(state, action, key)
        timestep = timestep._replace(
            obs=_cast(timestep.obs, self._obs),
            final_obs=_cast(timestep.final_obs, self._obs),
            reward=jax.lax.convert_element_type(timestep.reward, jnp.float32),
            info={k: jax.lax.convert_element_type(v, jnp.float32) for k, v in timestep.info.items()},
        )
        return _cast(state, self._state), timestep

    def render(self, states: Sequence[EnvState]) -> Any:
        return render(self._env, states)


def _common_dtype(a: Any, b: Any) -> Any:
    return a.dtype if a.dtype == b.dtype else jnp.promote_types(a.dtype, b.dtype)


def _cast(tree: PyTree, dtypes: PyTree) -> PyTree:
    def cast(x, dtype):
        return x if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(x, dtype)

    return jax.tree.map(cast, tree, dtypes)


def adapt(
    env: Environment, episode_length: int | None, action_repeat: int = 1, low: Any = None, high: Any = None
) -> Environment:
    """What every adapter puts around a suite's own environment: dtypes, action bounds, time limit, repeat, in order.

    `episode_length` in inner steps; 0 or None for no limit.
    """
    env = FixedPoint(env)
    if low is not None:
        env = ScaleAction(env, low, high)
    if episode_length:
        env = TimeLimit(env, episode_length)
    return ActionRepeat(env, action_repeat) if action_repeat != 1 else env


def check_overrides(name: str, overrides: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raises UserError, with close matches, for an override that `name` does not have."""
    for key in overrides:
        if key not in allowed:
            raise unknown(f"Override of {name}", key, allowed)
