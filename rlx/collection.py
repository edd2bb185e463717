"""Rolls policies out into a data set (`rlx.data_file`).

Each part has B environments of its own, whose steps are written one environment after another. An episode that the
end of collecting cuts is truncated there, with its true successor, as at a time limit. New episodes start as in
training (`rlx.rollout`): with a true reset each ("always"), for under a deterministic policy two episodes from one
state of a pool would be the same; or, where resets are slow, from a pool of 128 states, of B where B is more, a
quarter of it new in each chunk. The same arguments give the same file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rlx.algorithm import Algorithm, Key, Mode, Policy
from rlx.data_file import Column, check_target, column, describe_env, obs_columns, write
from rlx.environment import Environment, random_action
from rlx.errors import UserError, require
from rlx.logging import Progress
from rlx.machine import available_memory, versions
from rlx.rolling import Rollout, bytes_per_step, roll_out
from rlx.types import PyTree, Spec

MAX_ENVS = 256  # that a part has unless told; fewer where they would not finish an episode each


class Part(NamedTuple):
    """A policy and how much of the data it gives."""

    algorithm: Algorithm
    policy: Policy
    steps: int
    record: Mapping[str, Any] = {}  # for the metadata: run, step, ...


def random_policy(spec: Spec) -> Algorithm:
    """Acts uniformly at random and learns nothing."""

    def act(policy: Policy, memory: PyTree, obs: PyTree, key: Key, mode: Mode):
        keys = jax.random.split(key, jax.tree.leaves(obs)[0].shape[0])
        return memory, jax.vmap(lambda key: random_action(spec, key))(keys), ()

    return Algorithm(
        lambda key, policy=None: (), lambda state, mode: (), lambda key: (), act, lambda state, *_: (state, {})
    )


def split_steps(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers with sum `total`, each within 1 of its share."""
    ends = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * total).astype(int)
    return np.diff(ends).tolist()


def num_envs_of(env: Environment, steps: int, wanted: int) -> int:
    """How many environments take `steps`; unless told, so many that each can finish an episode."""
    if wanted:
        require(1 <= wanted <= steps, "num_envs", wanted, f"from 1 to the {steps:,} steps of a part")
        return wanted
    return max(1, min(MAX_ENVS, steps // env.spec.decisions))


def collect(
    env: Environment,
    parts: Sequence[Part],
    out: str | Path,
    *,
    mode: Mode = "sample",
    seed: int = 0,
    num_envs: int = 0,
    reset: Literal["pool", "always"] = "always",
    metadata: Mapping[str, Any] = {},
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a data set of the steps of all `parts` and returns its metadata.

    `num_envs`: of each part; 0 for as many as finish an episode each, up to `MAX_ENVS`. Raises UserError, before
    anything compiles, where the file exists or neither disk nor memory have the space; NonFiniteError for a value that
    is not finite.
    """
    progress = progress or Progress()
    for part in parts:
        require(part.steps >= 1, "steps", part.steps, "at least 1 for each part")
    widths = [num_envs_of(env, part.steps, num_envs) for part in parts]
    progress.total_steps = sum(part.steps for part in parts)
    num_bytes = progress.total_steps * bytes_per_step(env)
    check_target(out, num_bytes, overwrite)
    free = available_memory()
    if free and num_bytes > free:
        needs, has = num_bytes / 2**30, free / 2**30
        raise UserError(f"{progress.total_steps:,} steps take {needs:.1f} GiB of memory, of which {has:.1f} are free.")
    rollouts: list[Rollout] = []
    began = time.perf_counter()

    def said(steps: int) -> None:
        steps += sum(int(rollout.lengths.sum()) for rollout in rollouts)
        progress.update(steps, steps / (time.perf_counter() - began), {})

    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        key = jax.random.fold_in(jax.random.key(seed), index)
        acting = (part.algorithm, part.policy, mode)
        rollouts.append(roll_out(env, *acting, part.steps, width, reset, key, progress, said))
    found = [describe(rollout) for rollout in rollouts]
    full = {
        **describe_env(env),
        "physics": env.spec.physics,
        **metadata,
        "parts": [{**part.record, **entry} for part, entry in zip(parts, found, strict=True)],
        "mode": mode,
        "seed": seed,
        "reset": reset,
        "total_steps": progress.total_steps,
        "total_episodes": sum(entry["episodes"] for entry in found),
        "versions": versions(),
    }
    with progress.phase("writing"):
        digest = write(out, columns_of(rollouts, env.spec), full, overwrite)
    return {**full, "sha256": digest}


def describe(rollout: Rollout) -> dict[str, Any]:
    """How many steps and episodes, and the mean return of the episodes that were not cut (None without any)."""
    done = rollout.done()
    rewards = np.concatenate(list(rollout.rows(rollout.reward))).astype(np.float64)
    starts = np.flatnonzero(np.append(True, done[:-1]))
    returns = np.add.reduceat(rewards.reshape(len(done), -1).sum(axis=1), starts)
    last = np.cumsum([row.sum() for row in rollout.rows(rollout.terminated | rollout.truncated)]) - 1
    whole = np.delete(returns, last[rollout.cut])
    mean = float(whole.mean()) if whole.size else None
    return {"steps": len(done), "episodes": len(returns), "whole_episodes": len(whole), "mean_return": mean}


def columns_of(rollouts: Sequence[Rollout], spec: Spec) -> dict[str, Column]:
    """The columns of `rlx.data_file`, streamed an environment at a time."""
    done = np.concatenate([rollout.done() for rollout in rollouts])

    def stream(name: str) -> Column:
        arrays = [getattr(rollout, name) for rollout in rollouts]
        blocks = (block for rollout, array in zip(rollouts, arrays, strict=True) for block in rollout.rows(array))
        return Column((len(done), *arrays[0].shape[2:]), arrays[0].dtype, blocks)

    def with_finals(name: str) -> Iterator[np.ndarray]:
        for rollout in rollouts:
            finals, used = obs_columns(rollout.final_obs)[name], 0
            ended = rollout.rows(rollout.terminated | rollout.truncated)
            for obs, ends in zip(rollout.rows(obs_columns(rollout.obs)[name]), map(np.flatnonzero, ended), strict=True):
                yield np.insert(obs, ends + 1, finals[used : used + len(ends)], axis=0)
                used += len(ends)

    names = {"actions": "action", "rewards": "reward", "terminations": "terminated", "truncations": "truncated"}
    columns = {column: stream(field) for column, field in names.items()}
    for name, leaf in obs_columns(spec.obs).items():
        columns[name] = Column((len(done) + int(done.sum()), *leaf.shape), leaf.dtype, with_finals(name))
    return columns | {"episode_ids": column(np.cumsum(done) - done)}
