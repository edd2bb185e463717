"""The environment source: the only place that steps environments for learning.

Auto reset happens here. The state holds a pool of true reset states, read by index: a true reset at every ending would
run inside every step under `vmap` (a settling reset costs hundreds of physics steps). Once an epoch new states replace
the oldest quarter of the pool: on a task whose reset settles, a whole new pool took a fifth of the environment's time.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlx.agents import team_reward
from rlx.algorithm import Algorithm, Key, Memory, Plan, Policy, Source
from rlx.environment import Environment
from rlx.sharding import on_all, on_parts, per_env
from rlx.types import EpisodeStats, PyTree, TimeStep, Transition


@per_env
class Episodes(NamedTuple):
    """B environments in the middle of an episode each; leaves [B, ...]."""

    env: Any
    obs: PyTree
    memory: Memory
    returns: jax.Array  # [B] float32: so far
    lengths: jax.Array  # [B] float32: inner steps so far
    cuts: jax.Array  # [B] float32: inner steps after which the first episode is cut; infinite afterwards


class EnvSourceState(NamedTuple):
    """Everything about B running environments, and the pool of P reset states, leaves [P, ...]."""

    episodes: Episodes
    pool_env: Any  # the oldest states first
    pool_obs: PyTree


class Inputs(NamedTuple):
    """What B environments need for one step; leaves [B, ...]."""

    action: jax.Array
    memory: Memory  # after acting
    step_key: Key
    start: jax.Array  # of a new episode: an index into the pool, or the key of a reset
    new_memory: Memory  # of a new episode


def where_done(done: jax.Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Leafwise `where` with `done` [B] broadcast over the trailing axes of leaves [B, ...]."""

    def select(x, y):
        return jnp.where(done.reshape(done.shape + (1,) * (x.ndim - done.ndim)), x, y)

    return jax.tree.map(select, on_true, on_false)


def inner_steps(timestep: TimeStep) -> jax.Array:
    """Inner steps that each decision took, float32: what an action repeat reports in `info`, else 1."""
    return timestep.info.get("steps", jnp.ones_like(timestep.terminated, jnp.float32))


