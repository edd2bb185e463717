"""Evaluation: N episodes on N instances, true resets, each counted once from its reset to its first end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlx.agents import team_reward
from rlx.algorithm import Algorithm, Key, Memory, Mode, Policy
from rlx.environment import Environment
from rlx.errors import require
from rlx.rollout import inner_steps, where_done
from rlx.sharding import on_parts
from rlx.types import PyTree, TimeStep


class EvalResult(NamedTuple):
    """One entry an episode. The first E episodes to finish would favour short ones; these are E instances' first."""

    returns: jax.Array  # [E] float32: undiscounted sums of raw rewards, over agents too
    lengths: jax.Array  # [E] float32: inner steps
    diverged: jax.Array | None = None  # [E] float32: 1 where the simulation failed; None if the environment cannot say
    agent_returns: jax.Array | None = None  # [E, N] float32: of each agent; None where they are not paid apart


class Playing(NamedTuple):
    """E episodes in the middle of an evaluation; leaves [E, ...] but for the first and the last."""

    decisions: jax.Array  # () int32: taken so far
    env: Any
    obs: PyTree
    memory: Memory
    ended: jax.Array  # [E] bool
    result: EvalResult  # so far
    key: Key


class Player(NamedTuple):
    """An evaluation step by step; pure functions."""

    begin: Callable[[Policy, Key], Playing]
    advance: Callable[[Policy, Playing], Playing]  # by a decision of those that have not ended
    running: Callable[[Playing], jax.Array]  # () bool: whether some have not


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
        UserError: the environment has no time limit and `max_decisions` is 0; numbers below what they may be; a mode
            that is none.
    """
    player = make_player(env, algorithm, num_episodes, mode, max_decisions, mesh)

    def evaluate(policy: Policy, key: Key) -> EvalResult:
        advance = functools.partial(player.advance, policy)
        result = jax.lax.while_loop(player.running, advance, player.begin(policy, key)).result
        return jax.tree.map(lambda x: x[:num_episodes], result)

    return evaluate


def make_player(
    env: Environment, algorithm: Algorithm, num_episodes: int, mode: Mode, max_decisions: int, mesh: Mesh | None
) -> Player:
    """What `make_evaluate` does, a decision at a time. With a `mesh` there are as many episodes on every device, so at
    times more than `num_episodes`: those behind are nobody's.
    """
    require(num_episodes >= 1, "num_episodes", num_episodes, "at least 1")
    require(mode in get_args(Mode), "mode", mode, " or ".join(get_args(Mode)))
    require(max_decisions >= 0, "max_decisions", max_decisions, "at least 0; 0 for the time limit")
    allowed = "at least 1, for the environment has no time limit"
    require(bool(max_decisions or env.spec.episode_length), "max_decisions", max_decisions, allowed)
    reset_envs = on_parts(jax.vmap(lambda key: env.reset(key, env.spec.params)), mesh)
    step_envs = on_parts(jax.vmap(env.step), mesh)
    num_episodes += -num_episodes % (mesh.size if mesh else 1)
    decisions = max_decisions or env.spec.decisions

    def play(policy: Policy, key: Key, env_state: Any, obs: PyTree, memory: Memory):
        act_key, step_key = jax.random.split(key)
        memory, action, _ = algorithm.act(policy, memory, obs, act_key, mode)
        env_state, timestep = step_envs(env_state, action, jax.random.split(step_key, num_episodes))
        return memory, env_state, timestep

    def measured(timestep: TimeStep) -> EvalResult:
        apart = timestep.reward if timestep.reward.ndim > 1 else None
        return EvalResult(team_reward(timestep), inner_steps(timestep), timestep.info.get("diverged"), apart)

    def begin(policy: Policy, key: Key) -> Playing:
        reset_key, memory_key, run_key = jax.random.split(key, 3)
        env_state, obs = reset_envs(jax.random.split(reset_key, num_episodes))
        memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, num_episodes))
        timestep = jax.eval_shape(play, policy, run_key, env_state, obs, memory)[2]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(measured, timestep))
        never = jnp.zeros(num_episodes, bool)
        return Playing(jnp.zeros((), jnp.int32), env_state, obs, memory, never, nothing, run_key)

    def advance(policy: Policy, now: Playing) -> Playing:
        key = jax.random.fold_in(now.key, now.decisions)
        memory, env_state, timestep = play(policy, key, now.env, now.obs, now.memory)
        # An ended instance keeps its last state: what lies behind an ending may not even be finite.
        env_state, obs = where_done(now.ended, (now.env, now.obs), (env_state, timestep.final_obs))
        total = jax.tree.map(jnp.add, now.result, measured(timestep))
        result = where_done(now.ended, now.result, total)
        ended = now.ended | timestep.terminated | timestep.truncated
        return Playing(now.decisions + 1, env_state, obs, memory, ended, result, now.key)

    def running(now: Playing) -> jax.Array:
        return (now.decisions < decisions) & ~now.ended.all()

    return Player(begin, advance, running)
