"""A point among six obstacles, with two ways around them: after Avoiding of D3IL (arXiv 2402.14606), for fine-tuning.

The obstacles, the start and the finish line lie where D3IL has them (in m, x from the middle); its robot is a point of
radius RADIUS here, which moves as it is told. An action is a velocity: 1 is STEP in one step. The first obstacle stands
straight ahead, and the world is its own mirror image. Past the finish line, or on touching an obstacle, the episode is
terminated. DPPO (arXiv 2409.00588) fine-tunes towards one of the modes of the data: the reward is 1 for crossing the
line in its left half, x < 0, and 0 for everything else. So what is cloned from `demonstrations`, half of them left and
half right, succeeds about half of the time. `episode_length` is 100: 25 decisions of 4 steps.

obs = [x, y, previous x, previous y] / [0.25, 0.35, 0.25, 0.35], the previous position being the one commanded a step
before (at the start: the same). info: `success`, 1 where the step was paid; `finished`, 1 where it crossed the line on
either side. Overrides: `start_noise`, the half width in m of the square of starts; `action_noise`, the standard
deviation of what is added to every action.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.adapter import check_physics, defaults_of, limit_and_repeat, read_options
from rlx.environment import Environment
from rlx.errors import require, unknown
from rlx.types import Box, PyTree, Spec, TimeStep

NAMES = ("obstacles",)
EPISODE_LENGTH = 100
OBSTACLES = np.array(  # [6, 3]: x, y, radius
    [
        [0.0, -0.1, 0.03],
        [-0.075, 0.08, 0.025],
        [0.075, 0.08, 0.025],
        [-0.15, 0.26, 0.025],
        [0.0, 0.26, 0.025],
        [0.15, 0.26, 0.025],
    ],
    np.float32,
)
RADIUS = 0.01  # of the point
STEP = 0.0125  # straight to the finish line: 51 steps
START = np.array([0.0, -0.28], np.float32)
FINISH = 0.35  # y of the line
LOW, HIGH = np.array([-0.25, -0.35], np.float32), np.array([0.25, 0.37], np.float32)  # where the point stays within
SCALE = np.array([0.25, 0.35], np.float32)

# The demonstrated way along the left: beside the first obstacle, around the second row, between two of the third.
WAYPOINTS = np.array([[-0.08, -0.1], [-0.15, 0.08], [-0.075, 0.26]], np.float32)
SPEEDS, GAIN = (0.7, 1.0), 0.5  # shares of the full speed upwards, of the distance to the way that a step takes back

PIXEL = 0.0025  # m
COLOURS = {"floor": (245, 245, 245), "goal": (60, 160, 90), "line": (170, 170, 170), "obstacle": (210, 60, 50)}
POINT_COLOUR = (30, 50, 110)


class AvoidState(NamedTuple):
    position: jax.Array  # [2] float32, m
    previous: jax.Array  # [2] float32, m: where it was a step ago


def touches(start: jax.Array, end: jax.Array) -> jax.Array:
    """() bool: whether the point, going straight from `start` to `end` [2], touches an obstacle."""
    move, offsets = (end - start)[None], jnp.asarray(OBSTACLES[:, :2]) - start[None]
    share = jnp.sum(offsets * move, axis=1) / jnp.maximum(jnp.sum(move**2), 1e-12)
    gaps = offsets - jnp.clip(share, 0.0, 1.0)[:, None] * move
    return jnp.any(jnp.sum(gaps**2, axis=1) < jnp.asarray(OBSTACLES[:, 2] + RADIUS) ** 2)


class Avoid:
    """The world without its time limit. obs [4] float32, actions [2]."""

    def __init__(self, start_noise: float = 0.01, action_noise: float = 0.0):
        require(0 <= start_noise <= 0.05, "start_noise", start_noise, "a half width in m, 0 to 0.05")
        require(action_noise >= 0, "action_noise", action_noise, "a standard deviation, 0 or more")
        self.start_noise, self.action_noise = start_noise, action_noise
        self.spec = Spec(obs=jax.ShapeDtypeStruct((4,), jnp.float32), action=Box((2,)))

    def obs(self, state: AvoidState) -> jax.Array:
        return jnp.concatenate([state.position / SCALE, state.previous / SCALE])

    def reset(self, key: jax.Array, params: PyTree) -> tuple[AvoidState, jax.Array]:
        position = jnp.asarray(START) + self.start_noise * jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
        state = AvoidState(position, position)
        return state, self.obs(state)

    def step(self, state: AvoidState, action: jax.Array, key: jax.Array) -> tuple[AvoidState, TimeStep]:
        velocity = jnp.clip(action, -1.0, 1.0) + self.action_noise * jax.random.normal(key, (2,))
        position = jnp.clip(state.position + STEP * velocity, LOW, HIGH)
        touched = touches(state.position, position)
        finished = (position[1] >= FINISH) & ~touched
        success = (finished & (position[0] < 0)).astype(jnp.float32)
        state = AvoidState(position, state.position)
        obs, never = self.obs(state), jnp.zeros((), bool)
        info = {"success": success, "finished": finished.astype(jnp.float32)}
        return state, TimeStep(obs, success, finished | touched, never, obs, info)

    def render(self, states: Sequence[AvoidState]) -> np.ndarray:
        """Obstacles red, the paid half of the line green, the other grey, the point dark: [F, 288, 200, 3] uint8."""
        width, height = np.rint((HIGH - LOW) / PIXEL).astype(int)
        x = LOW[0] + PIXEL * (np.arange(width) + 0.5)[None]
        y = HIGH[1] - PIXEL * (np.arange(height) + 0.5)[:, None]  # the top row first
        scene = np.full((height, width, 3), COLOURS["floor"], np.uint8)
        line = np.abs(y - FINISH) < PIXEL
        scene[line & (x < 0)], scene[line & (x > 0)] = COLOURS["goal"], COLOURS["line"]
        for centre_x, centre_y, radius in OBSTACLES:
            scene[np.hypot(x - centre_x, y - centre_y) < radius] = COLOURS["obstacle"]
        frames = np.repeat(scene[None], len(states), axis=0)
        for frame, state in zip(frames, states, strict=True):
            point_x, point_y = np.asarray(state.position)
            frame[np.hypot(x - point_x, y - point_y) < RADIUS] = POINT_COLOUR
        return frames


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `avoid/<name>`. Raises UserError for a name, an engine or an override that does not exist."""
    if name not in NAMES:
        raise unknown("Avoid", name, NAMES)
    full_name = f"avoid/{name}"
    check_physics(full_name, physics, ())
    options = read_options(full_name, overrides, defaults_of(Avoid), episode_length=EPISODE_LENGTH)
    return limit_and_repeat(Avoid(**options.rest), options)


