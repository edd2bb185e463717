"""Environments around environments: fixed types, time limit, action repeat, action scaling.

Each is an Environment (`rlx.environment`) itself: pure, unbatched, never resetting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlx.environment import Environment, random_action, render
from rlx.errors import UserError, require
from rlx.types import Box, PyTree, TimeStep


def strong(tree: PyTree) -> PyTree:
    """The same shapes and dtypes, none of them weak."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def merge_types(what: str, first: PyTree, second: PyTree) -> Any:
    """Leafwise the dtype that holds both. Raises UserError naming the leaf if structures or shapes differ."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (first, second)]
    if structures[0] != structures[1]:
        paths = [{jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t)} for t in (first, second)]
        differing = ", ".join(sorted(paths[0] ^ paths[1])) or "its static parts"
        raise UserError(f"{what} has one structure after reset and another after step; they differ in {differing}.")

    def merge(path, x, y):
        if x.shape != y.shape:
            leaf = what + jax.tree_util.keystr(path)
            raise UserError(f"{leaf} has shape {x.shape} after reset and {y.shape} after step.")
        return jax.ShapeDtypeStruct(x.shape, x.dtype if x.dtype == y.dtype else jnp.promote_types(x.dtype, y.dtype))

    return jax.tree_util.tree_map_with_path(merge, first, second)


def cast(tree: PyTree, types: PyTree) -> PyTree:
    """Every leaf in the dtype of `types`, strongly typed."""

    def leaf(x, like):
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return x
        return jax.lax.convert_element_type(x, like.dtype)

    return jax.tree.map(leaf, tree, types)


class FixedPoint:
    """Makes reset and step agree: states and observations of one structure, shape, dtype and weak type.

    Where they differ, a compiled loop would compile again at its second call, or not at all. Rewards become float32,
    endings bool. `spec.obs` is found by tracing, so `env.spec.obs` may be None. Raises UserError naming the leaf if
    structures or shapes differ.
    """

    def __init__(self, env: Environment):
        self.env = env
        # Jitted, so that Python runs once through a physics engine however often the environment is traced.
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        key = jax.eval_shape(lambda: jax.random.key(0))
        action = jax.eval_shape(lambda key: random_action(env.spec, key), key)
        state, obs = strong(jax.eval_shape(self._reset, key, env.spec.params))
        for _ in range(4):  # a wider dtype of one leaf can widen another
            before = state
            after, timestep = jax.eval_shape(self._step, before, action, key)
            state = merge_types("state", before, after)
            if state == before:
                break
        obs = merge_types("final_obs", merge_types("obs", obs, timestep.obs), timestep.final_obs)
        reward: Any = jax.ShapeDtypeStruct(timestep.reward.shape, jnp.float32)
        flag: Any = jax.ShapeDtypeStruct((), jnp.bool_)
        self.state_types, self.obs_types = state, obs
        self.timestep_types = TimeStep(obs, reward, flag, flag, obs, strong(timestep.info))
        self.spec = dataclasses.replace(env.spec, obs=obs)

    def reset(self, key: jax.Array, params: PyTree):
        state, obs = self._reset(key, params)
        return cast(state, self.state_types), cast(obs, self.obs_types)

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        state, timestep = self._step(state, action, key)
        return cast(state, self.state_types), cast(timestep, self.timestep_types)

    def render(self, states: Sequence[Any]) -> Any:
        return render(self.env, states)


class TimeLimitState(NamedTuple):
    env: Any
    steps: jax.Array  # () int32: inner steps since reset


class TimeLimit:
    """`truncated` once `episode_length` inner steps are taken, unless the same step terminated.

    Raises UserError unless `episode_length` is a positive integer.
    """

    def __init__(self, env: Environment, episode_length: int):
        require(is_count(episode_length), "episode_length", episode_length, "a whole number of at least 1")
        self.env, self.episode_length = env, episode_length
        inner = env.spec.episode_length
        shortest = episode_length if inner is None else min(inner, episode_length)
        self.spec = dataclasses.replace(env.spec, episode_length=shortest)

    def reset(self, key: jax.Array, params: PyTree):
        state, obs = self.env.reset(key, params)
        return TimeLimitState(state, jnp.zeros((), jnp.int32)), obs

    def step(self, state: TimeLimitState, action: jax.Array, key: jax.Array):
        env_state, timestep = self.env.step(state.env, action, key)
        steps = state.steps + jnp.asarray(timestep.info.get("steps", 1)).astype(jnp.int32)
        over = timestep.truncated | (steps >= self.episode_length)
        return TimeLimitState(env_state, steps), timestep._replace(truncated=over & ~timestep.terminated)

    def render(self, states: Sequence[TimeLimitState]) -> Any:
        return render(self.env, [state.env for state in states])


class ActionRepeat:
    """One decision is up to `num_repeats` inner steps of the same action, fewer where the episode ends before.

    Rewards, and entries of `info` whose name begins with "reward", are summed undiscounted up to and including the
    first end; other entries, the observation and the state are those of the last step taken. `info["steps"]`: how many
    inner steps that was, () float32. Raises UserError unless `num_repeats` is a positive integer.
    """

    def __init__(self, env: Environment, num_repeats: int):
        require(is_count(num_repeats), "action_repeat", num_repeats, "a whole number of at least 1")
        self.env, self.num_repeats = env, num_repeats
        self.spec = dataclasses.replace(env.spec, action_repeat=num_repeats * env.spec.action_repeat)

    def reset(self, key: jax.Array, params: PyTree):
        return self.env.reset(key, params)

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        types = jax.eval_shape(self.env.step, state, action, key)[1]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
        start = nothing._replace(info={**nothing.info, "steps": jnp.zeros((), jnp.float32)})

        def again(carry, key):
            state, total = carry
            ended = total.terminated | total.truncated
            new_state, new = self.env.step(state, action, key)
            info = {k: total.info[k] + v if k.startswith("reward") else v for k, v in new.info.items()}
            info["steps"] = total.info["steps"] + new.info.get("steps", jnp.ones((), jnp.float32))
            new = new._replace(reward=total.reward + new.reward, info=info)
            return jax.tree.map(lambda x, y: jnp.where(ended, x, y), (state, total), (new_state, new)), None

        return jax.lax.scan(again, (state, start), jax.random.split(key, self.num_repeats))[0]

    def render(self, states: Sequence[Any]) -> Any:
        return render(self.env, states)


class ScaleAction:
    """Maps actions affinely from [-1, 1]^d to `low`..`high`, the bounds of `env`, each a number or d of them.

    Raises UserError if `env` takes no continuous actions, or the bounds are not finite and in order.
    """

    def __init__(self, env: Environment, low: float | Sequence[float], high: float | Sequence[float]):
        box = env.spec.action
        if not isinstance(box, Box):
            raise UserError(f"ScaleAction needs continuous actions; those of {type(env).__name__} are {box}.")
        lows, highs = (np.broadcast_to(np.asarray(x, np.float32), box.shape) for x in (low, high))
        in_order = bool(np.isfinite([lows, highs]).all() and (lows < highs).all())
        require(in_order, "action bounds", (low, high), "finite, and low below high")
        self.env, self.center, self.half_width = env, (highs + lows) / 2, (highs - lows) / 2
        bounds = [tuple(x.ravel().tolist()) for x in (lows, highs)]
        self.spec = dataclasses.replace(env.spec, action=Box(box.shape, low=bounds[0], high=bounds[1]))

    def reset(self, key: jax.Array, params: PyTree):
        return self.env.reset(key, params)

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        return self.env.step(state, jnp.asarray(self.center) + jnp.asarray(self.half_width) * action, key)

    def render(self, states: Sequence[Any]) -> Any:
        return render(self.env, states)


def is_count(value: Any) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
