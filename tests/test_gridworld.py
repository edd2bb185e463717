"""Gridworlds: moves, rewards and endings by hand, and the layouts of the paper's code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import gridworld
from envs.gridworld import COLOURS, DEATH, FREE, GOAL, WALL, Gridworld, GridworldState
from envs.names import GRIDWORLD
from rlx.errors import UserError
from rlx.types import Box
from tests.test_envs import assert_fixed_point

KEY = jax.random.key(0)


def at(*position):
    return GridworldState(jnp.array(position, jnp.int32))


def step(layout, position, action):
    """The position after one step, as a list, and the time step."""
    state, timestep = Gridworld(layout).step(at(*position), jnp.array(action, jnp.float32), KEY)
    return state.position.tolist(), timestep


def outcome(layout, position, action):
    timestep = step(layout, position, action)[1]
    assert not bool(timestep.truncated)
    return float(timestep.reward), bool(timestep.terminated), float(timestep.info["success"])


def starts(count=10_000, layout="two_goals", **options):
    """Positions [count, 2] of as many resets."""
    env = Gridworld(layout, **options)
    reset = jax.jit(jax.vmap(lambda key: env.reset(key, ())[0].position))
    return np.asarray(reset(jax.random.split(KEY, count)))


def test_names_are_those_that_the_registry_lists():
    assert sorted(gridworld.NAMES) == sorted(GRIDWORLD)


@pytest.mark.parametrize("name", gridworld.NAMES)
def test_every_layout_is_an_environment_of_continuous_actions_and_100_steps(name):
    env = envs.make(f"gridworld/{name}")
    assert_fixed_point(env)
    assert env.spec.action == Box((2,)) and env.spec.episode_length == 100


@pytest.mark.parametrize(("position", "obs"), [((12, 12), [0, 0]), ((0, 24), [-1, 1]), ((18, 9), [0.5, -0.25])])
def test_the_observation_is_the_position_over_half_the_grid(position, obs):
    env = Gridworld("two_goals")
    assert env.obs(at(*position)).tolist() == obs
    timestep = env.step(at(*position), jnp.zeros(2), KEY)[1]
    assert timestep.obs.tolist() == timestep.final_obs.tolist() == obs


@pytest.mark.parametrize(
    ("action", "move"),
    [
        ((0.0, 0.0), (0, 0)),
        ((0.5, -0.5), (0, 0)),  # a half is rounded to even
        ((0.51, -0.51), (1, -1)),
        ((0.49, 1.0), (0, 1)),
        ((-7.0, 30.0), (-1, 1)),  # clipped before it is rounded
    ],
)
def test_actions_are_clipped_and_rounded_to_moves(action, move):
    assert step("two_goals", (12, 12), action)[0] == [12 + move[0], 12 + move[1]]


@pytest.mark.parametrize(
    ("position", "action", "reached"),
    [((0, 12), (-1, 0), [0, 12]), ((0, 12), (-1, 1), [0, 13]), ((24, 0), (1, -1), [24, 0]), ((3, 24), (0, 1), [3, 24])],
)
def test_the_edge_holds_what_would_leave_the_grid(position, action, reached):
    assert step("c_shape", position, action)[0] == reached


@pytest.mark.parametrize(
    ("position", "action", "reached"),
    [
        ((14, 12), (1, 0), [14, 12]),
        ((14, 3), (1, -1), [14, 3]),  # not even along the wall
        ((14, 5), (1, 0), [15, 5]),  # through an opening
        ((14, 8), (1, -1), [15, 7]),
        ((15, 7), (0, 1), [15, 7]),
    ],
)
def test_walls_cannot_be_entered(position, action, reached):
    assert step("two_slits", position, action)[0] == reached
    assert outcome("two_slits", position, action) == (0.0, False, 0.0)


def test_goals_and_death_end_an_episode_and_nothing_else_pays():
    assert outcome("two_goals", (12, 2), (0, -1)) == outcome("two_goals", (12, 22), (0, 1)) == (20.0, True, 1.0)
    assert outcome("two_goals", (12, 2), (1, 0)) == outcome("two_goals", (2, 12), (-1, 0)) == (0.0, False, 0.0)
    assert outcome("two_goals_deadly", (2, 12), (-1, 0)) == outcome("three_goals", (12, 10), (0, 1)) == (-10, True, 0)


def test_time_runs_out_after_100_steps_and_a_goal_at_the_last_one_is_a_termination():
    env = envs.make("gridworld/two_goals", start_row=12)
    state, _ = env.reset(KEY, ())
    _, timesteps = jax.lax.scan(
        lambda state, key: env.step(state, jnp.zeros(2), key), state, jax.random.split(KEY, 100)
    )
    assert timesteps.truncated.tolist() == [False] * 99 + [True] and not timesteps.terminated.any()
    assert not timesteps.reward.any()
    env = envs.make("gridworld/two_goals", start_row=2, episode_length=1)
    timestep = env.step(env.reset(KEY, ())[0], jnp.array([0.0, -1.0]), KEY)[1]
    assert (bool(timestep.terminated), bool(timestep.truncated), float(timestep.reward)) == (True, False, 20.0)


@pytest.mark.parametrize(
    ("layout", "goals", "deaths", "walls"),
    [
        ("two_goals", 4 * 25, 0, 0),
        ("two_goals_deadly", 4 * 25, 6 * 6, 0),
        ("three_goals", 27, 9, 0),
        ("two_slits", 25, 0, 25 - 8),
        ("c_shape", 25, 0, 3 * 11 - 2),
    ],
)
def test_layouts_have_the_cells_that_the_paper_gives_them(layout, goals, deaths, walls):
    cells = Gridworld(layout).cells
    assert [(cells == kind).sum() for kind in (GOAL, DEATH, WALL)] == [goals, deaths, walls]
    assert (cells == cells[:, ::-1]).all() == layout.endswith(("goals", "goals_deadly"))
    assert (cells == cells[::-1]).all() == (layout != "three_goals")


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_from_the_middle_row_both_goals_are_eleven_steps_away(direction):
    env = envs.make("gridworld/two_goals", start_row=12, start_column=12)
    state, _ = env.reset(KEY, ())
    action = jnp.array([0.0, direction])
    _, timesteps = jax.lax.scan(lambda state, key: env.step(state, action, key), state, jax.random.split(KEY, 11))
    assert timesteps.reward.tolist() == [0.0] * 10 + [20.0]
    np.testing.assert_allclose(timesteps.obs[-1], [0.0, direction * 11 / 12], rtol=1e-6)


def test_episodes_start_on_all_free_cells_alike():
    for layout in gridworld.NAMES:
        free = Gridworld(layout).cells == FREE
        x, y = starts(layout=layout).T
        counts = np.zeros(free.shape, int)
        np.add.at(counts, (y, x), 1)
        assert counts[~free].sum() == 0
        expected = 10_000 / free.sum()  # about 20 a cell
        assert abs(((counts[free] - expected) ** 2 / expected).mean() - 1) < 0.35  # chi^2: 5 standard errors


def test_a_start_can_be_a_row_a_column_or_a_cell():
    assert (starts(start_row=12)[:, 1] == 12).all() and len(np.unique(starts(start_row=12)[:, 0])) == 25
    assert (starts(start_column=3)[:, 0] == 3).all() and len(np.unique(starts(start_column=3)[:, 1])) == 21
    assert np.unique(starts(10, start_row=2, start_column=24), axis=0).tolist() == [[24, 2]]
    assert np.unique(starts(100, "two_slits", start_column=15)[:, 1]).tolist() == [4, 5, 6, 7, 17, 18, 19, 20]


def test_a_picture_shows_the_cells_by_their_colours_and_the_agent_on_them():
    env = envs.make("gridworld/two_goals_deadly", start_row=12, start_column=12)
    state, _ = env.reset(KEY, ())
    frames = env.render([state, state._replace(env=at(3, 24))])
    assert frames.shape == (2, 200, 200, 3) and frames.dtype == np.uint8
    small = frames[:, 4::8, 4::8]
    np.testing.assert_array_equal(frames, small.repeat(8, axis=1).repeat(8, axis=2))
    assert tuple(small[0, 12, 12]) == tuple(small[1, 0, 3]) == gridworld.AGENT_COLOUR  # the top row comes first
    differ = (small[0] != COLOURS[env.env.cells][::-1]).any(axis=-1)
    assert np.argwhere(differ).tolist() == [[12, 12]]
    assert env.render([]).shape == (0, 200, 200, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("two_goal", {}, "Did you mean gridworld/two_goals"),
        ("two_goals", {"start_rows": 12}, "Did you mean start_row"),
        ("two_goals", {"start_row": 25}, "start_row = 25 .* a whole number from 0 to 24"),
        ("two_goals", {"start_column": -1}, "start_column = -1"),
        ("two_goals", {"start_row": "middle"}, "start_row = 'middle'"),
        ("two_goals", {"start_row": True}, "start_row = True"),
        ("two_goals", {"start_row": 0}, r"\(0, None\) .* no cell there is free in two_goals"),
        ("three_goals", {"start_row": 12, "start_column": 12}, "no cell there is free"),
        ("two_goals", {"layout": "c_shape"}, "override 'layout' does not exist"),
        ("two_goals", {"episode_length": -1}, "episode_length = -1"),
    ],
)
def test_what_cannot_be_had_is_said_plainly(name, options, message):
    with pytest.raises(UserError, match=message):
        envs.make(f"gridworld/{name}", **options)


def test_there_is_no_physics_engine_to_choose():
    with pytest.raises(UserError, match="mjx.*not available for gridworld/two_goals"):
        envs.make("gridworld/two_goals", "mjx")
