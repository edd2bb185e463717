"""MuJoCo Playground's tasks. Its training wrappers, which discard the last observation, are not used.

Physics: `mjx`, `warp` or `mujoco` (`envs.physics`). Tasks call three functions of Playground's and MJX's modules; for
the native engine those are replaced while `reset` and `step` below are traced, and only for data that is native.

Overrides: the fields of the task's own config, nested ones joined by dots
(`{"reward_config.scales.tracking_lin_vel": 2.0}`); `episode_length` and `action_repeat` default to the config's.
Actions pass through: the control range of every dm_control task is [-1, 1] (the tests look), and the robot tasks scale
by themselves, as Playground's published training assumes. `physics_threads`: of the native engine, 0 for all cores.

`params` are overrides of the model, unbatched, {"body_mass": [nbody], "opt.gravity": [3], ...}
(`physics.with_overrides`). `randomize` draws them at each reset: a function, a reference to one, or True for
the task's own; `randomize_variants`: out of so many fixed draws (`envs.randomization`).
A simulation that diverges ends its episode as `truncated`, with the last observation before, reward 0 and
`info["diverged"]` 1; the environment is then reset like any other. One that diverges in its reset, where it has an
observation of zeros, ends at its first step.

Locomotion and manipulation need robot models out of mujoco_menagerie, which Playground would clone at first use. Here
nothing is fetched: give a local copy as override `menagerie_path`, in RLX_MENAGERIE_PATH, or where Playground keeps its
own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from envs import physics as engines
from envs.adapter import (
    Options,
    bind_fields,
    building,
    check_engine,
    end_diverged,
    finite_start,
    foreign,
    is_native,
    limit_and_repeat,
    read_options,
    with_key,
)
from envs.names import LOCOMOTION, MANIPULATION
from envs.randomization import OVERRIDES, randomized
from envs.wrappers import FixedPoint
from rlx.environment import Environment
from rlx.errors import UserError
from rlx.machine import menagerie_path
from rlx.types import Box, PyTree, Spec, TimeStep

if TYPE_CHECKING:
    import mujoco
    from mujoco_playground import MjxEnv, State

MENAGERIE_URL = "https://github.com/google-deepmind/mujoco_menagerie"
MENAGERIE_COMMIT = "1b86ece576591213e2b666ebf59508454200ca97"  # the one that Playground 0.2.0 is made for
OWN_FIELDS = ("action_repeat", "episode_length", "impl")


_patching = threading.RLock()


@contextlib.contextmanager
def simulated_by(env: MjxEnv, engine: engines.Engine, overrides: Mapping[str, jax.Array]) -> Iterator[None]:
    """While Playground's code is traced: its model has `overrides`, and native data goes to the native engine."""
    from mujoco import mjx
    from mujoco_playground._src import mjx_env

    def make_data(model, qpos=None, qvel=None, ctrl=None, act=None, mocap_pos=None, mocap_quat=None, **options):
        values = {
            "qpos": qpos,
            "qvel": qvel,
            "ctrl": ctrl,
            "act": act,
            "mocap_pos": mocap_pos,
            "mocap_quat": mocap_quat,
        }
        if model is not env.mj_model:
            return originals[0](model, **values, **options)
        values = {name: value for name, value in values.items() if value is not None}
        shaped = {k: v.reshape(model.nmocap, -1) if k.startswith("mocap") else v for k, v in values.items()}
        return engine.make_data(**shaped)

    def step(model, data, action, n_substeps=1):
        function = engine.step if is_native(data) else originals[1]
        return function(model, data, action, n_substeps)

    def forward(model, data):
        return (engine.forward if is_native(data) else originals[2])(model, data)

    with _patching, foreign():
        originals = mjx_env.make_data, mjx_env.step, mjx.forward
        nominal = env._mjx_model
        env._mjx_model = engines.with_overrides(nominal, overrides)
        if engine.name == "mujoco":
            mjx_env.make_data, mjx_env.step, mjx.forward = make_data, step, forward
        try:
            yield
        finally:
            mjx_env.make_data, mjx_env.step, mjx.forward = originals
            env._mjx_model = nominal


class PlaygroundState(NamedTuple):
    task: State
    overrides: Mapping[str, jax.Array]  # of the model, as `reset` got them


