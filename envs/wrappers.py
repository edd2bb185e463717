"""Environments around environments: fixed types, time limit, action repeat and chunk, action scaling, randomisation.

Each is an Environment (`rlx.environment`) itself: pure, unbatched, never resetting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlx.environment import Environment, random_action, render
from rlx.errors import UserError, is_whole, require
from rlx.types import Box, PyTree, Spec, TimeStep


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


class Types(NamedTuple):
    """What reset and step return."""

    state: Any
    obs: PyTree
    timestep: TimeStep


def signature(tree: PyTree) -> Any:
    """What tells trees of different structures, shapes and dtypes apart."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((jnp.shape(x), jax.dtypes.result_type(x)) for x in leaves)


class Wrapper:
    """What an environment around `env` hands on, unless it has its own."""

    env: Environment
    spec: Spec

    def reset(self, key: jax.Array, params: PyTree) -> tuple[Any, PyTree]:
        return self.env.reset(key, params)

    def step(self, state: Any, action: jax.Array, key: jax.Array) -> tuple[Any, TimeStep]:
        return self.env.step(state, action, key)

    def render(self, states: Sequence[Any], page: float | None = None) -> Any:
        return render(self.env, states, page)


class FixedPoint(Wrapper):
    """Makes reset and step agree: states and observations of one structure, shape, dtype and weak type.

    Where they differ, a compiled loop would compile again at its second call, or not at all. Rewards become float32,
    endings bool. `spec.obs` is found by tracing, so `env.spec.obs` may be None. `reset` takes params of any structure
    that `env` takes; the state's types follow. Raises UserError naming the leaf if structures or shapes differ.
    """

    def __init__(self, env: Environment):
        self.env = env
        # Jitted, so that Python runs once through a physics engine however often the environment is traced.
        self._reset, self._step = jax.jit(env.reset), jax.jit(env.step)
        self._of_params: dict[Any, Types] = {}
        self._of_state: dict[Any, Types] = {}
        self.spec = dataclasses.replace(env.spec, obs=self._types(env.spec.params).obs)

    def _types(self, params: PyTree) -> Types:
        """The types under `params`, found once for each signature of them."""
        if signature(params) not in self._of_params:
            types = self._find_types(params)
            self._of_params[signature(params)] = self._of_state[signature(types.state)] = types
        return self._of_params[signature(params)]

    def _find_types(self, params: PyTree) -> Types:
        key = jax.eval_shape(lambda: jax.random.key(0))
        action = jax.eval_shape(lambda key: random_action(self.env.spec, key), key)
        state, obs = strong(jax.eval_shape(self._reset, key, params))
        for _ in range(4):  # a wider dtype of one leaf can widen another
            before = state
            after, timestep = jax.eval_shape(self._step, before, action, key)
            state = merge_types("state", before, after)
            if signature(state) == signature(before):
                break
        obs = merge_types("final_obs", merge_types("obs", obs, timestep.obs), timestep.final_obs)
        reward: Any = jax.ShapeDtypeStruct(timestep.reward.shape, jnp.float32)
        flag: Any = jax.ShapeDtypeStruct((), jnp.bool_)
        return Types(state, obs, TimeStep(obs, reward, flag, flag, obs, strong(timestep.info)))

    def reset(self, key: jax.Array, params: PyTree):
        types = self._types(params)
        state, obs = self._reset(key, params)
        return cast(state, types.state), cast(obs, types.obs)

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        types = self._of_state.get(signature(state)) or self._types(self.spec.params)
        state, timestep = self._step(state, action, key)
        return cast(state, types.state), cast(timestep, types.timestep)


class TimeLimitState(NamedTuple):
    env: Any
    steps: jax.Array  # () int32: inner steps since reset


class TimeLimit(Wrapper):
    """`truncated` once `episode_length` inner steps are taken, unless the same step terminated.

    Raises UserError unless `episode_length` is a positive integer.
    """

    def __init__(self, env: Environment, episode_length: int):
        require(is_whole(episode_length, 1), "episode_length", episode_length, "a whole number of at least 1")
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

    def render(self, states: Sequence[TimeLimitState], page: float | None = None) -> Any:
        return render(self.env, [state.env for state in states], page)


def play(step: Callable[[Any, Any], tuple[Any, TimeStep]], state: Any, inputs: PyTree) -> tuple[Any, TimeStep]:
    """`step(state, input)` for `inputs` [n, ...] in turn, up to and including the first end, as one decision.

    Rewards, and entries of `info` whose name begins with "reward", are summed undiscounted; other entries, the
    observation and the state are those of the last step taken. `info["steps"]`: how many inner steps that was, ()
    float32.
    """
    types = jax.eval_shape(lambda state, inputs: step(state, jax.tree.map(lambda x: x[0], inputs))[1], state, inputs)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    start = nothing._replace(info={**nothing.info, "steps": jnp.zeros((), jnp.float32)})

    def advance(carry, inputs):
        state, total = carry
        ended = total.terminated | total.truncated
        new_state, new = step(state, inputs)
        info = {k: total.info[k] + v if k.startswith("reward") else v for k, v in new.info.items()}
        info["steps"] = total.info["steps"] + new.info.get("steps", jnp.ones((), jnp.float32))
        new = new._replace(reward=total.reward + new.reward, info=info)
        return jax.tree.map(lambda x, y: jnp.where(ended, x, y), (state, total), (new_state, new)), None

    return jax.lax.scan(advance, (state, start), inputs)[0]


