"""Evaluation: N episodes on N instances, true resets, each counted once from its reset to its first end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlx.agents import team_reward
from rlx.algorithm import Algorithm, Key, Memory, Mode, Policy
from rlx.environment import Environment
from rlx.errors import require
from rlx.rollout import inner_steps, where_done
from rlx.sharding import on_parts
from rlx.types import PyTree


class EvalResult(NamedTuple):
    """One entry an episode. The first N episodes to finish would favour short ones; these are N instances' first."""

    returns: jax.Array  # [N] float32: undiscounted sums of raw rewards, over agents too
    lengths: jax.Array  # [N] float32: inner steps
    diverged: jax.Array | None = None  # [N] float32: 1 where the simulation failed; None if the environment cannot say


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

    def play(policy: Policy, key: Key, env_state: Any, obs: PyTree, memory: Memory):
        act_key, step_key = jax.random.split(key)
        memory, action, _ = algorithm.act(policy, memory, obs, act_key, mode)
        env_state, timestep = step_envs(env_state, action, jax.random.split(step_key, num_episodes))
        return memory, env_state, timestep

    def evaluate(policy: Policy, key: Key) -> EvalResult:
        reset_key, memory_key, run_key = jax.random.split(key, 3)
        env_state, obs = reset_envs(jax.random.split(reset_key, num_episodes))
        memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, num_episodes))
        zeros = jnp.zeros(num_episodes, jnp.float32)
        reports = "diverged" in jax.eval_shape(play, policy, run_key, env_state, obs, memory)[2].info
        nothing = EvalResult(zeros, zeros, zeros if reports else None)
        start = (jnp.zeros((), jnp.int32), env_state, obs, memory, jnp.zeros(num_episodes, bool), nothing)

        def running(carry):
            return (carry[0] < decisions) & ~carry[4].all()

        def step(carry):
            t, env_state, obs, memory, ended, result = carry
            memory, new_state, timestep = play(policy, jax.random.fold_in(run_key, t), env_state, obs, memory)
            # An ended instance keeps its last state: what lies behind an ending may not even be finite.
            env_state, obs = where_done(ended, (env_state, obs), (new_state, timestep.final_obs))
            diverged = timestep.info["diverged"] if reports else None
            new = EvalResult(team_reward(timestep), inner_steps(timestep), diverged)
            result = jax.tree.map(lambda total, x: jnp.where(ended, total, total + x), result, new)
            return t + 1, env_state, obs, memory, ended | timestep.terminated | timestep.truncated, result

        *_, result = jax.lax.while_loop(running, step, start)
        return jax.tree.map(lambda x: x[:asked], result)

    return evaluate
