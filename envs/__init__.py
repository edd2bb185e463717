"""Every environment by name: `envs.make("playground/CheetahRun")`. A suite is imported when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.names import NAMES
from rlx.errors import UserError, require, unknown

if TYPE_CHECKING:
    from rlx.environment import Environment

SUITES = {"brax": "envs.brax", "gymnax": "envs.gymnax", "playground": "envs.playground", "probe": "envs.probes"}
PHYSICS = ("auto", "mjx", "warp", "mujoco")


def names() -> list[str]:
    """All names, `suite/name`."""
    return sorted(f"{suite}/{name}" for suite, members in NAMES.items() for name in members)


def is_external(name: str) -> bool:
    """Whether `name` means own work: `path/to/file.py:function` or `module:function`."""
    return ":" in name


def check_name(name: str) -> None:
    """Raises UserError, with close matches, for a name that no suite has. Imports no suite and no jax."""
    if not is_external(name) and name not in names():
        raise unknown("Environment", name, names())


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """An environment by `suite/name`, or by `path/to/file.py:function` and `module:function` for own work.

    Args:
        name: see `names()`.
        physics: the engine: auto, mjx, warp, mujoco; a suite without a choice takes auto alone.
        overrides: settings of the environment; `episode_length` and `action_repeat` in the suites of others, then what
            the suite itself has. For own work, the arguments of the function.

    Raises:
        UserError: a name, engine or override that does not exist (with close matches), a model that is not there.
    """
    if physics not in PHYSICS:
        raise unknown("Physics engine", physics, PHYSICS)
    check_name(name)
    if is_external(name):
        return _make_external(name, physics, overrides)
    suite, _, member = name.partition("/")
    return importlib.import_module(SUITES[suite]).make(member, physics, **overrides)


def _make_external(name: str, physics: str, overrides: dict[str, Any]) -> Environment:
    function = _load_function(name)
    parameters = inspect.signature(function).parameters
    if "physics" in parameters:
        overrides = {"physics": physics, **overrides}
    else:
        require(physics == "auto", "physics", physics, f"{name} takes no engine, so only auto")
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for key in overrides:
            if key not in parameters:
                raise unknown(f"Override of {name}", key, parameters)
    env = function(**overrides)
    for part in ("spec", "reset", "step"):
        if getattr(env, part, None) is None:
            raise UserError(f"What {name} returns is no environment: it has no {part!r} (rlx.environment.Environment).")
    return env


def _load_function(name: str) -> Callable[..., Any]:
    home, _, function = name.rpartition(":")
    if home.endswith(".py"):
        path = Path(home).resolve()
        if not path.is_file():
            raise UserError(f"Environment {name!r}: there is no file {path}.")
        # A name of its own: nothing goes on sys.path, so a folder called `envs` beside the file shadows nothing.
        key = f"_rlx_env_{abs(hash(str(path)))}"
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError as error:
            raise UserError(f"Environment {name!r}: there is no module {error.name!r}.") from error
    public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    if function not in public:
        raise unknown(f"Function of {home}", function, public)
    return getattr(module, function)