def nonfinite_envs(tree: PyTree, name: str) -> dict[str, jax.Array]:
    """For each float leaf [T, B, ...]: the index of one environment that holds a value that is not finite, or -1."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            bad = ~jnp.isfinite(leaf).all(axis=(0, *range(2, leaf.ndim)))
            index = jnp.arange(bad.size, dtype=jnp.int32)
            found[name + jax.tree_util.keystr(path)] = jnp.where(bad, index, -1).max()
    return found


def make_source(
    env: Environment,
    plan: Plan,
    reset: Literal["pool", "always"] = "pool",
    pool_size: int = 128,
    stagger: bool = False,
    mesh: Mesh | None = None,
) -> Source:
    """A Source over `plan.num_envs` copies of `env`, each taking `plan.unroll_length` decisions a `collect`.

    `reset`: "pool" takes one of `pool_size` prepared states at every ending; "always" runs a true reset for every
    environment at every step and uses it where an episode ended (fresh every time, and slow where a reset is slow).

    `stagger`: cuts each environment's first episode (`truncated`) after a random number of steps up to its time limit.
    Where nothing else ends them, episodes would otherwise begin together for the whole run, and every trajectory would
    show one phase of an episode alone: a learner can forget how to start. Cut episodes are left out of EpisodeStats.

    `mesh`: environments are split over its devices; the pool is on each of them.
    """
    num_envs = plan.num_envs
    params = env.spec.params
    reset_envs = jax.vmap(env.reset, in_axes=(0, None))
    pool_size = pool_size if reset == "pool" else 1
    num_new = -(-pool_size // 4)  # states that a refresh draws
    num_parts = 1 if mesh is None else mesh.size
    num_drawn = -(-max(pool_size, num_envs) // num_parts) * num_parts  # the same on every number of parts, and a rest

    def init(algorithm: Algorithm, key: Key) -> EnvSourceState:
        env_key, memory_key, cut_key = jax.random.split(key, 3)
        drawn = on_parts(lambda keys: reset_envs(keys, params), mesh)(jax.random.split(env_key, num_drawn))
        memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, num_envs))
        env_state, obs = jax.tree.map(lambda x: x[:num_envs], drawn)
        pool_env, pool_obs = jax.tree.map(lambda x: x[:pool_size], drawn)  # four refreshes replace them all
        returns, lengths = jnp.zeros((2, num_envs), jnp.float32)
        cuts = jnp.full(num_envs, jnp.inf, jnp.float32)
        if stagger and env.spec.episode_length:
            cuts = jax.random.randint(cut_key, (num_envs,), 1, env.spec.episode_length + 1).astype(jnp.float32)
        return EnvSourceState(Episodes(env_state, obs, memory, returns, lengths, cuts), pool_env, pool_obs)

    def refresh(state: EnvSourceState, key: Key) -> EnvSourceState:
        new = on_all(lambda keys: reset_envs(keys, params), mesh)(jax.random.split(key, num_new))
        pool = (state.pool_env, state.pool_obs)
        pool_env, pool_obs = jax.tree.map(lambda x, y: jnp.concatenate([x[num_new:], y]), pool, new)
        return state._replace(pool_env=pool_env, pool_obs=pool_obs)

    def advance(episodes: Episodes, inputs: Inputs, pool: tuple[Any, PyTree]):
        """One step of a device's environments, and a new episode where one ended."""
        env_state, timestep = jax.vmap(env.step)(episodes.env, inputs.action, inputs.step_key)
        returns, lengths = episodes.returns + team_reward(timestep), episodes.lengths + inner_steps(timestep)
        whole = timestep.terminated | timestep.truncated
        done = whole | (lengths >= episodes.cuts)
        after = Episodes(env_state, timestep.final_obs, inputs.memory, returns, lengths, episodes.cuts)

        def reset_ended() -> Episodes:
            if reset == "always":
                new_env, new_obs = reset_envs(inputs.start, params)
            else:
                new_env, new_obs = jax.tree.map(lambda x: x[inputs.start], pool)
            zeros, never = jnp.zeros_like(returns), jnp.full_like(returns, jnp.inf)
            return where_done(done, Episodes(new_env, new_obs, inputs.new_memory, zeros, zeros, never), after)

        info = {k: v.astype(jnp.float32).mean(keepdims=True) for k, v in timestep.info.items() if k != "steps"}

        def over_ended(x: jax.Array) -> jax.Array:
            return jnp.where(whole, x, 0.0).sum(keepdims=True)  # [1] of each device: added up once an iteration

        count = over_ended(jnp.ones_like(returns))
        stats = EpisodeStats(count, over_ended(returns), over_ended(lengths), info, {})
        # Most steps end no episode: then neither the pool is read nor the physics state copied.
        episodes = jax.lax.cond(done.any(), reset_ended, lambda: after)
        return episodes, timestep._replace(truncated=done & ~timestep.terminated, info={}), stats

    advance_all = on_parts(advance, mesh, num_shared=1)

    def collect(algorithm: Algorithm, policy: Policy, state: EnvSourceState, key: Key):
        pool = (state.pool_env, state.pool_obs)

        def step(episodes: Episodes, key: Key):
            act_key, step_key, start_key, memory_key = jax.random.split(key, 4)
            memory, action, extras = algorithm.act(policy, episodes.memory, episodes.obs, act_key, "explore")
            if reset == "always":
                start = jax.random.split(start_key, num_envs)
            else:
                start = jax.random.randint(start_key, (num_envs,), 0, pool_size)
            new_memory = jax.vmap(algorithm.memory)(jax.random.split(memory_key, num_envs))
            inputs = Inputs(action, memory, jax.random.split(step_key, num_envs), start, new_memory)
            after, (_, reward, terminated, truncated, next_obs, _), stats = advance_all(episodes, inputs, pool)
            transition = Transition(episodes.obs, action, reward, terminated, truncated, next_obs, extras)
            return after, (transition, stats)

        keys = jax.random.split(key, plan.unroll_length)
        episodes, (trajectory, stats) = jax.lax.scan(step, state.episodes, keys)
        nonfinite = nonfinite_envs(trajectory.next_obs, "obs") | nonfinite_envs(trajectory.reward, "reward")
        info = jax.tree.map(jnp.mean, stats.info)
        stats = EpisodeStats(stats.episodes.sum(), stats.returns.sum(), stats.lengths.sum(), info, nonfinite)
        return EnvSourceState(episodes, *pool), trajectory, stats

    return Source(init, refresh, collect)
