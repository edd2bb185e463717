"""Grids with more than one good way, on which FPO (arXiv 2507.21053) shows what a Gaussian policy loses.

25 x 25 cells; obs = (position - 12) / 12, x from the left, y from the bottom. Each entry of the action is clipped to
[-1, 1] and rounded to a move of -1, 0 or 1 cells, 0.5 to 0. A goal pays 20, a death cell -10, and both terminate; all
else pays 0. A move off the grid stays at its edge, one into a wall stays where it was. `episode_length` is 100. An
episode starts on any free cell; `start_row` and `start_column` (0 to 24) leave those of one row, one column or one cell
alone. The layouts are those of the paper's code, where they have other names, and one of ours: see LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.adapter import check_physics, defaults_of, limit_and_repeat, read_options
from rlx.environment import Environment
from rlx.errors import is_whole, require, unknown
from rlx.types import Box, PyTree, Spec, TimeStep

SIZE, MIDDLE = 25, 12
FREE, GOAL, DEATH, WALL = range(4)
REWARDS = np.array([0.0, 20.0, -10.0, 0.0], np.float32)  # of entering a cell of each kind; no one enters a wall
COLOURS = np.array([[245, 245, 245], [60, 160, 90], [210, 60, 50], [120, 120, 120]], np.uint8)
AGENT_COLOUR, PIXELS = (30, 50, 110), 8  # a cell is PIXELS wide

Block = tuple[int, tuple[int, int], tuple[int, int]]  # a kind of cell, columns from and to, rows from and to, inclusive
ALL = (0, 24)
TWO_GOALS: tuple[Block, ...] = ((GOAL, ALL, (0, 1)), (GOAL, ALL, (23, 24)))

LAYOUTS: dict[str, tuple[Block, ...]] = {
    # `two_walls`, on which its `main.py` trains: two goals equally far from the middle row. No cell of it kills.
    "two_goals": TWO_GOALS,
    # Ours: three blocks at either side kill, so that wandering costs. It is its own mirror image both ways.
    "two_goals_deadly": (
        *TWO_GOALS,
        *((DEATH, columns, rows) for columns in ((0, 1), (23, 24)) for rows in ((5, 7), (11, 13), (17, 19))),
    ),
    # Three goals around a square that kills.
    "three_goals": (
        (DEATH, (11, 13), (11, 13)),
        (GOAL, (11, 13), (17, 19)),
        (GOAL, (6, 8), (6, 8)),
        (GOAL, (16, 18), (6, 8)),
    ),
    # A wall with two openings before a goal at the right. Walls hold, as the paper's code says, but does not do.
    "two_slits": ((GOAL, (24, 24), ALL), (WALL, (15, 15), ALL), (FREE, (15, 15), (4, 7)), (FREE, (15, 15), (17, 20))),
    # `cshape`: a goal within three walls, open to the left.
    "c_shape": (
        (GOAL, (10, 14), (10, 14)),
        (WALL, (7, 17), (7, 7)),
        (WALL, (7, 17), (17, 17)),
        (WALL, (17, 17), (7, 17)),
    ),
}
NAMES: tuple[str, ...] = tuple(LAYOUTS)


def paint(blocks: Sequence[Block]) -> np.ndarray:
    """The kinds of all cells, [y, x] int32; a later block covers an earlier one."""
    cells = np.full((SIZE, SIZE), FREE, np.int32)
    for kind, (left, right), (bottom, top) in blocks:
        cells[bottom : top + 1, left : right + 1] = kind
    return cells


class GridworldState(NamedTuple):
    position: jax.Array  # [2] int32: x from the left, y from the bottom


class Gridworld:
    """One layout, without a time limit. obs [2] float32; `info["success"]`: 1 where the step reached a goal.

    Raises UserError for a start that is off the grid or has no free cell.
    """

    def __init__(self, layout: str, start_row: int | None = None, start_column: int | None = None):
        self.cells = paint(LAYOUTS[layout])
        starts = self.cells == FREE
        for field, line, along in (("start_row", start_row, starts), ("start_column", start_column, starts.T)):
            if line is not None:
                require(is_whole(line) and line < SIZE, field, line, f"a whole number from 0 to {SIZE - 1}, or None")
                along[np.arange(SIZE) != line] = False  # a view of `starts`
        where = (start_row, start_column)
        require(bool(starts.any()), "start_row, start_column", where, f"no cell there is free in {layout}")
        self.starts = np.argwhere(starts)[:, ::-1].astype(np.int32)  # [S, 2]: x, y
        self.spec = Spec(obs=jax.ShapeDtypeStruct((2,), jnp.float32), action=Box((2,)))

    def obs(self, state: GridworldState) -> jax.Array:
        return (state.position - MIDDLE).astype(jnp.float32) / MIDDLE

    def reset(self, key: jax.Array, params: PyTree) -> tuple[GridworldState, jax.Array]:
        state = GridworldState(jnp.asarray(self.starts)[jax.random.randint(key, (), 0, len(self.starts))])
        return state, self.obs(state)

    def step(self, state: GridworldState, action: jax.Array, key: jax.Array) -> tuple[GridworldState, TimeStep]:
        cells = jnp.asarray(self.cells)
        move = jnp.round(jnp.clip(action, -1.0, 1.0)).astype(jnp.int32)
        target = jnp.clip(state.position + move, 0, SIZE - 1)
        position = jnp.where(cells[target[1], target[0]] == WALL, state.position, target)
        kind = cells[position[1], position[0]]
        state = GridworldState(position)
        obs, goal = self.obs(state), kind == GOAL
        info = {"success": goal.astype(jnp.float32)}
        reward, never = jnp.asarray(REWARDS)[kind], jnp.zeros((), bool)
        return state, TimeStep(obs, reward, goal | (kind == DEATH), never, obs, info)

    def render(self, states: Sequence[GridworldState]) -> np.ndarray:
        """Goals green, death red, walls grey, the agent dark: [F, 200, 200, 3] uint8, the top row first."""
        frames = COLOURS[np.repeat(self.cells[None], len(states), axis=0)]
        for frame, state in zip(frames, states, strict=True):
            x, y = np.asarray(state.position)
            frame[y, x] = AGENT_COLOUR
        return frames[:, ::-1].repeat(PIXELS, axis=1).repeat(PIXELS, axis=2)


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `gridworld/<name>`. Raises UserError for a name, an engine or an override that does not exist."""
    if name not in LAYOUTS:
        raise unknown("Gridworld", name, NAMES)
    full_name = f"gridworld/{name}"
    check_physics(full_name, physics, ())
    defaults = defaults_of(Gridworld)
    del defaults["layout"]
    options = read_options(full_name, overrides, defaults, episode_length=100)
    return limit_and_repeat(Gridworld(name, **options.rest), options)
