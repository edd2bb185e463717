"""Evaluation: N episodes on N instances, true resets, each counted once from its reset to its first end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlx.algorithm import Algorithm, Key, Mode, Policy
from rlx.environment import Environment
from rlx.errors import require
from rlx.rollout import inner_steps, team_reward, where_done
from rlx.sharding import on_parts


class EvalResult(NamedTuple):
    """One entry an episode. The first N episodes to finish would favour short ones; these are N instances' first."""

    returns: jax.Array  # [N] float32: undiscounted sums of raw rewards, over agents too
    lengths: jax.Array  # [N] float32: inner steps


def make_evaluate(
    env: Environment,
    algorithm: Algorithm,
    num_episodes: int,
    mode: Mode = "greedy",
    max_decisions: int = 0,
    mesh: Mesh | None = None,
) -> Callable[[Policy, Key], EvalResult]:
    """A pure function (policy, key) -> EvalResult. The same key gives the same episodes' starts and noise.

    An episode without an ending is cut at `max_decisions`; 0 takes the environment's time limit. With a `mesh` episodes
    are split over its devices, and are those of one device.

    Raises:
        UserError: the environment has no time limit and `max_decisions` is 0.
    """
    limit = env.spec.episode_length
    require(
        bool(max_decisions or limit),
        "max_decisions",
        max_decisions,
        "at least 1, for the environment has no time limit",
    )
    reset_envs = on_parts(jax.vmap(lambda key: env.reset(key, env.spec.params)), mesh)
    step_envs = on_parts(jax.vmap(env.step), mesh)
    asked = num_episodes
    num_episodes += -asked % (mesh.size if mesh else 1)  # as many on every device; what was not asked for is left out
    decisions = max_decisions or -(-(limit or 0) // env.spec.action_repeat)

    def evaluate(policy: Policy, key: Key) -> EvalResult:
        reset_key, memory_key, run_key = jax.random.split(key, 3)
        env_state, obs = reset_envs(jax.random.split(reset_key, num_episodes))
        memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, num_episodes))
        zeros = jnp.zeros(num_episodes, jnp.float32)
        start = (jnp.zeros((), jnp.int32), env_state, obs, memory, jnp.zeros(num_episodes, bool), zeros, zeros)

        def running(carry):
            return (carry[0] < decisions) & ~carry[4].all()

        def step(carry):
            t, env_state, obs, memory, ended, returns, lengths = carry
            act_key, step_key = jax.random.split(jax.random.fold_in(run_key, t))
            memory, action, _ = algorithm.act(policy, memory, obs, act_key, mode)
            new_state, timestep = step_envs(env_state, action, jax.random.split(step_key, num_episodes))
            # An ended instance keeps its last state: what lies behind an ending may not even be finite.
            env_state, obs = where_done(ended, (env_state, obs), (new_state, timestep.final_obs))
            returns = jnp.where(ended, returns, returns + team_reward(timestep))
            lengths = jnp.where(ended, lengths, lengths + inner_steps(timestep))
            return t + 1, env_state, obs, memory, ended | timestep.terminated | timestep.truncated, returns, lengths

        *_, returns, lengths = jax.lax.while_loop(running, step, start)
        return EvalResult(returns[:asked], lengths[:asked])

    return evaluate
