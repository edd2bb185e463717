"""Tasks of the particle worlds (`envs.particle`): who lives in them, what is seen and what is paid.

The functions and their arguments carry mpe2's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlx.errors import require

GREY, BLUE, RED = (120, 120, 120), (60, 90, 200), (210, 60, 50)
FOOD_COLOUR, FOREST_COLOUR = (200, 150, 40), (190, 225, 190)
TINY = 1e-12  # two points at one place push each other nowhere, instead of to NaN


class ParticleState(NamedTuple):
    """N agents, L landmarks. `Particle.obs` is what is seen of it: any state can be the start of an episode."""

    position: jax.Array  # [N + L, 2] float32: agents, then landmarks
    velocity: jax.Array  # [N, 2] float32: landmarks rest
    message: jax.Array  # [N, C] float32: what each agent said in the last step
    goal: jax.Array  # [G] int32: landmarks that chance chose at reset


class Agent(NamedTuple):
    size: float = 0.05  # radius
    collides: bool = False
    moves: bool = True
    speaks: bool = False
    accel: float = 5.0
    max_speed: float = float("inf")
    colour: tuple[int, int, int] = BLUE


class Landmark(NamedTuple):
    size: float = 0.05  # radius
    collides: bool = False
    colour: tuple[int, int, int] = GREY


class Task(NamedTuple):
    """What sets one world apart from the others."""

    agents: Sequence[Agent]
    landmarks: Sequence[Landmark]
    observe: Callable[[ParticleState], list[jax.Array]]  # of each agent a vector
    reward: Callable[[ParticleState], jax.Array]  # [N], of the state after the step
    message_size: int = 0  # C
    num_goals: int = 0  # G
    goals_shown: int | None = None  # how many of them a picture has in green, the first; None: all
    landmark_range: float = 1.0  # landmarks start from -landmark_range to landmark_range


def length(x: jax.Array) -> jax.Array:
    """[...] of vectors [..., 2]."""
    return jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=-1), TINY**2))


def distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """[A, B] between points [A, 2] and [B, 2]."""
    return length(a[:, None] - b[None])


def seen(state: ParticleState, agent: int, points: jax.Array) -> jax.Array:
    """[2 P]: `points` [P, 2] as they lie from `agent`."""
    return (points - state.position[agent][None]).ravel()


def without(x: jax.Array, index: int) -> jax.Array:
    """`x` less x[index]."""
    return jnp.concatenate([x[:index], x[index + 1 :]])


def outside(position: jax.Array) -> jax.Array:
    """[...]: the fine, before its factor, for agents at `position` [..., 2] beyond 0.9 of an axis; 10 at most each."""
    x = jnp.abs(position)
    beyond = jnp.where(x < 1.0, 10.0 * (x - 0.9), jnp.minimum(jnp.exp(2.0 * x - 2.0), 10.0))
    return jnp.where(x < 0.9, 0.0, beyond).sum(axis=-1)


def check_counts(**counts: int) -> None:
    """Raises UserError for a number of agents or food below 1."""
    for field, count in counts.items():
        require(count >= 1, field, count, "a whole number of at least 1")


def simple() -> Task:
    """One agent goes to one landmark, and pays for its squared distance."""

    def observe(state: ParticleState) -> list[jax.Array]:
        return [jnp.concatenate([state.velocity[0], seen(state, 0, state.position[1:])])]

    def reward(state: ParticleState) -> jax.Array:
        return -jnp.sum((state.position[:1] - state.position[1:]) ** 2, axis=1)

    return Task([Agent()], [Landmark()], observe, reward)


def simple_spread(N: int = 3, local_ratio: float = 0.5) -> Task:
    """N agents cover N landmarks: all pay for the distance from each landmark to its nearest agent, and for collisions.

    `local_ratio`: the weight of an agent's own collisions; that of the common distances is 1 - local_ratio.
    Raises UserError for N below 1 and a ratio outside of 0 to 1.
    """
    check_counts(N=N)
    require(0 <= local_ratio <= 1, "local_ratio", local_ratio, "a share, 0 to 1")
    size = 0.15

    def observe(state: ParticleState) -> list[jax.Array]:
        agents, landmarks = state.position[:N], state.position[N:]

        def of(i: int) -> jax.Array:
            near = [seen(state, i, landmarks), seen(state, i, without(agents, i))]
            heard = without(state.message, i).ravel()  # nobody speaks, and the reference shows it
            return jnp.concatenate([state.velocity[i], agents[i], *near, heard])

        return [of(i) for i in range(N)]

    def reward(state: ParticleState) -> jax.Array:
        agents, landmarks = state.position[:N], state.position[N:]
        uncovered = distances(landmarks, agents).min(axis=1).sum()
        hits = (distances(agents, agents) < 2 * size) & ~np.eye(N, dtype=bool)
        return -(1 - local_ratio) * uncovered - local_ratio * hits.sum(axis=1)

    return Task([Agent(size, collides=True)] * N, [Landmark()] * N, observe, reward, message_size=2)


def simple_reference(local_ratio: float = 0.5) -> Task:
    """Two agents, each of which must go to the landmark (of three) that the other one alone knows.

    `local_ratio`: the weight of the distance of the agent that one guides; that of the mean of both is 1 - local_ratio.
    Raises UserError for a ratio outside of 0 to 1.
    """
    require(0 <= local_ratio <= 1, "local_ratio", local_ratio, "a share, 0 to 1")
    colours = np.full((3, 3), 0.25) + 0.5 * np.eye(3)

    def observe(state: ParticleState) -> list[jax.Array]:
        def of(i: int) -> jax.Array:
            goal = jnp.asarray(colours)[state.goal[i]]
            return jnp.concatenate([state.velocity[i], seen(state, i, state.position[2:]), goal, state.message[1 - i]])

        return [of(i) for i in range(2)]

    def reward(state: ParticleState) -> jax.Array:
        own = -length(state.position[:2][::-1] - state.position[2:][state.goal])  # whom agent i guides: 1 - i
        return (1 - local_ratio) * own.mean() + local_ratio * own

    return Task([Agent(speaks=True)] * 2, [Landmark()] * 3, observe, reward, message_size=10, num_goals=2)


def simple_speaker_listener() -> Task:
    """A speaker, who sees the goal and cannot move, and a listener, who moves; both pay its squared distance to it."""
    colours = np.full((3, 3), 0.15) + 0.5 * np.eye(3)

    def observe(state: ParticleState) -> list[jax.Array]:
        listener = [state.velocity[1], seen(state, 1, state.position[2:]), state.message[0]]
        return [jnp.asarray(colours)[state.goal[0]], jnp.concatenate(listener)]

    def reward(state: ParticleState) -> jax.Array:
        error = jnp.sum((state.position[1] - state.position[2:][state.goal[0]]) ** 2)
        return jnp.stack([-error, -error])

    agents = [Agent(0.075, moves=False, speaks=True, colour=GREY), Agent(0.075)]
    return Task(agents, [Landmark(0.04)] * 3, observe, reward, message_size=3, num_goals=1)


def simple_adversary(N: int = 2) -> Task:
    """N agents know which of N landmarks is the goal, the adversary (agent 0) does not, and all want to be near it.

    They gain the adversary's distance and pay that of the nearest of them. Raises UserError for N below 1.
    """
    check_counts(N=N)

    def observe(state: ParticleState) -> list[jax.Array]:
        agents, landmarks = state.position[: N + 1], state.position[N + 1 :]
        near = [jnp.concatenate([seen(state, i, landmarks), seen(state, i, without(agents, i))]) for i in range(N + 1)]
        goal = landmarks[state.goal]
        return [near[0], *(jnp.concatenate([seen(state, i, goal), near[i]]) for i in range(1, N + 1))]

    def reward(state: ParticleState) -> jax.Array:
        agents, goal = state.position[: N + 1], state.position[N + 1 :][state.goal]
        away = distances(agents, goal)[:, 0]
        return jnp.concatenate([-away[:1], jnp.full(N, away[0] - away[1:].min())])

    agents = [Agent(0.15, colour=RED), *[Agent(0.15)] * N]
    return Task(agents, [Landmark(0.08)] * N, observe, reward, num_goals=1)


def simple_push() -> Task:
    """An agent wants to be at the goal, one of two landmarks; the adversary (agent 0), who does not know which of them
    it is, gains the agent's distance and pays its own."""
    colours = np.array([[0.1, 0.9, 0.1], [0.1, 0.1, 0.9]])
    goal_colours = np.array([[0.25, 0.75, 0.25], [0.25, 0.25, 0.75]])

    def observe(state: ParticleState) -> list[jax.Array]:
        def near(i: int) -> list[jax.Array]:
            return [seen(state, i, state.position[2:]), state.position[1 - i] - state.position[i]]

        landmarks, other = near(1)
        goal = [seen(state, 1, state.position[2:][state.goal]), jnp.asarray(goal_colours)[state.goal[0]]]
        agent = [state.velocity[1], *goal, landmarks, jnp.asarray(colours).ravel(), other]
        return [jnp.concatenate([state.velocity[0], *near(0)]), jnp.concatenate(agent)]

    def reward(state: ParticleState) -> jax.Array:
        away = distances(state.position[:2], state.position[2:][state.goal])[:, 0]
        return jnp.stack([away[1] - away[0], -away[1]])

    agents = [Agent(collides=True, colour=RED), Agent(collides=True)]
    return Task(agents, [Landmark()] * 2, observe, reward, num_goals=1)


