"""MuJoCo Playground. Its wrappers are not used: they throw the terminal observation away and reuse reset states."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from mujoco_playground import registry
from mujoco_playground._src import mjx_env

from envs.names import DM_CONTROL
from envs.wrappers import adapt, check_overrides
from rlx.environment import Environment
from rlx.errors import UserError, require
from rlx.types import Box, PyTree, Spec, TimeStep

IMPLEMENTATIONS = {"auto": "jax", "mjx": "jax"}  # Playground's own default is Warp, on a CPU the slowest


class Playground:
    """One Playground task. Its state is Playground's State; every task takes actions in [-1, 1]."""

    def __init__(self, env: mjx_env.MjxEnv):
        self._env = env
        obs = jax.eval_shape(env.reset, jax.random.key(0)).obs
        self.spec = Spec(obs=obs, action=Box((env.action_size,)))

    def reset(self, key: jax.Array, params: PyTree) -> tuple[mjx_env.State, PyTree]:
        state = self._env.reset(key)
        return state, state.obs

    def step(self, state: mjx_env.State, action: jax.Array, key: jax.Array) -> tuple[mjx_env.State, TimeStep]:
        state = self._env.step(state, action)
        never = jnp.zeros((), bool)
        return state, TimeStep(state.obs, state.reward, state.done > 0, never, state.obs, dict(state.metrics))

    def render(self, states: Sequence[mjx_env.State]) -> Any:
        """Needs a GL library: see `rlx doctor`."""
        return self._env.render(jax.device_get(list(states)))


def find_menagerie() -> None:
    """Points Playground at a local copy of the robot models, and never lets it start a download.

    Raises UserError if there is none.
    """
    own = os.environ.get("RLX_MENAGERIE_PATH")
    if own:
        mjx_env.MENAGERIE_PATH = type(mjx_env.MENAGERIE_PATH)(own)
    path = Path(mjx_env.MENAGERIE_PATH)
    if not path.is_dir():
        raise UserError(
            f"This task needs the robot models of mujoco_menagerie (commit {mjx_env.MENAGERIE_COMMIT_SHA[:8]}), which "
            f"are not at {path}. Where there is a network, clone them there (github.com/google-deepmind/mujoco_menagerie); "
            "or set RLX_MENAGERIE_PATH to a local copy."
        )


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Overrides: the task's own configuration, nested names joined by dots (`episode_length`, `action_repeat`,
    `ctrl_dt`, `noise_config.level`, ...)."""
    require(physics in IMPLEMENTATIONS, "physics", physics, "playground tasks run on mjx so far")
    if name not in DM_CONTROL:
        find_menagerie()
    config = registry.get_default_config(name)
    flat = flatten(config.to_dict())
    check_overrides(f"playground/{name}", overrides, sorted(flat))
    own = {k: v for k, v in overrides.items() if k not in ("episode_length", "action_repeat")}
    if "impl" in flat:
        own["impl"] = IMPLEMENTATIONS[physics]
    env = Playground(registry.load(name, config=config, config_overrides=own))
    length = overrides.get("episode_length", config.episode_length)
    return adapt(env, length, overrides.get("action_repeat", config.get("action_repeat", 1)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
