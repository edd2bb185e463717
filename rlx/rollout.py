"""The environment source: the only place that steps environments for learning.

Auto reset happens here. The state holds a pool of true reset states, read by index: a true reset at every ending would
run inside every step under `vmap` (a settling reset costs hundreds of physics steps). Once an epoch new states replace
the oldest quarter of the pool: on a task whose reset settles, a whole new pool took a fifth of the environment's time.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlx.algorithm import Algorithm, Key, Memory, Plan, Policy, Source
from rlx.environment import Environment
from rlx.types import EpisodeStats, PyTree, TimeStep, Transition


class EnvSourceState(NamedTuple):
    """Everything about B running environments. Leaves of `env`, `obs`, `memory` are [B, ...], of the pool [P, ...]."""

    env: Any
    obs: PyTree
    memory: Memory
    pool_env: Any  # the oldest states first
    pool_obs: PyTree
    returns: jax.Array  # [B] float32: of the running episodes
    lengths: jax.Array  # [B] float32: inner steps
    cuts: jax.Array  # [B] float32: inner steps after which the first episode is cut; infinite afterwards


def where_done(done: jax.Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Leafwise `where` with `done` [B] broadcast over the trailing axes of leaves [B, ...]."""

    def select(x, y):
        return jnp.where(done.reshape(done.shape + (1,) * (x.ndim - done.ndim)), x, y)

    return jax.tree.map(select, on_true, on_false)


def inner_steps(timestep: TimeStep) -> jax.Array:
    """Inner steps that each decision took, float32: what an action repeat reports in `info`, else 1."""
    return timestep.info.get("steps", jnp.ones_like(timestep.terminated, jnp.float32))


def team_reward(timestep: TimeStep) -> jax.Array:
    """[B] float32: the reward, summed over agents where they are paid apart ([B, N])."""
    return timestep.reward.reshape(timestep.terminated.shape + (-1,)).sum(axis=-1)


def nonfinite_envs(tree: PyTree, name: str) -> dict[str, jax.Array]:
    """For each float leaf [T, B, ...]: the index of one environment that holds a value that is not finite, or -1."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            bad = ~jnp.isfinite(leaf).all(axis=(0, *range(2, leaf.ndim)))
            found[name + jax.tree_util.keystr(path)] = jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)
    return found


def make_source(
    env: Environment,
    plan: Plan,
    reset: Literal["pool", "always"] = "pool",
    pool_size: int = 128,
    stagger: bool = False,
) -> Source:
    """A Source over `plan.num_envs` copies of `env`, each taking `plan.unroll_length` decisions a `collect`.

    `reset`: "pool" takes one of `pool_size` prepared states at every ending; "always" runs a true reset for every
    environment at every step and uses it where an episode ended (fresh every time, and slow where a reset is slow).

    `stagger`: cuts each environment's first episode (`truncated`) after a random number of steps up to its time limit.
    Where nothing else ends them, episodes would otherwise begin together for the whole run, and every trajectory would
    show one phase of an episode alone: a learner can forget how to start. Cut episodes are left out of EpisodeStats.
    """
    num_envs = plan.num_envs
    params = env.spec.params
    reset_envs = jax.vmap(env.reset, in_axes=(0, None))
    pool_size = min(pool_size, num_envs) if reset == "pool" else 1
    num_new = -(-pool_size // 4)  # states that a refresh draws

    def init(algorithm: Algorithm, key: Key) -> EnvSourceState:
        env_key, memory_key, cut_key = jax.random.split(key, 3)
        env_state, obs = reset_envs(jax.random.split(env_key, num_envs), params)
        memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, num_envs))
        zeros = jnp.zeros(num_envs, jnp.float32)
        pool_env, pool_obs = jax.tree.map(lambda x: x[:pool_size], (env_state, obs))  # four refreshes replace them all
        cuts = jnp.full(num_envs, jnp.inf, jnp.float32)
        if stagger and env.spec.episode_length:
            cuts = jax.random.randint(cut_key, (num_envs,), 1, env.spec.episode_length + 1).astype(jnp.float32)
        return EnvSourceState(env_state, obs, memory, pool_env, pool_obs, zeros, zeros, cuts)

    def refresh(state: EnvSourceState, key: Key) -> EnvSourceState:
        new = reset_envs(jax.random.split(key, num_new), params)
        pool = (state.pool_env, state.pool_obs)
        pool_env, pool_obs = jax.tree.map(lambda x, y: jnp.concatenate([x[num_new:], y]), pool, new)
        return state._replace(pool_env=pool_env, pool_obs=pool_obs)

    def new_episodes(state: EnvSourceState, key: Key):
        if reset == "always":
            return reset_envs(jax.random.split(key, num_envs), params)
        index = jax.random.randint(key, (num_envs,), 0, pool_size)
        return jax.tree.map(lambda x: x[index], (state.pool_env, state.pool_obs))

    def reset_ended(algorithm: Algorithm, state: EnvSourceState, done: jax.Array, key: Key) -> EnvSourceState:
        reset_key, memory_key = jax.random.split(key)
        new_env, new_obs = new_episodes(state, reset_key)
        new_memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, num_envs))
        zeros, never = jnp.zeros_like(state.returns), jnp.full_like(state.cuts, jnp.inf)
        fresh = (new_env, new_obs, new_memory, zeros, zeros, never)
        running = (state.env, state.obs, state.memory, state.returns, state.lengths, state.cuts)
        env_state, obs, memory, *counts = where_done(done, fresh, running)
        return EnvSourceState(env_state, obs, memory, state.pool_env, state.pool_obs, *counts)

    def collect(algorithm: Algorithm, policy: Policy, state: EnvSourceState, key: Key):
        def step(state: EnvSourceState, key: Key):
            act_key, step_key, reset_key = jax.random.split(key, 3)
            memory, action, extras = algorithm.act(policy, state.memory, state.obs, act_key, "explore")
            env_state, timestep = jax.vmap(env.step)(state.env, action, jax.random.split(step_key, num_envs))
            returns, lengths = state.returns + team_reward(timestep), state.lengths + inner_steps(timestep)
            terminated, next_obs = timestep.terminated, timestep.final_obs
            whole = terminated | timestep.truncated
            done = whole | (lengths >= state.cuts)
            transition = Transition(
                state.obs, action, timestep.reward, terminated, done & ~terminated, next_obs, extras
            )
            state = state._replace(env=env_state, obs=next_obs, memory=memory, returns=returns, lengths=lengths)
            ended = whole.astype(jnp.float32)
            info = {k: v.astype(jnp.float32).mean() for k, v in timestep.info.items() if k != "steps"}
            sums = EpisodeStats(ended.sum(), (ended * returns).sum(), (ended * lengths).sum(), info, {})
            # Most steps end no episode: then neither the pool is read nor the physics state copied.
            state = jax.lax.cond(done.any(), lambda: reset_ended(algorithm, state, done, reset_key), lambda: state)
            return state, (transition, sums)

        state, (trajectory, sums) = jax.lax.scan(step, state, jax.random.split(key, plan.unroll_length))
        info = jax.tree.map(jnp.mean, sums.info)
        nonfinite = nonfinite_envs(trajectory.next_obs, "obs") | nonfinite_envs(trajectory.reward, "reward")
        stats = EpisodeStats(sums.episodes.sum(), sums.returns.sum(), sums.lengths.sum(), info, nonfinite)
        return state, trajectory, stats

    return Source(init, refresh, collect)