def simple_crypto() -> Task:
    """Alice (agent 2) tells Bob (1) one of two words, encrypted by a key that both have and Eve (0) has not.

    Bob and Alice gain Eve's squared error, and pay Bob's; Eve pays hers. A silent message counts for no error.
    """
    size = 4

    def observe(state: ParticleState) -> list[jax.Array]:
        word, key = jax.nn.one_hot(state.goal, size)
        said = state.message[2]
        return [said, jnp.concatenate([key, said]), jnp.concatenate([word, key])]

    def reward(state: ParticleState) -> jax.Array:
        word = jax.nn.one_hot(state.goal[:1], size)
        spoke = (state.message != 0).any(axis=1)
        eve, bob, _ = jnp.where(spoke, jnp.sum((state.message - word) ** 2, axis=1), 0.0)
        return jnp.stack([-eve, eve - bob, eve - bob])

    agents = [Agent(moves=False, speaks=True, colour=colour) for colour in (RED, BLUE, BLUE)]
    return Task(agents, [Landmark()] * 2, observe, reward, message_size=size, num_goals=2, goals_shown=1)


def simple_tag(num_good: int = 1, num_adversaries: int = 3, num_obstacles: int = 2) -> Task:
    """Adversaries, which come first, chase faster good agents among obstacles.

    A collision costs a good agent 10 and gives every adversary 10; good agents pay for leaving the square.
    Raises UserError for teams of less than 1 and fewer than 0 obstacles.
    """
    check_counts(num_good=num_good, num_adversaries=num_adversaries)
    require(num_obstacles >= 0, "num_obstacles", num_obstacles, "a whole number of at least 0")
    first, N = num_adversaries, num_adversaries + num_good  # good agents are first .. N - 1
    adversary_size, good_size = 0.075, 0.05

    def observe(state: ParticleState) -> list[jax.Array]:
        agents, landmarks = state.position[:N], state.position[N:]

        def of(i: int) -> jax.Array:
            near = [seen(state, i, landmarks), seen(state, i, without(agents, i))]
            good = state.velocity[first:]
            good = good if i < first else without(good, i - first)
            return jnp.concatenate([state.velocity[i], agents[i], *near, good.ravel()])

        return [of(i) for i in range(N)]

    def reward(state: ParticleState) -> jax.Array:
        adversaries, good = state.position[:first], state.position[first:N]
        caught = (distances(good, adversaries) < adversary_size + good_size).astype(jnp.float32)
        return jnp.concatenate([jnp.full(first, 10 * caught.sum()), -10 * caught.sum(axis=1) - outside(good)])

    adversary = Agent(adversary_size, collides=True, accel=3.0, max_speed=1.0, colour=RED)
    agents = [adversary] * first + [Agent(good_size, collides=True, accel=4.0, max_speed=1.3)] * num_good
    return Task(agents, [Landmark(0.2, True)] * num_obstacles, observe, reward, landmark_range=0.9)


