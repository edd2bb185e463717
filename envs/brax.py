"""brax's own environments, on any of its backends. Neither `brax.training` nor its wrappers are used.

Overrides: `backend` ("mjx"; "spring", "positional", "generalized"), `n_frames` (physics steps a control step), and what
the environment's constructor takes (`reset_noise_scale`, `terminate_when_unhealthy`, ...). The time limit is 1000 steps
unless `episode_length` says otherwise. Actions: brax's `step` itself maps [-1, 1] to the control range, or
that range is [-1, 1].

Physics: an environment of backend "mjx" runs on the engine `mjx`, by brax's own pipeline, or on `mujoco`, by ours,
which takes the place of the pipeline functions of that one object (`envs.brax_pipeline`); "auto" is `mujoco` on a CPU.
The other backends are engines of brax's own, and take "auto" alone.

With the backend "mjx": `physics_threads` of the native engine, 0 for all cores; `params`, `randomize`,
`randomize_variants` and the end of a simulation that diverges are as in `envs.playground`. Overrides of the model do
not reach what brax keeps beside it: the masses and control ranges that its own code computes some observations, rewards
and actions with (humanoid, pusher) stay nominal.

`swimmer` has the backend "generalized" only, and gets it; its fluid forces (brax 0.14.2) call `jnp.clip` with a keyword
that jax 0.10 has dropped, so that one module gets a clip that knows it. `fast` is brax's toy for its unit tests: a
point that accelerates, without physics or backend; `obs_mode="dict_state"` and the like give it dict observations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import brax.envs
import brax.fluid
import jax
import jax.numpy as jnp
import mujoco
from brax.envs.base import PipelineEnv

from envs import physics as engines
from envs import viewer
from envs.adapter import (
    Options,
    bind_fields,
    building,
    check_engine,
    defaults_of,
    end_diverged,
    finite_start,
    foreign,
    limit_and_repeat,
    read_options,
    with_key,
)
from envs.brax_pipeline import model_of, simulate_natively
from envs.randomization import OVERRIDES, randomized
from envs.wrappers import FixedPoint
from rlx.environment import Environment
from rlx.errors import UserError, unknown
from rlx.types import Box, PyTree, Spec, TimeStep

BACKENDS = ("mjx", "spring", "positional", "generalized")
OTHER_BACKENDS: dict[str, tuple[str, ...]] = {"swimmer": ("generalized",), "fast": ()}


def _clip(x: jax.Array, a_min: Any = None, a_max: Any = None) -> jax.Array:
    return jnp.clip(x, a_min, a_max)


_patching = threading.RLock()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Around brax's own code, while ours traces it: `brax.fluid` finds a clip that knows the dropped keyword."""
    with _patching, foreign():
        numpy = brax.fluid.jp
        brax.fluid.jp = SimpleNamespace(**{**vars(jnp), "clip": _clip})
        try:
            yield
        finally:
            brax.fluid.jp = numpy


class Brax:
    """One brax environment. The state is brax's own; `info` holds its metrics, () float32 each."""

    def __init__(self, env: brax.envs.Env):
        self.env = env
        simulated = isinstance(env, PipelineEnv) and not isinstance(env, brax.envs.fast.Fast)
        self.spec = Spec(obs=None, action=Box((env.action_size,)), dt=round(float(env.dt), 9) if simulated else 0.0)

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

    @property
    def mj_model(self) -> mujoco.MjModel:
        return self.env.sys.mj_model

    def joint_state(self, state: brax.envs.State) -> tuple[jax.Array, jax.Array]:
        """q and qd float32, as long as MuJoCo's qpos and qvel and in their order."""
        return state.pipeline_state.q, state.pipeline_state.qd

    def render(self, states: Sequence[brax.envs.State], page: float | None = None) -> Any:
        if isinstance(self.env, brax.envs.fast.Fast):
            raise UserError("brax/fast cannot be rendered: it has no model.")
        if page is not None:
            poses = [(state.pipeline_state.x.pos, state.pipeline_state.x.rot) for state in states]
            return viewer.page(self.env.sys, poses, page)
        viewer.check_drawing(self.mj_model)
        camera = viewer.camera_of(self.mj_model)
        return self.env.render([state.pipeline_state for state in states], camera=camera)


class BraxState(NamedTuple):
    task: brax.envs.State
    overrides: Mapping[str, jax.Array]  # of the model, as `reset` got them


