"""Environments from outside this repository: `path/to/file.py:function` or `module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from envs.adapter import COMMON, defaults_of, limit_and_repeat, read_options
from envs.wrappers import FixedPoint
from rlx.environment import Environment
from rlx.errors import UserError, unknown
from rlx.external import load_file, source_file


def load(target: str, what: str = "environment") -> ModuleType:
    """The module behind a file or a module's name. Raises UserError that names `what` if there is none."""
    path = source_file(target)
    if path is None:
        missing = f"the file {target!r} does not exist" if target.endswith(".py") else f"there is no module {target!r}"
        raise UserError(f"{what}: {missing}; run from its folder, or install it.")
    return load_file(path) if target.endswith(".py") else importlib.import_module(target)


def load_function(reference: str, what: str = "environment") -> Callable[..., Any]:
    """The function behind `target:function`. Raises UserError, with close names, if there is none."""
    target, _, function = reference.rpartition(":")
    module = load(target, what)
    found = getattr(module, function, None)
    if not callable(found):
        own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown(f"{target}: function", function, own)
    return found


def make(reference: str, physics: str = "auto", **overrides: Any) -> Environment:
    """What the user's function returns, its types made a fixed point.

    The function gets those overrides that it has parameters for, and `physics` if it has such a parameter.
    `episode_length`, `action_repeat` and `action_chunk` are wrapped around what it returns unless it takes them itself.
    Raises UserError if the function or an override does not exist, or what it returns is no environment.
    """
    function = load_function(reference)
    defaults = defaults_of(function)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        defaults = {**dict.fromkeys(overrides), **defaults}
    takes_physics = "physics" in defaults
    if physics != "auto" and not takes_physics:
        raise UserError(f"physics = {physics!r}: {reference} has no parameter `physics`.")
    options = read_options(reference, overrides, {k: v for k, v in defaults.items() if k not in COMMON})
    arguments = {**options.rest, **{key: overrides[key] for key in COMMON if key in defaults and key in overrides}}
    if takes_physics:
        arguments["physics"] = physics
    env = function(**arguments)
    for part in ("spec", "reset", "step"):
        if getattr(env, part, None) is None:
            raise UserError(f"{reference} returned {type(env).__name__}, which lacks {part!r}; see rlx.Environment.")
    taken = {key: nothing for key, nothing in COMMON.items() if key in defaults}
    return limit_and_repeat(FixedPoint(env), options._replace(**taken))
