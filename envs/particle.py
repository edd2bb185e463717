"""Particle worlds: points in a plane that chase, push and tell each other things (Lowe et al. 2017, arXiv 1706.02275).

Each step equals one of the package mpe2, the successor of PettingZoo's MPE, from the same state: observations, rewards
and endings, to 1e-5. Whole episodes part in the last digits of float32, which contacts amplify. Like mpe2, a step moves
by the velocity before it, so that what an agent does shows a step later, and costs it that. `semi_implicit=True` moves
by the velocity after it, as OpenAI's MPE and PettingZoo up to 1.22 did, which most published returns are of. The
two do not compare: on simple_speaker_listener no listener who is told the goal returns more than -11.6 under the one
and -9.0 under the other (`experiments/hasac/bound.py`).

obs = {"agents": [N, d] float32, zeros behind the end of shorter ones (`spec.obs_mask`), "state": [D], all agents'
observations one behind the other, without the zeros}. reward [N]: each agent's own; the return of a team is the sum.
With one agent alone obs is [d], the action [a] and the reward (), as in any other suite.

Actions [N, a], -1 to 1, stand for mpe2's 0 to 1: shares of [nothing, left, right, down, up], then the message, word by
word. With `discrete=True` [N] int32: move + 5 * word. Who cannot move has the message alone; `spec.action_mask` tells
what an agent has, and other entries of a continuous action are ignored. `episode_length`, mpe2's max_cycles, is 25, a
truncation. The other overrides are the arguments of a task's function in `envs.particle_tasks`, which carry mpe2's
names; its curricula, endings on success and limits on the neighbours that are seen are left out.

Units are mpe2's: lengths in half widths of the square that episodes start in, a step lasts 0.1, every mass is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs.adapter import check_physics, defaults_of, limit_and_repeat, read_options
from envs.particle_tasks import TASKS, Agent, Landmark, ParticleState, Task, length
from rlx.environment import Environment
from rlx.errors import unknown
from rlx.types import Box, Discrete, PyTree, Spec, TimeStep

EPISODE_LENGTH = 25
DT, DAMPING = 0.1, 0.25  # of a velocity, the share that a step takes
CONTACT_FORCE, CONTACT_MARGIN = 100.0, 1e-3  # per length of penetration; over which a contact begins
DIRECTIONS = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], np.float32)  # of the five moves

EXTENT, PIXELS, STRIP = 1.4, 200, 20  # a picture reaches from -EXTENT to EXTENT; rows below it for messages
BACKGROUND, STRIP_COLOUR, GREEN = (245, 245, 245), (225, 225, 225), (60, 160, 90)  # green: the goals


NAMES: tuple[str, ...] = tuple(TASKS)


class Particle:
    """A task without its time limit."""

    def __init__(self, task: Task, discrete: bool = False, semi_implicit: bool = False):
        self.task, self.discrete, self.semi_implicit = task, discrete, semi_implicit
        self.num_agents = len(task.agents)
        everyone: list[Agent | Landmark] = [*task.agents, *task.landmarks]
        sizes, collides = np.array([x.size for x in everyone]), np.array([x.collides for x in everyone])
        self.moves, self.speaks = (np.array([getattr(x, f) for x in task.agents])[:, None] for f in ("moves", "speaks"))
        self.accel = np.array([x.accel if x.moves else 0.0 for x in task.agents])[:, None]
        self.max_speed = np.array([x.max_speed for x in task.agents])
        self.touching = sizes[: self.num_agents, None] + sizes[None]  # [N, N + L]: the distance at which two touch
        self.pushed = collides[: self.num_agents, None] & collides[None] & (np.eye(*self.touching.shape) == 0)
        self.spec = self._spec()

    def _spec(self) -> Spec:
        task, N = self.task, self.num_agents
        state = jax.eval_shape(self._draw, jax.eval_shape(lambda: jax.random.key(0)))
        widths = [x.shape[0] for x in jax.eval_shape(task.observe, state)]
        if self.discrete:
            counts = [(5 if x.moves else 1) * (task.message_size if x.speaks else 1) for x in task.agents]
        else:
            counts = [5 * x.moves + task.message_size * x.speaks for x in task.agents]
        if N == 1:
            action = Discrete(counts[0]) if self.discrete else Box((counts[0],), 0.0, 1.0)
            return Spec(jax.ShapeDtypeStruct((widths[0],), jnp.float32), action, dt=DT)
        obs = {"agents": (N, max(widths)), "state": (sum(widths),)}
        shapes = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in obs.items()}
        action = Discrete(max(counts), (N,)) if self.discrete else Box((N, max(counts)), 0.0, 1.0)
        obs_mask, action_mask = (np.arange(max(n))[None] < np.array(n)[:, None] for n in (widths, counts))
        return Spec(shapes, action, N, obs_mask, action_mask, dt=DT)

    def obs(self, state: ParticleState) -> PyTree:
        vectors = self.task.observe(state)
        if self.num_agents == 1:
            return vectors[0]
        width = max(x.shape[0] for x in vectors)
        agents = jnp.stack([jnp.pad(x, (0, width - x.shape[0])) for x in vectors])
        return {"agents": agents, "state": jnp.concatenate(vectors)}

    def _draw(self, key: jax.Array) -> ParticleState:
        agent_key, landmark_key, goal_key = jax.random.split(key, 3)
        task, N, L = self.task, self.num_agents, len(self.task.landmarks)
        agents = jax.random.uniform(agent_key, (N, 2), minval=-1.0, maxval=1.0)
        landmarks = task.landmark_range * jax.random.uniform(landmark_key, (L, 2), minval=-1.0, maxval=1.0)
        goal = jax.random.randint(goal_key, (task.num_goals,), 0, L)
        position = jnp.concatenate([agents, landmarks])
        return ParticleState(position, jnp.zeros_like(agents), jnp.zeros((N, task.message_size)), goal)

    def reset(self, key: jax.Array, params: PyTree) -> tuple[ParticleState, PyTree]:
        state = self._draw(key)
        return state, self.obs(state)

    def read(self, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of actions [N, a], or [N] int32: the forces [N, 2] that agents move by, and what they say [N, C]."""
        size = self.task.message_size
        if self.discrete:
            force = jnp.asarray(DIRECTIONS)[action % 5]
            word = jnp.where(self.moves[:, 0], action // 5, action)
            message = jax.nn.one_hot(word, size)
        else:
            share = (jnp.clip(action, -1.0, 1.0) + 1) / 2
            share = jnp.pad(share, ((0, 0), (0, 5 + size - share.shape[1])))  # who is still or silent has fewer
            force = jnp.stack([share[:, 2] - share[:, 1], share[:, 4] - share[:, 3]], axis=1)
            message = jnp.where(self.moves, share[:, 5:], share[:, :size])
        return force * self.accel, jnp.where(self.speaks, message, 0.0)

    def contacts(self, position: jax.Array) -> jax.Array:
        """[N, 2]: the forces with which others push the agents; soft within CONTACT_MARGIN, then linear."""
        offset = position[: self.num_agents, None] - position[None]
        distance = length(offset)
        penetration = CONTACT_MARGIN * jax.nn.softplus((self.touching - distance) / CONTACT_MARGIN)
        force = jnp.where(self.pushed, CONTACT_FORCE * penetration / distance, 0.0)
        return (force[..., None] * offset).sum(axis=1)

    def step(self, state: ParticleState, action: jax.Array, key: jax.Array) -> tuple[ParticleState, TimeStep]:
        N = self.num_agents
        force, message = self.read(action[None] if N == 1 else action)
        if self.pushed.any():
            force += self.contacts(state.position)
        velocity = (1 - DAMPING) * state.velocity + DT * force
        velocity *= jnp.minimum(1.0, self.max_speed / length(velocity))[:, None]
        agents = state.position[:N] + DT * (velocity if self.semi_implicit else state.velocity)
        state = ParticleState(jnp.concatenate([agents, state.position[N:]]), velocity, message, state.goal)
        obs, never = self.obs(state), jnp.zeros((), bool)
        reward = self.task.reward(state)
        return state, TimeStep(obs, reward[0] if N == 1 else reward, never, never, obs, {})

    def render(self, states: Sequence[ParticleState]) -> np.ndarray:
        """Discs, agents over landmarks, goals green: [F, 200, 200, 3] uint8, the top row first. What agents say stands
        below, in 20 rows more where any of them speaks: from left to right a bar a word in the speaker's colour.

        The view reaches to 1.4, and where something lies beyond in any of the F, as far as that.
        """
        speakers = [i for i, agent in enumerate(self.task.agents) if agent.speaks]
        height = PIXELS + (STRIP if speakers else 0)
        frames: np.ndarray = np.empty((len(states), height, PIXELS, 3), np.uint8)
        farthest = max((float(np.abs(state.position).max()) for state in states), default=0.0)
        extent = max(EXTENT, 1.1 * farthest)
        for frame, state in zip(frames, states, strict=True):
            goals = self.num_agents + np.asarray(state.goal)[: self.task.goals_shown]
            frame[:PIXELS] = self._draw_world(np.asarray(state.position), goals, extent)
            if speakers:
                frame[PIXELS:] = self._draw_messages(np.asarray(state.message), speakers)
        return frames

    def _draw_world(self, position: np.ndarray, goals: np.ndarray, extent: float) -> np.ndarray:
        axis = extent * ((np.arange(PIXELS) + 0.5) / PIXELS * 2 - 1)
        x, y = axis[None], -axis[:, None]
        everyone: list[Agent | Landmark] = [*self.task.agents, *self.task.landmarks]
        frame: np.ndarray = np.full((PIXELS, PIXELS, 3), BACKGROUND, np.uint8)
        for i, (centre_x, centre_y) in reversed(list(enumerate(position))):
            disc = np.hypot(x - centre_x, y - centre_y) < everyone[i].size
            frame[disc] = GREEN if i in goals else everyone[i].colour
        return frame

    def _draw_messages(self, message: np.ndarray, speakers: Sequence[int]) -> np.ndarray:
        bars = np.array([(*self.task.agents[i].colour, x) for i in speakers for x in (*message[i], 0.0)])[:-1]
        at = np.arange(PIXELS) * len(bars) // PIXELS  # which bar each column of pixels is in; a gap behind each speaker
        apart = np.append(at[1:] != at[:-1], False)
        filled = (STRIP - np.arange(STRIP) - 0.5)[:, None] < STRIP * bars[at, 3][None]
        return np.where((filled & ~apart)[..., None], bars[at, :3][None], STRIP_COLOUR).astype(np.uint8)


def make(name: str, physics: str = "auto", **overrides: Any) -> Environment:
    """Builds `particle/<name>`. Raises UserError for a name, an engine or an override that does not exist."""
    if name not in TASKS:
        raise unknown("Particle world", name, NAMES)
    full_name = f"particle/{name}"
    check_physics(full_name, physics, ())
    defaults = {**defaults_of(TASKS[name]), "discrete": False, "semi_implicit": False}
    options = read_options(full_name, overrides, defaults, episode_length=EPISODE_LENGTH)
    kinds = {key: options.rest.pop(key, False) for key in ("discrete", "semi_implicit")}
    return limit_and_repeat(Particle(TASKS[name](**options.rest), **kinds), options)