class BraxMJX:
    """One brax environment of backend "mjx" on one of our engines. `info` holds its metrics and `diverged`."""

    def __init__(self, env: PipelineEnv, engine: engines.Engine):
        self.env, self.engine, self.substeps = env, engine, env._n_frames
        self._brax, self._lock = Brax(env), threading.RLock()
        self.spec = dataclasses.replace(self._brax.spec, params={}, physics=engine.name)
        if engine.name == "mujoco":
            simulate_natively(env, engine)

    @contextlib.contextmanager
    def _model(self, overrides: Mapping[str, jax.Array]) -> Iterator[None]:
        """While brax's code is traced, its model has `overrides`."""
        with self._lock:
            nominal = self.env.sys
            self.env.sys = engines.with_overrides(nominal, overrides)
            try:
                yield
            finally:
                self.env.sys = nominal

    def reset(self, key: jax.Array, params: PyTree):
        with self._model(params):
            state, obs = self._brax.reset(key, params)
        check_engine("brax", state.pipeline_state, self.engine)
        obs = finite_start(obs, self.engine.diverged(state.pipeline_state))
        return BraxState(state.replace(obs=obs), params), obs

    def step(self, state: BraxState, action: jax.Array, key: jax.Array):
        with self._model(state.overrides):
            task, timestep = self._brax.step(state.task, action, key)
        check_engine("brax", task.pipeline_state, self.engine)
        before, after = (self.engine.diverged(x.pipeline_state) for x in (state.task, task))
        timestep = end_diverged(timestep, before | after, state.task.obs)
        return BraxState(task.replace(obs=timestep.obs), state.overrides), timestep

    @property
    def mj_model(self) -> mujoco.MjModel:
        return self._brax.mj_model

    def joint_state(self, state: BraxState) -> tuple[jax.Array, jax.Array]:
        return self._brax.joint_state(state.task)

    def render(self, states: Sequence[BraxState], page: float | None = None) -> Any:
        return self._brax.render([state.task for state in states], page)


def choose(name: str, physics: str, backend: str | None) -> tuple[str | None, str]:
    """The backend of environment `name`, None if it has none, and our engine under it, "" if it is brax's own.

    Raises UserError for a backend or an engine that it has not, and for two that contradict each other.
    """
    available = OTHER_BACKENDS.get(name, BACKENDS)
    if backend is not None and backend not in BACKENDS:
        raise unknown("brax backend", str(backend), BACKENDS)
    if physics == "warp":
        raise UserError(
            f"physics = 'warp' is not available for brax/{name}: brax knows MJX on XLA. Take mjx or mujoco."
        )
    if physics != "auto" and backend not in (None, "mjx"):
        raise UserError(
            f"physics = {physics!r} contradicts backend = {backend!r} for brax/{name}: leave one of them out."
        )
    wanted = backend or (None if physics == "auto" else "mjx")
    if wanted is not None and wanted not in available:
        raise UserError(f"brax/{name} has no backend {wanted!r}; it has {', '.join(available) or 'none at all'}.")
    backend = wanted or (available[0] if available else None)
    if backend != "mjx":
        return backend, ""
    engine = engines.resolve(physics)
    return backend, "mjx" if engine == "warp" else engine


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `brax/<name>`. Raises UserError for an override, a backend or an engine that it has not."""
    return limit_and_repeat(*build(name, physics, overrides))


def build(
    name: str,
    physics: str,
    overrides: Mapping[str, Any],
    more: Mapping[str, Any] = MappingProxyType({}),
    full_name: str = "",
) -> tuple[Environment, Options]:
    """What `make` builds before it is limited and repeated, and the overrides.

    `more`: those of who wraps it, and their defaults; `full_name`: what errors call it then. Raises UserError as `make`
    does.
    """
    full_name = full_name or f"brax/{name}"
    backend, engine_name = choose(name, physics, overrides.get("backend"))
    defaults = defaults_of(brax.envs._envs[name])
    if backend is not None:
        defaults["n_frames"] = 1  # all that have a backend take it, through **kwargs
    own = {"physics_threads": 0, **OVERRIDES} if engine_name else {}
    for field in {"physics_threads", *OVERRIDES}.difference(own).intersection(overrides):
        raise UserError(f"{full_name}: {field} needs the backend 'mjx'; this is {backend or 'an environment without'}.")
    options = read_options(full_name, overrides, {**defaults, **own, **more}, episode_length=1000)
    arguments = {key: value for key, value in options.rest.items() if key not in own and key not in more}
    arguments |= {} if backend is None else {"backend": backend}
    with building(full_name):
        env = brax.envs.get_environment(name, **arguments)
        adapted: Environment = adapt(full_name, env, engine_name, options.rest) if engine_name else Brax(env)
        adapted = FixedPoint(adapted)
    return adapted, options


def adapt(name: str, env: brax.envs.Env, engine_name: str, options: Mapping[str, Any]) -> Environment:
    """`env` of backend "mjx" on one of our engines, randomised as `options` ask."""
    assert isinstance(env, PipelineEnv)
    engine = engines.make(engine_name, model_of(env.sys), env.sys, options.get("physics_threads", 0))
    return bind_fields(randomized(name, BraxMJX(env, engine), engine, options), engine)
