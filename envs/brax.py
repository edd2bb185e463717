"""brax's own environments. Its training wrappers, which throw the terminal observation away, are not used."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import brax.envs
import jax
import jax.numpy as jnp

from envs.wrappers import adapt, check_overrides
from rlx.environment import Environment
from rlx.errors import require, unknown
from rlx.types import Box, PyTree, Spec, TimeStep

BACKENDS = ("mjx", "spring", "positional", "generalized")
# What brax's environments understand beyond their signature: `debug` belongs to PipelineEnv, `n_frames` too.
SHARED = ("episode_length", "action_repeat", "backend", "n_frames")


class Brax:
    """One brax environment. Its state is brax's State; actions in [-1, 1], which brax scales where it has to."""

    def __init__(self, name: str, **kwargs: Any):
        self._env = brax.envs.get_environment(name, **kwargs)
        obs = jax.eval_shape(self._env.reset, jax.random.key(0)).obs
        self.spec = Spec(obs=obs, action=Box((self._env.action_size,)))

    def reset(self, key: jax.Array, params: PyTree) -> tuple[Any, PyTree]:
        state = self._env.reset(key)
        return state, state.obs

    def step(self, state: Any, action: jax.Array, key: jax.Array) -> tuple[Any, TimeStep]:
        state = self._env.step(state, action)
        never = jnp.zeros((), bool)
        return state, TimeStep(state.obs, state.reward, state.done > 0, never, state.obs, dict(state.metrics))

    def render(self, states: Sequence[Any]) -> Any:
        """Needs a GL library: see `rlx doctor`."""
        return self._env.render([state.pipeline_state for state in jax.device_get(list(states))])


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Overrides: `backend` (mjx, spring, positional, generalized), `episode_length` (1000), `action_repeat` (1), and
    what the environment's constructor takes (`ctrl_cost_weight`, ...)."""
    require(physics in ("auto", "mjx"), "physics", physics, "brax environments run on MJX; see the override `backend`")
    signature = inspect.signature(brax.envs._envs[name].__init__).parameters
    own = [p for p in signature if p not in ("self", "kwargs")]
    check_overrides(f"brax/{name}", overrides, sorted({*own, *SHARED}))
    backend = overrides.pop("backend", "mjx")
    if backend not in BACKENDS:
        raise unknown("brax backend", backend, BACKENDS)
    length, repeat = overrides.pop("episode_length", 1000), overrides.pop("action_repeat", 1)
    return adapt(Brax(name, backend=backend, **overrides), length, repeat)