def demonstrations(key: jax.Array, num_episodes: int, waypoint_noise: float = 0.01) -> dict[str, np.ndarray]:
    """Scripted episodes of `avoid/obstacles`, as columns of `rlx.data_file`: the even ones left, the odd ones right.

    Each heads upwards at a speed of its own, along WAYPOINTS or their mirror image, which a uniform draw of half width
    `waypoint_noise` (m) moves. All cross the finish line; those on the left are paid. The key decides everything.
    Raises UserError for fewer than 1 episode or for noise that could drive one into an obstacle.
    """
    require(num_episodes >= 1, "num_episodes", num_episodes, "1 or more")
    require(0 <= waypoint_noise <= 0.02, "waypoint_noise", waypoint_noise, "a half width in m, 0 to 0.02")
    sides = jnp.where(jnp.arange(num_episodes) % 2 == 0, 1.0, -1.0).astype(jnp.float32)
    play = jax.jit(jax.vmap(partial(_demonstrate, make("obstacles"), waypoint_noise)))
    first, actions, timesteps = jax.device_get(play(sides, jax.random.split(key, num_episodes)))
    lengths = 1 + np.argmax(timesteps.terminated | timesteps.truncated, axis=1)  # [E]
    times = np.arange(EPISODE_LENGTH + 1)[None]
    steps = times[:, :-1] < lengths[:, None]  # [E, T]: those up to the ending
    observations = np.concatenate([first[:, None], timesteps.final_obs], axis=1)
    return {
        "observations": observations[times <= lengths[:, None]],
        "actions": actions[steps],
        "rewards": timesteps.reward[steps],
        "terminations": timesteps.terminated[steps],
        "truncations": timesteps.truncated[steps],
        "episode_ids": np.repeat(np.arange(num_episodes, dtype=np.int64), lengths),
    }


def _demonstrate(
    env: Environment, waypoint_noise: float, side: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, TimeStep]:
    """The first observation, and actions [T, 2] and time steps [T] beyond the ending. `side`: 1 left, -1 right."""
    reset_key, way_key, speed_key, step_key = jax.random.split(key, 4)
    state, first = env.reset(reset_key, env.spec.params)
    moved = jax.random.uniform(way_key, WAYPOINTS.shape, minval=-waypoint_noise, maxval=waypoint_noise)
    way = jnp.stack([side, jnp.ones_like(side)])[None] * WAYPOINTS + moved
    way = jnp.concatenate([(first[:2] * SCALE)[None], way])  # the last waypoint's x holds on to the line
    speed = jax.random.uniform(speed_key, (), minval=SPEEDS[0], maxval=SPEEDS[1])

    def step(carry, key):
        state, obs = carry
        position = obs[:2] * SCALE
        wanted = jnp.interp(position[1] + STEP * speed, way[:, 1], way[:, 0])
        sideways = jnp.clip(GAIN * (wanted - position[0]) / STEP, -1.0, 1.0)
        action = jnp.stack([sideways, speed])
        state, timestep = env.step(state, action, key)
        return (state, timestep.final_obs), (action, timestep)

    keys = jax.random.split(step_key, EPISODE_LENGTH)
    _, (actions, timesteps) = jax.lax.scan(step, (state, first), keys)
    return first, actions, timesteps
