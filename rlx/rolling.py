"""Policies rolled out with fixed parameters: chunks on the device, whole columns on the host, no learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rlx.algorithm import Algorithm, Key, Mode, Plan, Policy
from rlx.compilation import compile_program
from rlx.environment import Environment, random_action
from rlx.errors import NonFiniteError
from rlx.logging import Progress
from rlx.rollout import make_source
from rlx.types import PyTree, Transition

CHUNK_BYTES = 2**26  # of transitions on the device at a time
MAX_UNROLL = 1024  # steps at a time, so that progress is seen


class Rollout(NamedTuple):
    """B environments; leaves [B, L, ...], of which environment b has the first `lengths[b]` steps."""

    obs: PyTree
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    lengths: np.ndarray  # [B] int64
    cut: np.ndarray  # [B] bool: whether the last episode is one that the end of collecting cut
    final_obs: PyTree  # [E, ...] of the episodes, environment after environment

    def rows(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """The valid steps of a leaf, an environment at a time."""
        return (array[b, :length] for b, length in enumerate(self.lengths))

    def done(self) -> np.ndarray:
        """[N] bool."""
        return np.concatenate(list(self.rows(self.terminated | self.truncated)))


def bytes_per_step(env: Environment) -> int:
    """Of one step in a file, and about as many on the host."""
    action = jax.eval_shape(lambda key: random_action(env.spec, key), jax.random.key(0))
    leaves = [*jax.tree.leaves(env.spec.obs), action]
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves) + 4 * env.spec.num_agents + 2 + 8


def roll_out(
    env: Environment,
    algorithm: Algorithm,
    policy: Policy,
    mode: Mode,
    steps: int,
    num_envs: int,
    reset: Literal["pool", "always"],
    key: Key,
    progress: Progress,
    said: Callable[[int], None],
) -> Rollout:
    """`steps` of `num_envs` environments together; `said` is told, as they come, how many there are."""
    lengths = np.full(num_envs, steps // num_envs)
    lengths[: steps % num_envs] += 1
    longest = int(lengths[0])
    unroll = max(1, min(CHUNK_BYTES // (2 * bytes_per_step(env) * num_envs), MAX_UNROLL, longest))
    init, chunk = make_chunk(env, algorithm, mode, Plan(num_envs, unroll, 1, env.spec.action_repeat), reset)
    init_key, run_key = jax.random.split(key)
    with progress.phase("compiling"):
        state = jax.jit(init)(init_key)
        compiled = compile_program(jax.jit(chunk, donate_argnums=1).lower(policy, state, run_key))
    host = None
    cut, finals = np.zeros(num_envs, bool), []
    with progress.phase("collecting"):
        for start in range(0, longest, unroll):
            state, *given = compiled(policy, state, jax.random.fold_in(run_key, start))
            trajectory, nonfinite = jax.device_get(given)
            check_finite(nonfinite)
            trajectory = jax.tree.map(lambda x: x[: longest - start].swapaxes(0, 1), trajectory)  # noqa: B023
            times = start + np.arange(len(trajectory.reward[0]))[None]
            ended = trajectory.terminated | trajectory.truncated
            cut_here = (times == lengths[:, None] - 1) & ~ended
            cut |= cut_here.any(axis=1)
            trajectory = trajectory._replace(truncated=trajectory.truncated | cut_here)
            index, t = np.nonzero((ended | cut_here) & (times < lengths[:, None]))
            finals.append((index, t + start, jax.tree.map(lambda x: x[index, t], trajectory.next_obs)))  # noqa: B023
            columns = trajectory._replace(next_obs=())
            if host is None:
                host = jax.tree.map(lambda x: np.empty((num_envs, longest, *x.shape[2:]), x.dtype), columns)
            for whole, part_of in zip(jax.tree.leaves(host), jax.tree.leaves(columns), strict=True):
                whole[:, start : start + unroll] = part_of
            said(int(np.minimum(lengths, start + unroll).sum()))
    assert host is not None
    order = np.lexsort((np.concatenate([t for _, t, _ in finals]), np.concatenate([index for index, _, _ in finals])))
    final_obs = jax.tree.map(lambda *x: np.concatenate(x)[order], *(obs for _, _, obs in finals))
    return Rollout(host.obs, host.action, host.reward, host.terminated, host.truncated, lengths, cut, final_obs)


def make_chunk(
    env: Environment, algorithm: Algorithm, mode: Mode, plan: Plan, reset: Literal["pool", "always"]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Pure functions: key -> state, and (policy, state, key) -> (state, trajectory without extras, nonfinite)."""
    source = make_source(env, plan, reset, max(plan.num_envs, 128))  # of a few starts a data set would show a few tasks

    def act(policy: Policy, memory: PyTree, obs: PyTree, key: Key, _: Mode):
        return algorithm.act(policy, memory, obs, key, mode)

    acting = algorithm._replace(act=act)

    def chunk(policy: Policy, state: Any, key: Key) -> tuple[Any, Transition, Mapping[str, jax.Array]]:
        pool_key, collect_key = jax.random.split(key)
        state, trajectory, stats = source.collect(acting, policy, source.refresh(state, pool_key), collect_key)
        return state, trajectory._replace(extras=()), stats.nonfinite

    return lambda key: source.init(acting, key), chunk


def check_finite(nonfinite: Mapping[str, Any]) -> None:
    """Raises NonFiniteError for an environment (index, or -1) that gave a value that is not finite."""
    for leaf, index in nonfinite.items():
        if index >= 0:
            raise NonFiniteError(f"environment {index} gave a value that is not finite in {leaf}; nothing was written.")


def first_episodes(
    env: Environment, algorithm: Algorithm, policy: Policy, mode: Mode, number: int, key: Key
) -> tuple[list[np.ndarray], np.ndarray]:
    """The first episodes of `number` environments whose observations are vectors: of each the observations [L + 1, d],
    the final one last; and their returns [number]. Those without an end are cut at the environment's time limit."""
    quiet, steps = Progress(quiet=True), number * env.spec.decisions
    rolled = roll_out(env, algorithm, policy, mode, steps, number, "always", key, quiet, lambda steps: None)
    ended = rolled.terminated | rolled.truncated
    lengths = ended.argmax(axis=1) + 1
    finals = np.append(0, np.cumsum(ended.sum(axis=1))[:-1])  # where an environment's own begin
    paths = [np.vstack([rolled.obs[b, :n], rolled.final_obs[finals[b]]]) for b, n in enumerate(lengths)]
    returns = [rolled.reward[b, :n].sum() for b, n in enumerate(lengths)]
    return paths, np.asarray(returns)
