"""Environments of rlx as Gymnasium's: `envs.to_gymnasium` makes one instance, `envs.to_gymnasium_vector` many.

Spaces follow the environment's Spec. Continuous actions are Box(-1, 1), as everywhere in rlx: the environment itself
maps them to its native bounds, and what lies outside is clipped. Observations are boxes without bounds, for a Spec has
none; mappings of them are Dict spaces. `info` holds the environment's own. Games of several agents are refused:
an environment of Gymnasium is one agent's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rlx.environment import Environment, EnvState, real_time, render
from rlx.errors import is_whole, require
from rlx.types import Box, PyTree, Spec, TimeStep

METADATA: dict[str, Any] = {"render_modes": ["rgb_array"]}


class Playing(NamedTuple):
    """B episodes; leaves [B, ...]."""

    env: EnvState
    obs: PyTree
    ended: jax.Array  # [B] bool


class GymnasiumEnv(gymnasium.Env):
    """One instance; `reset` and `step` are compiled at their first calls. Made by `envs.to_gymnasium`."""

    metadata = METADATA  # of an instance with its `render_fps`, one frame a decision

    def __init__(self, env: Environment, params: PyTree = None, render_mode: str | None = None):
        check(env, render_mode)
        self.observation_space, self.action_space = spaces_of(env.spec)
        self._env, self.render_mode = env, render_mode
        self.metadata = {**self.metadata, "render_fps": real_time(env.spec)}
        self._params = env.spec.params if params is None else params
        self._reset = jax.jit(lambda seed, params: env.reset(jax.random.key(seed), params))
        self._step = jax.jit(lambda state, action, seed: env.step(state, action, jax.random.key(seed)))
        self._state: EnvState = None
        self._ended = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begins an episode. `seed` decides it and all that comes behind it. Raises UserError for `options`."""
        require(not options, "options", options, "none")
        super().reset(seed=seed)
        self._state, obs = self._reset(draw(self.np_random), self._params)
        self._ended = False
        return on_host(obs), {}

    def step(self, action: Any):
        """Raises ResetNeeded behind an ending, UserError for what is not in `action_space`."""
        if self._ended:
            raise ResetNeeded("the episode has ended, or none has begun: call reset")
        action = fit_action(action, self.action_space)
        self._state, timestep = self._step(self._state, action, draw(self.np_random))
        obs, reward, terminated, truncated, info = on_host(outcome(timestep))
        self._ended = bool(terminated | truncated)
        info = {name: value if value.ndim else value.item() for name, value in info.items()}
        return obs, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """A frame [H, W, 3] uint8. Raises ResetNeeded before the first reset, UserError where there is none."""
        if self.render_mode is None:
            return None
        if self._state is None:
            raise ResetNeeded("no episode has begun: call reset")
        return np.asarray(render(self._env, [jax.device_get(self._state)])[0])


