"""Every environment. `make` builds one by name, `names` lists them, `check_name` finds a misspelt one.

Importing this package imports no suite and no jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import TYPE_CHECKING, Any

from envs.names import NAMES
from rlx.errors import UserError, unknown

if TYPE_CHECKING:
    from envs.gymnasium import GymnasiumEnv, GymnasiumVectorEnv
    from rlx.environment import Environment

SUITES = {
    "avoid": "envs.avoid",
    "brax": "envs.brax",
    "gridworld": "envs.gridworld",
    "gymnax": "envs.gymnax",
    "matrix": "envs.matrix_game",
    "multi_brax": "envs.multi_agent",
    "multi_playground": "envs.multi_agent",
    "particle": "envs.particle",
    "playground": "envs.playground",
    "probe": "envs.probes",
}
PHYSICS = ("auto", "mjx", "mujoco", "warp")

__all__ = ["NAMES", "PHYSICS", "SUITES", "check_name", "make", "names", "to_gymnasium", "to_gymnasium_vector"]


def names() -> tuple[str, ...]:
    """All names that ship, `suite/name`, sorted."""
    return tuple(sorted(f"{suite}/{name}" for suite, members in NAMES.items() for name in members))


def check_name(name: str) -> None:
    """Raises UserError with close names if nothing is called `name`; names with a colon are own work, and pass.

    So do bodies that a mapping is to split (`envs.multi_agent`), of which there are too many to list.
    """
    known = names()
    bodies = [f"multi_{suite}/{body}" for suite in ("brax", "playground") for body in NAMES[suite]]
    if name in known or name in bodies or ":" in name:
        return
    spelt = {(full if "/" in name else full.partition("/")[2]).lower(): full for full in known}
    close = [spelt[match] for match in difflib.get_close_matches(name.lower(), spelt, n=4, cutoff=0.6)]
    hint = f"Did you mean {' or '.join(close)}?" if close else "`rlx list envs` shows all that exist."
    raise UserError(f"environment {name!r} does not exist. {hint}")


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds an environment.

    Args:
      name: `suite/name` out of `names()`, or own work: `path/to/file.py:function` or `module:function`.
      physics: which engine simulates; "auto" lets the suite choose.
      **overrides: `episode_length` (inner steps; None or 0: no limit), `action_repeat`, `action_chunk` everywhere; the
        rest belongs to the suite (see its module) or to the user's function.

    Raises:
      UserError: for a name, an engine or an override that does not exist or cannot be had, with close matches.
    """
    check_name(name)
    if physics not in PHYSICS:
        raise unknown("physics", physics, PHYSICS)
    if ":" in name:
        env = importlib.import_module("envs.external").make(name, physics, **overrides)
    else:
        suite, _, member = name.partition("/")
        env = importlib.import_module(SUITES[suite]).make(member, physics, **overrides)
    env.made = overrides  # for records of runs: with its name and engine, what makes it again
    env.spec = dataclasses.replace(env.spec, name=name)
    return env


def to_gymnasium(env: Environment, params: Any = None, render_mode: str | None = None) -> GymnasiumEnv:
    """`env` as one instance of `gymnasium.Env` (`envs.gymnasium`).

    `params`: those of every episode, `env.spec.params` if None; `render_mode`: None or "rgb_array". Raises UserError
    for an environment of several agents.
    """
    from envs.gymnasium import GymnasiumEnv

    return GymnasiumEnv(env, params, render_mode)


def to_gymnasium_vector(
    env: Environment, num_envs: int, params: Any = None, render_mode: str | None = None
) -> GymnasiumVectorEnv:
    """`num_envs` instances of `env` as one `gymnasium.vector.VectorEnv`, stepped as one compiled program.

    Its autoreset mode is NEXT_STEP. The rest is as for `to_gymnasium`.
    """
    from envs.gymnasium import GymnasiumVectorEnv

    return GymnasiumVectorEnv(env, num_envs, params, render_mode)
