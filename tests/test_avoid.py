"""Avoiding obstacles: moves, touches and endings by hand, the mirror image, and demonstrations that all arrive."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import avoid
from envs.avoid import OBSTACLES, RADIUS, SCALE, STEP, Avoid, AvoidState, demonstrations
from envs.names import AVOID
from rlx import data
from rlx.data_checks import check_columns
from rlx.data_file import column, describe_env, write
from rlx.errors import UserError
from rlx.types import Box
from tests.test_envs import assert_fixed_point

KEY = jax.random.key(0)
ENV = Avoid()
STEPPED = jax.jit(ENV.step)


def at(x, y):
    position = jnp.array([x, y], jnp.float32)
    return AvoidState(position, position)


def outcome(x, y, action):
    """Reward, finished and terminated of a step from (x, y)."""
    timestep = STEPPED(at(x, y), jnp.array(action, jnp.float32), KEY)[1]
    assert not bool(timestep.truncated) and timestep.info["success"] == timestep.reward
    return float(timestep.reward), float(timestep.info["finished"]), bool(timestep.terminated)


@functools.cache
def shown(seed=0, num_episodes=101, waypoint_noise=0.02):
    """Demonstrations with the most noise that is allowed."""
    return demonstrations(jax.random.key(seed), num_episodes, waypoint_noise)


def split(columns):
    """Observations [T + 1, 4], actions [T, 2] and rewards [T] of each episode, positions in m."""
    ids = columns["episode_ids"]
    cuts = np.flatnonzero(np.diff(ids)) + 1
    observations = np.split(columns["observations"], cuts + np.arange(1, len(cuts) + 1))
    return list(zip(observations, np.split(columns["actions"], cuts), np.split(columns["rewards"], cuts), strict=True))


def test_it_is_an_environment_of_continuous_actions_and_100_steps():
    env = envs.make("avoid/obstacles")
    assert_fixed_point(env)
    assert env.spec.action == Box((2,)) and env.spec.episode_length == 100
    assert avoid.NAMES == AVOID


def test_a_step_adds_the_velocity_and_shows_the_position_before():
    state, timestep = STEPPED(at(0.1, -0.2), jnp.array([1.0, -0.5]), KEY)
    np.testing.assert_allclose(state.position, [0.1125, -0.20625], rtol=1e-6)
    np.testing.assert_allclose(timestep.obs, [0.45, -0.20625 / 0.35, 0.4, -0.2 / 0.35], rtol=1e-6)
    np.testing.assert_array_equal(timestep.obs, timestep.final_obs)
    state, timestep = STEPPED(state, jnp.array([-30.0, 0.0]), KEY)  # clipped
    np.testing.assert_allclose(timestep.obs, [0.4, -0.20625 / 0.35, 0.45, -0.20625 / 0.35], rtol=1e-6)
    state, obs = ENV.reset(KEY, ())
    np.testing.assert_array_equal(obs[:2], obs[2:])


@pytest.mark.parametrize(("x", "y", "action"), [(0.245, 0.0, (1, 0)), (-0.245, 0.0, (-1, 0)), (0.2, -0.345, (0, -1))])
def test_the_edge_holds_what_would_leave_the_world(x, y, action):
    position = STEPPED(at(x, y), jnp.array(action, jnp.float32), KEY)[0].position
    expected = np.where(np.array(action) == 0, [x, y], np.sign(action) * [0.25, 0.35])
    np.testing.assert_allclose(position, expected, atol=1e-7)
    assert outcome(x, y, action) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("start", "end", "touched"),
    [
        ((0.0, -0.2), (0.0, -0.141), False),  # the first obstacle and the point reach 0.04 from (0, -0.1)
        ((0.0, -0.2), (0.0, -0.139), True),
        ((-0.1, -0.1), (0.1, -0.1), True),  # both ends are free
        ((0.0401, -0.2), (0.0401, 0.0), False),
        ((0.0399, -0.2), (0.0399, 0.0), True),
        ((0.0, -0.05), (0.0, 0.0), False),  # behind it
        ((0.0, 0.0), (0.0, 0.22), False),  # between those of the second row, up to the middle one of the third
        ((0.0, 0.0), (0.0, 0.23), True),
        ((0.075, 0.1), (0.075, 0.1), True),  # at rest in one
        ((-0.15, 0.26), (-0.15, 0.26), True),
        ((-0.11, 0.26), (-0.04, 0.26), False),
    ],
)
def test_an_obstacle_is_touched_anywhere_on_the_way(start, end, touched):
    assert bool(avoid.touches(jnp.array(start), jnp.array(end))) == touched
    mirrored = [jnp.array([-x, y]) for x, y in (start, end)]
    assert bool(avoid.touches(*mirrored)) == touched


def test_the_left_half_of_the_line_is_paid_the_right_half_ends_the_episode_unpaid():
    assert outcome(-0.1, 0.345, (0, 1)) == (1.0, 1.0, True)
    assert outcome(0.1, 0.345, (0, 1)) == (0.0, 1.0, True)
    assert outcome(-0.1, 0.345, (1, 0)) == (0.0, 0.0, False)


def test_touching_an_obstacle_ends_the_episode_unpaid():
    assert outcome(0.0, -0.145, (0, 1)) == (0.0, 0.0, True)
    assert outcome(0.0, -0.145, (0, 0.2)) == (0.0, 0.0, False)


def test_straight_ahead_stands_the_first_obstacle():
    """From -0.28 to -0.14 in steps of 0.0125: the twelfth one touches it."""
    env = envs.make("avoid/obstacles", start_noise=0.0)
    state, obs = env.reset(KEY, ())
    np.testing.assert_allclose(obs, [0.0, -0.8, 0.0, -0.8], rtol=1e-6)
    up = jnp.array([0.0, 1.0])
    _, timesteps = jax.lax.scan(lambda state, key: env.step(state, up, key), state, jax.random.split(KEY, 12))
    assert timesteps.terminated.tolist() == [False] * 11 + [True] and not timesteps.reward.any()


def test_time_runs_out_after_100_steps():
    env = envs.make("avoid/obstacles")
    state, _ = env.reset(KEY, ())
    _, timesteps = jax.lax.scan(
        lambda state, key: env.step(state, jnp.zeros(2), key), state, jax.random.split(KEY, 100)
    )
    assert timesteps.truncated.tolist() == [False] * 99 + [True] and not timesteps.terminated.any()


def test_the_world_is_its_own_mirror_image():
    keys = jax.random.split(KEY, 2)
    positions = jax.random.uniform(keys[0], (2000, 2), minval=jnp.array(avoid.LOW), maxval=jnp.array(avoid.HIGH))
    actions = jax.random.uniform(keys[1], (2000, 2), minval=-1.0, maxval=1.0)
    flip = jnp.array([[-1.0, 1.0]])
    step = jax.jit(jax.vmap(lambda x, a: ENV.step(AvoidState(x, x), a, KEY)))
    (state, here), (other, there) = step(positions, actions), step(positions * flip, actions * flip)
    np.testing.assert_allclose(state.position, other.position * flip, atol=1e-7)
    np.testing.assert_array_equal(here.terminated, there.terminated)
    np.testing.assert_array_equal(here.info["finished"], there.info["finished"])
    np.testing.assert_array_equal(here.reward + there.reward, here.info["finished"])  # one of the two is paid
    assert 0.05 < here.terminated.mean() < 0.5


def test_starts_and_actions_have_the_noise_that_is_asked_for():
    def deviations(**options):
        env = Avoid(**options)

        def one(key):
            state, _ = env.reset(key, ())
            return state.position, env.step(state, jnp.zeros(2), key)[0].position - state.position

        starts, moves = jax.jit(jax.vmap(one))(jax.random.split(KEY, 4000))
        return np.abs(np.asarray(starts) - avoid.START).max(), np.asarray(moves / STEP).std()

    assert deviations(start_noise=0.0) == (0.0, 0.0)
    start, move = deviations(start_noise=0.02, action_noise=0.5)
    assert 0.0199 < start <= 0.0200001 and abs(move - 0.5) < 0.03


def test_demonstrations_are_columns_of_a_data_set(tmp_path):
    env = envs.make("avoid/obstacles")
    columns = shown()
    check_columns(columns, env.spec)
    assert columns["episode_ids"][-1] == 100 and columns["terminations"].sum() == 101
    assert not columns["truncations"].any()
    write(tmp_path / "ways.npz", {name: column(array) for name, array in columns.items()}, describe_env(env))
    found = data.read([(tmp_path / "ways.npz", None)], env)
    np.testing.assert_array_equal(found.arrays.actions, columns["actions"])


def test_half_of_the_demonstrations_go_left_and_are_paid_half_go_right():
    for index, (observations, actions, rewards) in enumerate(split(shown())):
        left = index % 2 == 0
        x, y = (observations[:, :2] * SCALE).T
        near = (y > -0.15) & (y < 0.3)  # past the first row they stay on their side
        assert ((x < 0) == left)[near].all() and (x[-1] < 0) == left
        assert y[-1] >= avoid.FINISH > y[-2] and rewards.sum() == rewards[-1] == float(left)
        assert 40 < len(actions) < 90


def test_demonstrations_touch_nothing_and_their_moves_are_their_actions():
    """Reckoned anew, at ten points of each step."""
    for observations, actions, _ in split(shown()):
        assert len(observations) == len(actions) + 1
        positions = observations[:, :2] * SCALE
        np.testing.assert_allclose(np.diff(positions, axis=0), STEP * actions, atol=1e-6)
        np.testing.assert_allclose(observations[1:, 2:], observations[:-1, :2], atol=1e-6)
        way = np.concatenate([positions[:-1] + share * np.diff(positions, axis=0) for share in np.linspace(0, 1, 10)])
        gaps = np.linalg.norm(way[:, None] - OBSTACLES[None, :, :2].astype(float), axis=-1)
        assert (gaps > OBSTACLES[None, :, 2] + RADIUS).all()


@pytest.mark.parametrize("index", [0, 1])
def test_a_demonstration_replayed_step_by_step_arrives(index):
    observations, actions, rewards = split(shown())[index]
    state = at(*(observations[0, :2] * SCALE))
    for t, action in enumerate(actions):
        state, timestep = STEPPED(state, action, jax.random.key(t))
        np.testing.assert_allclose(timestep.obs, observations[t + 1], atol=1e-5)
        assert bool(timestep.terminated) == (t == len(actions) - 1)
    assert timestep.info["finished"] == 1 and timestep.reward == rewards[-1]


def test_the_key_decides_the_demonstrations():
    assert not np.array_equal(shown()["observations"][:1], shown(1)["observations"][:1])
    again = demonstrations(jax.random.key(0), 101, 0.02)
    for name, array in shown().items():
        np.testing.assert_array_equal(array, again[name])


def test_a_picture_shows_obstacles_the_line_and_the_point():
    env = envs.make("avoid/obstacles")
    state, _ = env.reset(KEY, ())
    frames = env.render([state._replace(env=at(0.1, -0.2)), state._replace(env=at(0.0, 0.0))])
    assert frames.shape == (2, 288, 200, 3) and frames.dtype == np.uint8

    def pixel(x, y):
        return tuple(frames[0, int((0.37 - y) / 0.0025), int((x + 0.25) / 0.0025)])

    for x, y, _ in OBSTACLES:
        assert pixel(x, y) == avoid.COLOURS["obstacle"]
    assert pixel(0.1, -0.2) == avoid.POINT_COLOUR
    assert (pixel(-0.2, 0.3501), pixel(0.2, 0.3501)) == (avoid.COLOURS["goal"], avoid.COLOURS["line"])
    assert pixel(0.0, 0.0) == pixel(0.1, -0.18) == avoid.COLOURS["floor"]
    assert (frames[0] != frames[1]).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: envs.make("avoid/obstacle"), "Did you mean avoid/obstacles"),
        (lambda: avoid.make("obstacle"), "Did you mean obstacles"),
        (lambda: envs.make("avoid/obstacles", "mjx"), "mjx.*not available for avoid/obstacles"),
        (lambda: envs.make("avoid/obstacles", start_nois=0.1), "Did you mean start_noise"),
        (lambda: envs.make("avoid/obstacles", start_noise=0.2), "start_noise = 0.2"),
        (lambda: envs.make("avoid/obstacles", action_noise=-1.0), "action_noise = -1.0"),
        (lambda: envs.make("avoid/obstacles", action_noise="much"), "action_noise = 'much'"),
        (lambda: demonstrations(KEY, 0), "num_episodes = 0"),
        (lambda: demonstrations(KEY, 4, 0.05), "waypoint_noise = 0.05"),
    ],
)
def test_what_cannot_be_had_is_said_plainly(build, message):
    with pytest.raises(UserError, match=message):
        build()