def simple_world_comm(
    num_good: int = 2, num_adversaries: int = 4, num_obstacles: int = 1, num_food: int = 2, num_forests: int = 2
) -> Task:
    """`simple_tag` with food, and with forests, out of which and into which none but the leader of the adversaries
    (agent 0) sees; the leader tells the adversaries words.

    A collision costs a good agent 5 and gives every adversary 5; food gives 2 a step. Good agents pay twice the fine
    for leaving the square and 0.05 of the distance to the nearest food, adversaries 0.1 of that to the nearest good
    agent. Raises UserError for teams of less than 1, no food, and fewer than 0 obstacles or forests.
    """
    check_counts(num_good=num_good, num_adversaries=num_adversaries, num_food=num_food)
    for field, count in (("num_obstacles", num_obstacles), ("num_forests", num_forests)):
        require(count >= 0, field, count, "a whole number of at least 0")
    first, N = num_adversaries, num_adversaries + num_good  # good agents are first .. N - 1
    adversary_size, good_size, food_size, forest_size = 0.075, 0.045, 0.03, 0.3
    food_start = N + num_obstacles
    forest_start = food_start + num_food
    reach = forest_size + np.array([adversary_size] * first + [good_size] * num_good)[:, None]

    def observe(state: ParticleState) -> list[jax.Array]:
        agents, landmarks = state.position[:N], state.position[N:]
        inside = distances(agents, state.position[forest_start:]) < reach  # [N, forests]
        together = (inside[:, None] & inside[None]).any(axis=-1)
        in_the_open = ~inside.any(axis=1)
        visible = together | (in_the_open[:, None] & in_the_open[None]) | (np.arange(N)[:, None] == 0)

        def of(i: int) -> jax.Array:
            def if_visible(x: jax.Array, of_whom: jax.Array) -> jax.Array:
                return jnp.where(of_whom[:, None], x, 0.0).ravel()

            others = if_visible(without(agents, i) - agents[i][None], without(visible[i], i))
            near = [state.velocity[i], agents[i], seen(state, i, landmarks), others]
            forests = jnp.where(inside[i], 1.0, -1.0)
            speed, of_good = state.velocity[first:], visible[i, first:]
            if i < first:
                return jnp.concatenate([*near, if_visible(speed, of_good), forests, state.message[0]])
            return jnp.concatenate([*near, forests, if_visible(without(speed, i - first), without(of_good, i - first))])

        return [of(i) for i in range(N)]

    def reward(state: ParticleState) -> jax.Array:
        adversaries, good = state.position[:first], state.position[first:N]
        apart = distances(good, adversaries)
        caught = (apart < adversary_size + good_size).astype(jnp.float32)
        to_food = distances(good, state.position[food_start:forest_start])
        eaten = (to_food < good_size + food_size).sum(axis=1)
        of_good = 2 * eaten - 5 * caught.sum(axis=1) - 2 * outside(good) - 0.05 * to_food.min(axis=1)
        return jnp.concatenate([5 * caught.sum() - 0.1 * apart.min(axis=0), of_good])

    adversary = Agent(adversary_size, collides=True, accel=3.0, max_speed=1.0, colour=RED)
    good_agent = Agent(good_size, collides=True, accel=4.0, max_speed=1.3)
    agents = [adversary._replace(speaks=True)] + [adversary] * (first - 1) + [good_agent] * num_good
    landmarks = [Landmark(0.2, True)] * num_obstacles + [Landmark(food_size, colour=FOOD_COLOUR)] * num_food
    landmarks += [Landmark(forest_size, colour=FOREST_COLOUR)] * num_forests
    return Task(agents, landmarks, observe, reward, message_size=4, landmark_range=0.9)


TASKS: dict[str, Callable[..., Task]] = {
    "simple": simple,
    "simple_adversary": simple_adversary,
    "simple_crypto": simple_crypto,
    "simple_push": simple_push,
    "simple_reference": simple_reference,
    "simple_speaker_listener": simple_speaker_listener,
    "simple_spread": simple_spread,
    "simple_tag": simple_tag,
    "simple_world_comm": simple_world_comm,
}
