"""The best return that there is on particle/simple_speaker_listener, under both orders of a step.

    python experiments/hasac/bound.py [--starts 2000]

A listener who knows the goal from the first step on, and one who is told it after that step and goes towards the middle
of the three landmarks before. The axes of the plane are apart and the cost is quadratic: along each the best forces are
found by projected gradient descent with momentum on the 25 of them. Prints means with their standard errors.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

import envs

GRADIENT_STEPS, RATE, MOMENTUM = 3000, 0.05, 0.9
PUSH, DAMPING, DT = 0.5, 0.25, 0.1  # of a full force on the velocity of the next step; of the velocity; of a step


def cost(force: jax.Array, offset: jax.Array, semi_implicit: bool) -> jax.Array:
    """Sum of squared distances along one axis of a listener who starts at rest, `offset` from the goal."""

    def step(carry, force):
        position, velocity = carry
        after = (1 - DAMPING) * velocity + PUSH * force
        position += DT * (after if semi_implicit else velocity)
        return (position, after), position**2

    return jax.lax.scan(step, (offset, 0.0), force)[1].sum()


def best(offset: jax.Array, first: jax.Array, told: bool, semi_implicit: bool, length: int) -> jax.Array:
    """The least cost along one axis; `told`: the first force is `first`, of one who does not know the goal yet."""

    def limited(force: jax.Array) -> jax.Array:
        force = jnp.clip(force, -1.0, 1.0)
        return force.at[0].set(first) if told else force

    def descend(carry, _):
        force, momentum = carry
        momentum = MOMENTUM * momentum + jax.grad(cost)(force, offset, semi_implicit)
        return (limited(force - RATE * momentum), momentum), None

    start = (limited(jnp.zeros(length)), jnp.zeros(length))
    (force, _), _ = jax.lax.scan(descend, start, length=GRADIENT_STEPS)
    return cost(force, offset, semi_implicit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=2000, help="episodes")
    args = parser.parse_args()
    env = envs.make("particle/simple_speaker_listener")
    states, _ = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(jax.random.key(0), args.starts), ())
    position, goal = states.env.position, states.env.goal[:, 0]  # listener is point 1, landmarks 2 to 4
    target = jnp.take_along_axis(position[:, 2:], goal[:, None, None], axis=1)[:, 0]
    offset, middle = position[:, 1] - target, position[:, 2:].mean(axis=1)
    first = jnp.clip(3.0 * (middle - position[:, 1]), -1.0, 1.0)
    for semi_implicit in (False, True):
        for told in (False, True):
            costs = jax.vmap(lambda x, y, told=told, s=semi_implicit: best(x, y, told, s, env.spec.episode_length))
            returns = -2.0 * jax.jit(costs)(offset.ravel(), first.ravel()).reshape(offset.shape).sum(axis=1)
            order = "velocity first" if semi_implicit else "position first (mpe2)"
            knows = "told after the first step" if told else "knows the goal"
            print(f"{order:22s} {knows:26s} {returns.mean():7.2f} +- {returns.std() / args.starts**0.5:.2f}")


if __name__ == "__main__":
    main()