class GymnasiumVectorEnv(gymnasium.vector.VectorEnv):
    """Many instances as one compiled program. Made by `envs.to_gymnasium_vector`.

    Autoreset mode NEXT_STEP, Gymnasium's default: the step behind an ending ignores its action and returns a new
    episode's first observation with reward 0. Every reset is a true one; it runs only in steps that have one to do.
    """

    metadata = {**METADATA, "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, env: Environment, num_envs: int, params: PyTree = None, render_mode: str | None = None):
        check(env, render_mode)
        require(is_whole(num_envs, 1), "num_envs", num_envs, "a whole number of at least 1")
        self.single_observation_space, self.single_action_space = spaces_of(env.spec)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._env, self.num_envs, self.render_mode = env, num_envs, render_mode
        self.metadata = {**self.metadata, "render_fps": real_time(env.spec)}
        self._params = env.spec.params if params is None else params
        self._begin, self._advance = jax.jit(self._begin_all), jax.jit(self._step_all)
        self._playing: Playing | None = None

    def _begin_all(self, seed: jax.Array, params: PyTree) -> Playing:
        keys = jax.random.split(jax.random.key(seed), self.num_envs)
        state, obs = jax.vmap(self._env.reset, (0, None))(keys, params)
        return Playing(state, obs, jnp.zeros(self.num_envs, bool))

    def _step_all(self, now: Playing, actions: jax.Array, seeds: jax.Array, params: PyTree):
        """What comes of `now`, what Gymnasium's `step` returns, and which instances played [B]."""
        keys = jax.random.split(jax.random.key(seeds[0]), self.num_envs)
        state, timestep = jax.vmap(self._env.step)(now.env, actions, keys)
        obs, reward, terminated, truncated, info = outcome(timestep)
        stepped = Playing(state, obs, terminated | truncated)
        begun = jax.lax.cond(now.ended.any(), lambda: self._begin_all(seeds[1], params), lambda: stepped)

        def choose(ended: jax.Array, new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: jnp.where(ended, x, y), new, old)

        # What was stepped behind an ending may not even be finite: it is replaced whole.
        later = jax.vmap(choose)(now.ended, begun, stepped)
        endings = terminated & ~now.ended, truncated & ~now.ended
        return later, (later.obs, jnp.where(now.ended, 0.0, reward), *endings, info), ~now.ended

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Begins all episodes; `seed` decides them and whatever comes behind them. Raises UserError for `options`."""
        require(not options, "options", options, "none; resets of some instances alone are not to be had")
        super().reset(seed=seed)
        self._playing = self._begin(draw(self.np_random), self._params)
        return on_host(self._playing.obs), {}

    def step(self, actions: Any):
        """Raises ResetNeeded before the first reset, UserError for what is not in `action_space`."""
        if self._playing is None:
            raise ResetNeeded("no episode has begun: call reset")
        actions = fit_action(actions, self.action_space)
        seeds = np.array([draw(self.np_random), draw(self.np_random)])
        self._playing, result, played = self._advance(self._playing, actions, seeds, self._params)
        obs, reward, terminated, truncated, info = on_host(result)
        played = np.array(played)
        info |= {f"_{name}": played.copy() for name in info}
        return obs, reward, terminated, truncated, info

    def render(self) -> tuple[Any, ...] | None:
        """A frame [H, W, 3] uint8 of each. Raises ResetNeeded before the first reset, UserError where there is none."""
        if self.render_mode is None:
            return None
        if self._playing is None:
            raise ResetNeeded("no episode has begun: call reset")
        states = jax.device_get(self._playing.env)
        return tuple(render(self._env, [jax.tree.map(lambda x: x[i], states) for i in range(self.num_envs)]))  # noqa: B023


def check(env: Environment, render_mode: str | None) -> None:
    """Raises UserError for what Gymnasium has no environment of."""
    agents = env.spec.num_agents
    require(agents == 1, "num_agents", agents, "1: an environment of Gymnasium is one agent's")
    require(render_mode in (None, "rgb_array"), "render_mode", render_mode, "None or 'rgb_array'")


def spaces_of(spec: Spec) -> tuple[spaces.Space, spaces.Space]:
    """Of observations and actions."""

    def observations(tree: PyTree) -> spaces.Space:
        if isinstance(tree, Mapping):
            return spaces.Dict({name: observations(leaf) for name, leaf in tree.items()})
        if jnp.issubdtype(tree.dtype, jnp.floating):
            return spaces.Box(-np.inf, np.inf, tree.shape, tree.dtype)
        low, high = (0, 1) if tree.dtype == bool else (np.iinfo(tree.dtype).min, np.iinfo(tree.dtype).max)
        return spaces.Box(low, high, tree.shape, tree.dtype)

    action = spec.action
    if isinstance(action, Box):
        return observations(spec.obs), spaces.Box(-1.0, 1.0, action.shape, np.float32)
    return observations(spec.obs), spaces.Discrete(action.num_values)


def draw(generator: np.random.Generator) -> np.uint32:
    """The seed of a key."""
    return generator.integers(2**32, dtype=np.uint32)


def outcome(timestep: TimeStep) -> tuple[Any, ...]:
    """What `step` of Gymnasium returns."""
    return timestep.final_obs, timestep.reward, timestep.terminated, timestep.truncated, dict(timestep.info)


def on_host(tree: PyTree) -> Any:
    """Copies that can be written to: jax's own views cannot, of which torch warns."""
    return jax.tree.map(np.array, jax.device_get(tree))


def fit_action(action: Any, space: spaces.Space) -> np.ndarray:
    """`action` as the environment takes it: clipped to a box, or int32. Raises UserError for what is not in `space`."""
    given = np.asarray(action)
    if isinstance(space, spaces.Box) and given.shape == space.shape:
        given = np.clip(given.astype(space.dtype), space.low, space.high)
    elif np.issubdtype(given.dtype, np.integer):
        given = given.astype(space.dtype)  # of any width: a policy may give its own
    require(space.contains(given), "action", action, f"in {space}")
    return given.astype(np.float32 if isinstance(space, spaces.Box) else np.int32)