class ActionRepeat(Wrapper):
    """One decision is up to `num_repeats` inner steps of the same action, fewer where the episode ends before.

    Rewards and `info` are those of `play`. Raises UserError unless `num_repeats` is a positive integer, and around
    action chunks.
    """

    def __init__(self, env: Environment, num_repeats: int):
        require(is_whole(num_repeats, 1), "action_repeat", num_repeats, "a whole number of at least 1")
        # Around chunks no `spec` could say what one action means, by which data sets are compared.
        require(env.spec.action_chunk == 1, "action_repeat", num_repeats, "it goes inside of action chunks, not around")
        self.env, self.num_repeats = env, num_repeats
        self.spec = dataclasses.replace(env.spec, action_repeat=num_repeats * env.spec.action_repeat)

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        keys = jax.random.split(key, self.num_repeats)
        return play(lambda state, key: self.env.step(state, action, key), state, keys)


class ActionChunk(Wrapper):
    """One decision is `size` inner actions, played open loop (Ren et al. 2024, arXiv 2409.00588).

    Actions are [size * a], inner action i at [i * a : (i + 1) * a]. Those behind an end are not played. Rewards and
    `info` are those of `play`. Raises UserError unless `size` is a positive integer and the actions of `env` are
    continuous vectors [a].
    """

    def __init__(self, env: Environment, size: int):
        require(is_whole(size, 1), "action_chunk", size, "a whole number of at least 1")
        box = env.spec.action
        if not isinstance(box, Box) or len(box.shape) != 1:
            raise UserError(f"action_chunk = {size} needs continuous actions [a]; those of the environment are {box}.")
        self.env, self.size = env, size
        low, high = (x * size if isinstance(x, tuple) else x for x in (box.low, box.high))
        self.spec = dataclasses.replace(
            env.spec,
            action=Box((size * box.shape[0],), low, high),
            action_repeat=size * env.spec.action_repeat,
            action_chunk=size * env.spec.action_chunk,
        )

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        inputs = action.reshape(self.size, -1), jax.random.split(key, self.size)
        return play(lambda state, inputs: self.env.step(state, *inputs), state, inputs)


class ScaleAction(Wrapper):
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

    def step(self, state: Any, action: jax.Array, key: jax.Array):
        return self.env.step(state, jnp.asarray(self.center) + jnp.asarray(self.half_width) * action, key)


class DomainRandomization(Wrapper):
    """Every episode is played under params of its own, `draw(key)`, which the state keeps until the episode ends.

    `draw`: a pure function from a key to params. Where it returns a mapping and the environment's params are one, as in
    the suites playground and brax ({"body_mass": [nbody], "opt.gravity": [3], ...}: `envs.physics.with_overrides`), it
    replaces those entries alone; else it replaces the params, and must return them whole. What it draws comes from the
    key of the reset: with the source's reset pool each pool state has its own draw, shared by the episodes of the four
    epochs that it stays; with reset="always" every episode has one of its own. An evaluation draws too, the same at
    each visit.

    `num_variants` K: each reset takes, at random, one of K draws that `seed` fixes for good, whatever the run's own
    seed. `spec` is that of `env`: `spec.params` stays the default, which `draw` builds upon.

    Raises UserError unless `num_variants` is None or a positive integer, or if `draw` returns params of another
    structure than the environment's.
    """

    def __init__(
        self, env: Environment, draw: Callable[[jax.Array], PyTree], num_variants: int | None = None, seed: int = 0
    ):
        counted = num_variants is None or is_whole(num_variants, 1)
        require(counted, "num_variants", num_variants, "a whole number of at least 1, or None")
        self.env, self.draw, self.num_variants, self.seed, self.spec = env, draw, num_variants, seed, env.spec
        jax.eval_shape(self.params, jax.eval_shape(lambda: jax.random.key(0)), env.spec.params)

    def params(self, key: jax.Array, params: PyTree) -> PyTree:
        """Those of an episode whose reset was given `params`."""
        if self.num_variants is not None:
            variant = jax.random.randint(key, (), 0, self.num_variants)
            key = jax.random.fold_in(jax.random.key(self.seed), variant)
        drawn = self.draw(key)
        if isinstance(params, Mapping) and isinstance(drawn, Mapping):
            return {**params, **drawn}
        structures: list[Any] = [jax.tree.structure(tree) for tree in (drawn, params)]
        if structures[0] != structures[1]:
            raise UserError(
                f"the draw has the structure {structures[0]}; the environment's params are {structures[1]}."
            )
        return drawn

    def reset(self, key: jax.Array, params: PyTree):
        draw_key, reset_key = jax.random.split(key)
        return self.env.reset(reset_key, self.params(draw_key, params))
