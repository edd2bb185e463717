"""brax's own environments, on any of its backends. Neither `brax.training` nor its wrappers are used.

Overrides: `backend` ("mjx"; "spring", "positional", "generalized"), `n_frames` (physics steps a control step), and what
the environment's constructor takes (`reset_noise_scale`, `terminate_when_unhealthy`, ...). The time limit is 1000 steps
unless `episode_length` says otherwise. Actions: brax's `step` itself maps [-1, 1] to the control range, or
that range is [-1, 1].

`swimmer` has the backend "generalized" only, and gets it; its fluid forces (brax 0.14.2) call `jnp.clip` with a keyword
that jax 0.10 has dropped, so that one module gets a clip that knows it. `fast` is brax's toy for its unit tests: a
point that accelerates, without physics or backend; `obs_mode="dict_state"` and the like give it dict observations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import brax.envs
import brax.fluid
import jax
import jax.numpy as jnp

from envs.adapter import building, check_physics, defaults_of, foreign, limit_and_repeat, read_options, with_key
from envs.wrappers import FixedPoint
from rlx.environment import Environment
from rlx.errors import UserError, unknown
from rlx.types import Box, PyTree, Spec, TimeStep

BACKENDS = ("mjx", "spring", "positional", "generalized")
OTHER_BACKENDS: dict[str, tuple[str, ...]] = {"swimmer": ("generalized",), "fast": ()}


def _clip(x: jax.Array, a_min: Any = None, a_max: Any = None) -> jax.Array:
    return jnp.clip(x, a_min, a_max)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Around brax's own code, while ours traces it: `brax.fluid` finds a clip that knows the dropped keyword."""
    numpy = brax.fluid.jp
    brax.fluid.jp = SimpleNamespace(**{**vars(jnp), "clip": _clip})
    try:
        with foreign():
            yield
    finally:
        brax.fluid.jp = numpy


class Brax:
    """One brax environment. The state is brax's own; `info` holds its metrics, () float32 each."""

    def __init__(self, env: brax.envs.Env):
        self.env = env
        self.spec = Spec(obs=None, action=Box((env.action_size,)))

    def reset(self, key: jax.Array, params: PyTree):
        with tracing():
            state = self.env.reset(key)
        return state, state.obs

    def step(self, state: brax.envs.State, action: jax.Array, key: jax.Array):
        with tracing():
            # A copy of the containers: brax writes metrics into those of its argument.
            state = self.env.step(with_key(jax.tree.map(lambda x: x, state), key), action)
        terminated = jnp.asarray(state.done).astype(bool)
        info = {name: jnp.asarray(value, jnp.float32) for name, value in state.metrics.items()}
        return state, TimeStep(state.obs, state.reward, terminated, jnp.zeros((), bool), state.obs, info)

    def render(self, states: Sequence[brax.envs.State]) -> Any:
        if isinstance(self.env, brax.envs.fast.Fast):
            raise UserError("brax/fast cannot be rendered: it has no model.")
        return self.env.render([state.pipeline_state for state in states])


def choose_backend(name: str, physics: str, backend: str | None) -> str | None:
    """The backend of environment `name`, None if it has none. Raises UserError if it has not the one asked for."""
    check_physics(f"brax/{name}", physics, ("mjx",))
    available = OTHER_BACKENDS.get(name, BACKENDS)
    if backend is not None and backend not in BACKENDS:
        raise unknown("brax backend", str(backend), BACKENDS)
    if physics == "mjx" and backend not in (None, "mjx"):
        raise UserError(f"physics = 'mjx' contradicts backend = {backend!r} for brax/{name}: leave one of them out.")
    wanted = backend or ("mjx" if physics == "mjx" else None)
    if wanted is not None and wanted not in available:
        raise UserError(f"brax/{name} has no backend {wanted!r}; it has {', '.join(available) or 'none at all'}.")
    return wanted or (available[0] if available else None)


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `brax/<name>`. Raises UserError for an override or a backend that it has not."""
    full_name = f"brax/{name}"
    backend = choose_backend(name, physics, overrides.get("backend"))
    defaults = defaults_of(brax.envs._envs[name])
    if backend is not None:
        defaults["n_frames"] = 1  # all that have a backend take it, through **kwargs
    options = read_options(full_name, overrides, defaults, episode_length=1000)
    arguments = options.rest if backend is None else {**options.rest, "backend": backend}
    with building(full_name):
        env = FixedPoint(Brax(brax.envs.get_environment(name, **arguments)))
    return limit_and_repeat(env, options)