class Playground:
    """One task. `info` holds its metrics, () float32 each, and `diverged`."""

    def __init__(self, env: MjxEnv, engine: engines.Engine):
        self.env, self.engine, self.substeps = env, engine, env.n_substeps
        self.spec = Spec(obs=None, action=Box((env.action_size,)), params={}, physics=engine.name, dt=env.dt)

    def reset(self, key: jax.Array, params: PyTree):
        with simulated_by(self.env, self.engine, params):
            state = self.env.reset(key)
        check_engine("Playground", state.data, self.engine)
        obs = finite_start(state.obs, self.engine.diverged(state.data))
        return PlaygroundState(state.replace(obs=obs, data=self.engine.detach(state.data)), params), obs

    def step(self, state: PlaygroundState, action: jax.Array, key: jax.Array):
        with simulated_by(self.env, self.engine, state.overrides):
            # A copy of the containers: tasks write metrics into those of their argument.
            task = jax.tree.map(lambda x: x, state.task)
            task = task.replace(data=self.engine.attach(task.data))
            task = self.env.step(with_key(task, key), action)
        check_engine("Playground", task.data, self.engine)
        info = {name: jnp.asarray(value, jnp.float32) for name, value in task.metrics.items()}
        timestep = TimeStep(
            task.obs, task.reward, jnp.asarray(task.done).astype(bool), jnp.zeros((), bool), task.obs, info
        )
        diverged = self.engine.diverged(state.task.data) | self.engine.diverged(task.data)  # in the reset, or now
        timestep = end_diverged(timestep, diverged, state.task.obs)
        # With the observation of `timestep`: whoever goes on after a divergence compares with it.
        task = task.replace(obs=timestep.obs, data=self.engine.detach(task.data))
        return PlaygroundState(task, state.overrides), timestep

    @property
    def mj_model(self) -> mujoco.MjModel:
        return self.env.mj_model

    def joint_state(self, state: PlaygroundState) -> tuple[jax.Array, jax.Array]:
        """qpos [nq] and qvel [nv] float32."""
        return state.task.data.qpos, state.task.data.qvel

    def render(self, states: Sequence[PlaygroundState], page: float | None = None) -> Any:
        from envs import viewer  # and brax with it

        model, data = self.env.mj_model, [state.task.data for state in states]
        if page is not None:
            return viewer.page(model, viewer.poses(model, data), page)
        return viewer.frames(model, data, viewer.camera_of(model))


def find_menagerie(name: str, override: str | None) -> Path:
    """A local copy of mujoco_menagerie. Raises UserError that says how to get one; fetches nothing."""
    chosen = override or os.environ.get("RLX_MENAGERIE_PATH")
    path = menagerie_path(chosen)
    if path.is_dir():
        return path
    where = f"but {path} is no directory" if chosen else "of which this machine has no copy"
    raise UserError(
        f"playground/{name} needs the robot models of mujoco_menagerie, {where}. They come over the network: "
        f"`git clone {MENAGERIE_URL} DIR && git -C DIR checkout {MENAGERIE_COMMIT}`; then set RLX_MENAGERIE_PATH=DIR, "
        "or pass the override menagerie_path."
    )


@contextlib.contextmanager
def menagerie_at(path: Path | None) -> Iterator[None]:
    """Playground takes its robot models from `path`; it reads the variable when it builds a task."""
    if path is None:
        yield
        return
    from etils import epath
    from mujoco_playground._src import mjx_env

    previous = mjx_env.MENAGERIE_PATH
    mjx_env.MENAGERIE_PATH = epath.Path(path)
    try:
        yield
    finally:
        mjx_env.MENAGERIE_PATH = previous


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `playground/<name>`. Raises UserError for an override that its config lacks, or if models are missing."""
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
    full_name = full_name or f"playground/{name}"
    engine_name = engines.resolve(physics)
    needs_models = name in LOCOMOTION + MANIPULATION
    menagerie = find_menagerie(name, overrides.get("menagerie_path")) if needs_models else None
    from mujoco_playground import registry

    config = registry.get_default_config(name)
    own = {"physics_threads": 0, **OVERRIDES, **more} | ({"menagerie_path": None} if needs_models else {})
    allowed = {key: value for key, value in flatten(config.to_dict()).items() if key not in OWN_FIELDS} | own
    options = read_options(full_name, overrides, allowed, config.episode_length, config.get("action_repeat", 1))
    changes = {key: value for key, value in options.rest.items() if key not in own}
    if changes.get("vision"):
        raise UserError(f"{full_name}: vision = True needs a renderer that only the Warp engine has.")
    # Always said: Playground's default is Warp. (AeroCubeRotateZAxis alone has no such field.)
    changes |= {"impl": engines.IMPLEMENTATIONS[engine_name]} if "impl" in config else {}
    with menagerie_at(menagerie), building(full_name):
        env = registry.load(name, config=config, config_overrides=changes)
        threads = options.rest.get("physics_threads", 0)
        sizes = {name: config[name] for name in ("naconmax", "njmax") if name in config}
        engine = engines.make(engine_name, env.mj_model, env.mjx_model, threads, sizes)
        randomizer = registry.get_domain_randomizer(name)
        adapted = randomized(full_name, Playground(env, engine), engine, options.rest, randomizer)
        adapted = FixedPoint(bind_fields(adapted, engine))
    return adapted, options
