"""What the adapters share: checked overrides, other people's code under our settings, the order of the wrappers."""

from __future__ import annotations

import contextlib
import enum
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs.wrappers import ActionChunk, ActionRepeat, TimeLimit
from rlx.environment import Environment, random_action
from rlx.errors import UserError, is_whole, require, unknown
from rlx.types import PyTree, TimeStep

# What every environment takes, and the value with which nothing is wrapped around it.
COMMON: dict[str, Any] = {"action_chunk": 1, "action_repeat": 1, "episode_length": None}


class Options(NamedTuple):
    """Overrides, sorted: those of every suite, and the rest."""

    episode_length: int | None  # inner steps; None: no limit
    action_repeat: int
    action_chunk: int
    rest: dict[str, Any]


def read_options(
    name: str,
    overrides: Mapping[str, Any],
    defaults: Mapping[str, Any],
    episode_length: int | None = None,
    action_repeat: int = 1,
) -> Options:
    """Checks `overrides` of environment `name` against `defaults` (field -> default value).

    `episode_length` and `action_repeat` are the suite's own defaults. Raises UserError for an unknown field, with close
    matches, and for a value of another type than the default's.
    """
    for key in overrides:
        if key not in COMMON and key not in defaults:
            raise unknown(f"{name}: override", key, {*defaults, *COMMON})
    length = overrides.get("episode_length", episode_length) or None
    repeat, chunk = overrides.get("action_repeat", action_repeat), overrides.get("action_chunk", 1)
    counts = (("episode_length", length or 0, 0), ("action_repeat", repeat, 1), ("action_chunk", chunk, 1))
    for field, value, lowest in counts:
        require(is_whole(value, lowest), f"{name}: {field}", value, f"a whole number of at least {lowest}")
    rest = {key: fit(name, key, value, defaults[key]) for key, value in overrides.items() if key not in COMMON}
    return Options(length, repeat, chunk, rest)


def fit(name: str, key: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`; None as a default takes anything. Raises UserError if it does not fit."""
    if default is None:
        return value
    if isinstance(default, enum.Enum):
        allowed = [member.value for member in type(default)]
        require(value in allowed, f"{name}: {key}", value, f"one of {', '.join(map(str, allowed))}")
        return value
    kinds: tuple[type, ...] = (type(default),)
    if isinstance(default, tuple | list):
        kinds = (tuple, list)
    elif isinstance(default, float):
        kinds = (float, int)
    fits = isinstance(value, kinds) and (isinstance(default, bool) or not isinstance(value, bool))
    require(fits, f"{name}: {key}", value, f"{kinds[0].__name__}, such as the default {default!r}")
    return type(default)(value)


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword parameters of a function or class and their defaults; None where there is none."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters if p.kind in kinds}


def check_physics(name: str, physics: str, available: tuple[str, ...]) -> None:
    """Raises UserError if the suite cannot simulate `name` with this engine."""
    if physics not in ("auto", *available):
        choices = " or ".join(("auto", *available))
        raise UserError(f"physics = {physics!r} is not available for {name}: it takes {choices}.")


def limit_and_repeat(env: Any, options: Options) -> Environment:
    """`env` under its time limit, that under its action repeat and that under its action chunk.

    So the limit counts inner steps, and an action of a chunk is repeated before the next one is played. Raises
    UserError for chunks of actions that are no continuous vectors.
    """
    if options.episode_length is not None:
        env = TimeLimit(env, options.episode_length)
    if options.action_repeat > 1:
        env = ActionRepeat(env, options.action_repeat)
    return ActionChunk(env, options.action_chunk) if options.action_chunk > 1 else env


def bind_fields(env: Any, engine: Any) -> Any:
    """`env`, after its native `engine` was told to compute the derived fields that `reset` and `step` read."""
    if engine.name != "mujoco":
        return env
    from envs.physics.native import UnboundField

    def trace() -> None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        state, _ = jax.eval_shape(env.reset, key, env.spec.params)
        jax.eval_shape(env.step, state, jax.eval_shape(lambda key: random_action(env.spec, key), key), key)

    while True:
        try:
            trace()
            return env
        except UnboundField as error:
            engine.bind(error.field)


def end_diverged(timestep: TimeStep, diverged: jax.Array, obs: PyTree) -> TimeStep:
    """`timestep`, or where the simulation failed: a truncation at `obs`, the observation before, with reward 0."""

    def unless(value, otherwise):
        return jax.tree.map(lambda x, y: jnp.where(diverged, y, x), value, otherwise)

    obs = unless(timestep.obs, obs)
    info = {name: jnp.where(diverged, 0.0, value) for name, value in timestep.info.items()}
    info["diverged"] = diverged.astype(jnp.float32)
    reward = jnp.where(diverged, 0.0, timestep.reward)
    return TimeStep(obs, reward, timestep.terminated & ~diverged, timestep.truncated | diverged, obs, info)


def is_native(data: Any) -> bool:
    """Whether the native engine made `data`."""
    from envs.physics.native import NativeData

    return isinstance(data._impl, NativeData)


def check_engine(package: str, data: Any, engine: Any) -> None:
    """Raises RuntimeError where `package` simulated by other functions than those that `engine` took the place of."""
    if is_native(data) != (engine.name == "mujoco"):
        raise RuntimeError(f"this version of {package} simulates by other functions than those that rlx knows of.")


def finite_start(obs: PyTree, diverged: jax.Array) -> PyTree:
    """`obs` of a reset, or zeros where its simulation failed: its episode ends at the first step (`end_diverged`)."""
    return jax.tree.map(lambda x: jnp.where(diverged, jnp.zeros_like(x), x), obs)


def with_key(state: Any, key: jax.Array) -> Any:
    """brax's or Playground's State with `key` in place of the stream that it keeps, if it keeps one.

    Environments that began from the same reset state would otherwise draw the same commands, noise and kicks.
    """
    return state.replace(info={**state.info, "rng": key}) if "rng" in state.info else state


def foreign() -> contextlib.AbstractContextManager[Any]:
    """Around calls into packages that broadcast ranks freely, which this project's tests forbid to itself."""
    return jax.numpy_rank_promotion("allow")


@contextlib.contextmanager
def building(name: str) -> Iterator[None]:
    """Around the construction of an environment out of another package.

    A refusal becomes a UserError. MuJoCo's warnings go to the logger `envs`: by default it writes each into a file
    MUJOCO_LOG.TXT in the working directory. brax's reminder that it is in maintenance is left out.
    """
    import mujoco

    def log(message: str) -> None:
        level = logging.DEBUG if "deprecated" in message else logging.WARNING
        logging.getLogger("envs").log(level, "%s: %s", name, message.strip())

    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(log)
    try:
        with foreign(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Brax System")
            yield
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
    finally:
        mujoco.set_mju_user_warning(previous)
