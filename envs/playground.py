"""MuJoCo Playground's tasks. Its training wrappers, which discard the last observation, are not used.

Overrides: the fields of the task's own config, nested ones joined by dots
(`{"reward_config.scales.tracking_lin_vel": 2.0}`); `episode_length` and `action_repeat` default to the config's.
Actions pass through: the control range of every dm_control task is [-1, 1] (the tests look), and the robot tasks scale
by themselves, as Playground's published training assumes.

Locomotion and manipulation need robot models out of mujoco_menagerie, which Playground would clone at first use. Here
nothing is fetched: give a local copy as override `menagerie_path`, in RLX_MENAGERIE_PATH, or where Playground keeps its
own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from envs.adapter import building, check_physics, foreign, limit_and_repeat, read_options, with_key
from envs.names import LOCOMOTION, MANIPULATION
from envs.wrappers import FixedPoint
from rlx.environment import Environment
from rlx.errors import UserError
from rlx.types import Box, PyTree, Spec, TimeStep

if TYPE_CHECKING:
    from mujoco_playground import MjxEnv, State

# Playground's default is Warp, by far the slowest on a CPU: the engine is always passed. (AeroCubeRotateZAxis alone has
# no such field, and takes what mjx chooses for the device.)
ENGINES = {"auto": "jax", "mjx": "jax"}
MENAGERIE_URL = "https://github.com/google-deepmind/mujoco_menagerie"
MENAGERIE_COMMIT = "1b86ece576591213e2b666ebf59508454200ca97"  # the one that Playground 0.2.0 is made for
OWN_FIELDS = ("action_repeat", "episode_length", "impl")


class Playground:
    """One task. The state is Playground's own; `info` holds its metrics, () float32 each."""

    def __init__(self, env: MjxEnv):
        self.env = env
        self.spec = Spec(obs=None, action=Box((env.action_size,)))

    def reset(self, key: jax.Array, params: PyTree):
        with foreign():
            state = self.env.reset(key)
        return state, state.obs

    def step(self, state: State, action: jax.Array, key: jax.Array):
        with foreign():
            # A copy of the containers: tasks write metrics into those of their argument.
            state = self.env.step(with_key(jax.tree.map(lambda x: x, state), key), action)
        terminated = jnp.asarray(state.done).astype(bool)
        info = {name: jnp.asarray(value, jnp.float32) for name, value in state.metrics.items()}
        return state, TimeStep(state.obs, state.reward, terminated, jnp.zeros((), bool), state.obs, info)

    def render(self, states: Sequence[State]) -> Any:
        return self.env.render(list(states))


def find_menagerie(name: str, override: str | None) -> Path:
    """A local copy of mujoco_menagerie. Raises UserError that says how to get one; fetches nothing."""
    chosen = override or os.environ.get("RLX_MENAGERIE_PATH")
    spec = importlib.util.find_spec("mujoco_playground")
    package = Path(spec.origin).parent if spec and spec.origin else Path()
    path = Path(chosen).expanduser() if chosen else package / "external_deps" / "mujoco_menagerie"
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
    full_name = f"playground/{name}"
    check_physics(full_name, physics, tuple(engine for engine in ENGINES if engine != "auto"))
    needs_models = name in LOCOMOTION + MANIPULATION
    menagerie = find_menagerie(name, overrides.get("menagerie_path")) if needs_models else None
    from mujoco_playground import registry

    config = registry.get_default_config(name)
    allowed = {key: value for key, value in flatten(config.to_dict()).items() if key not in OWN_FIELDS}
    allowed |= {"menagerie_path": None} if needs_models else {}
    options = read_options(full_name, overrides, allowed, config.episode_length, config.get("action_repeat", 1))
    changes = {key: value for key, value in options.rest.items() if key != "menagerie_path"}
    if changes.get("vision"):
        raise UserError(f"{full_name}: vision = True needs a renderer that only the Warp engine has.")
    changes |= {"impl": ENGINES[physics]} if "impl" in config else {}
    with menagerie_at(menagerie), building(full_name):
        adapted = FixedPoint(Playground(registry.load(name, config=config, config_overrides=changes)))
    return limit_and_repeat(adapted, options)
