"""What must hold of a data set before anything is learnt from it. Faults are UserErrors that name the first place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlx.data_file import obs_columns
from rlx.errors import UserError
from rlx.types import Box, Spec


def check_env(metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    """How many actions of the data make one of the environment: more than 1 where it takes chunks of what they are.

    Raises UserError for data of another environment, or whose actions mean something else.
    """

    def name(entry: Mapping[str, Any]) -> str:
        full = str(entry.get("env"))  # one in a file may lie elsewhere on another machine
        return full.rpartition("/")[2] if ":" in full else full

    if name(metadata) != name(wanted):
        raise UserError(f"it is of environment {metadata.get('env')!r}, not {wanted['env']!r}.")
    found, action = metadata.get("action"), wanted["action"]
    if found == action:
        return 1
    if "chunk" in action and found == one_at_a_time(action):
        return action["chunk"]
    raise UserError(f"its actions are {found}; those of {wanted['env']} are {action}.")


def one_at_a_time(action: Mapping[str, Any]) -> dict[str, Any]:
    """What one action of a chunk means, of what `describe_env` says of them all."""
    size = action["chunk"]
    bounds = {name: action[name][: len(action[name]) // size] for name in ("low", "high")}
    return {**bounds, "repeat": action["repeat"] // size}


def check_columns(columns: Mapping[str, np.ndarray], spec: Spec, chunk: int = 1) -> None:
    """Raises UserError for columns that are no data of this spec: names, order, shapes, dtypes, endings, values.

    `chunk`: how many of their actions make one of the spec.
    """
    names = [*obs_columns(spec.obs), "actions", "rewards", "terminations", "truncations", "episode_ids"]
    missing = [name for name in names if name not in columns]
    if missing:
        raise UserError(f"it has no column {missing[0]!r}; it has {', '.join(sorted(columns))}.")
    ids = columns["episode_ids"]
    if ids.ndim != 1 or ids.dtype != np.int64 or not ids.size:
        raise UserError(f"episode_ids is {ids.dtype}{list(ids.shape)}; it must be int64[N] of at least one step.")
    rises = np.diff(ids, prepend=0)
    jumps = (rises < 0) | (rises > 1) | ((np.arange(ids.size) == 0) & (ids != 0))
    if jumps.any():
        row = int(np.argmax(jumps))
        raise UserError(f"episode_ids[{row}] is {ids[row]}; they must go from 0 on, each episode in one piece.")
    check_shapes(columns, spec, len(ids), int(ids[-1]) + 1, chunk)
    check_endings(columns["terminations"], columns["truncations"], np.append(rises[1:] > 0, True))
    check_values({name: columns[name] for name in names}, spec)


def check_endings(terminations: np.ndarray, truncations: np.ndarray, ends: np.ndarray) -> None:
    """Raises UserError, with the first step, where the last of an episode (`ends`) has not exactly one ending."""
    for wrong, fault in (
        (terminations & truncations, "is both a termination and a truncation; what is terminated is not truncated"),
        ((terminations | truncations) & ~ends, "ends its episode, but episode_ids goes on with it"),
        (ends & ~(terminations | truncations), "is the last of its episode, and neither terminated nor truncated"),
    ):
        if wrong.any():
            raise UserError(f"step {int(np.argmax(wrong))} {fault}.")


def check_values(columns: Mapping[str, np.ndarray], spec: Spec) -> None:
    """Raises UserError, with the first step, for values that are not finite and actions out of their range."""
    for name, array in columns.items():
        finite = np.isfinite(array) if np.issubdtype(array.dtype, np.inexact) else np.ones(1, bool)
        if not finite.all():
            raise UserError(f"{name}[{np.argwhere(~finite)[0][0]}] is not finite.")
    actions = columns["actions"]
    low, high = (-1, 1) if isinstance(spec.action, Box) else (0, spec.action.num_values - 1)
    outside = (actions < low) | (actions > high)
    if outside.any():
        row = np.argwhere(outside)[0][0]
        raise UserError(f"actions[{row}] is {actions[row].tolist()}; it must be from {low} to {high}.")


def check_shapes(columns: Mapping[str, np.ndarray], spec: Spec, steps: int, episodes: int, chunk: int) -> None:
    """Raises UserError, with the first that differs, for a column of another shape or dtype."""
    allowed: dict[str, list[tuple[tuple[int, ...], Any]]] = {
        name: [((steps + episodes, *leaf.shape), leaf.dtype)] for name, leaf in obs_columns(spec.obs).items()
    }
    shape, dtype = spec.action.shape, np.float32 if isinstance(spec.action, Box) else np.int32
    allowed["actions"] = [((steps, *(shape if chunk == 1 else (shape[0] // chunk,))), dtype)]
    allowed["rewards"] = [((steps,), np.float32)]
    allowed["rewards"] += [((steps, spec.num_agents), np.float32)] if spec.num_agents > 1 else []
    allowed |= dict.fromkeys(("terminations", "truncations"), [((steps,), np.bool_)])
    for name, kinds in allowed.items():
        found = columns[name]
        if (found.shape, found.dtype) not in kinds:
            shape, dtype = kinds[0]
            raise UserError(f"{name} is {found.dtype}{list(found.shape)}; it must be {np.dtype(dtype)}{list(shape)}.")
