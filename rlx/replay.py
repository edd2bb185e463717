"""Replay on the device: what the last iterations have seen, for learners to draw batches from.

A ring of time rows, [G, C, B/G, ...]: `G` groups of neighbouring environments, the last `C` decisions of each
environment. An iteration's trajectory [T, B, ...] goes over the oldest T rows in one update of a slice, in place where
the state is donated, whatever C is. C is a multiple of T (`replay_size` is rounded up), so that no write wraps, every
slot is filled and every slot is drawn. Draws are uniform over everything stored, with replacement; each group gives
every batch an equal part, so that experience stays on the device that holds its group (see `rlx.minibatches`).

A draw is an n-step target in parts. Its window stops at the first ending of either kind, and at the newest row: what
follows that in the ring is the oldest. It bootstraps from the true successor, which is stored: `next_obs[t]` is
`obs[t + 1]` but for endings, and those come when they like, so that leaving it out would save half of the memory only
where they are rare. `obs_dtype` halves or quarters it instead.

Why not flashbax 0.1.3, whose trajectory buffer inserts in place and in constant time too: it draws the environment of
each sample over all of them, which moves experience between devices; its position is part of the state, where the
iteration serves, which every run of a program shares; it is laid out [B, T], so that each trajectory is transposed;
windows are not drawn from the newest n - 1 rows, and endings inside of them are left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlx.algorithm import Key, Plan
from rlx.errors import require
from rlx.machine import mib
from rlx.returns import n_step_window
from rlx.sharding import free_memory, per_env
from rlx.types import Discrete, PyTree, Spec, Transition

ROOM = 0.9  # of the free memory that replay may take; `rlx.footprint` counts the rest once it is compiled
OBS_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "uint8": jnp.uint8}


@per_env
class Rows(NamedTuple):
    """Stored experience. Leaves [G, C, B/G, ...]."""

    obs: PyTree
    action: jax.Array
    reward: jax.Array  # [G, C, B/G], or [G, C, B/G, N] of agents that are paid apart
    terminated: jax.Array
    truncated: jax.Array
    next_obs: PyTree


class Batch(NamedTuple):
    """n-step targets in parts: reward + discount * V(next_obs). Leaves [size, ...] float32 (actions as they were)."""

    obs: PyTree
    action: jax.Array
    reward: jax.Array  # of up to n steps, discounted; [size, N] of agents that are paid apart
    discount: jax.Array  # gamma^k, 0 where the k-th step terminated
    next_obs: PyTree  # the true successor of the k-th step


Draw = Callable[[Key, int, int, float | jax.Array], Batch]  # (key, size, n_step, gamma): as many out of a data set


class Replay(NamedTuple):
    """Pure functions. `iteration` is that of `update`: never vmapped, so positions are the same in every run."""

    init: Callable[[], Rows]
    insert: Callable[[Rows, Transition, jax.Array], Rows]  # (rows, trajectory [T, B], iteration)
    sample: Callable[..., Batch]  # (rows, iteration, key, size, n_step, gamma): leaves [G, size/G, ...]; after insert
    num_rows: int  # decisions kept of each environment: C
    num_groups: int  # G


def make_replay(
    size: int,
    batch_sizes: Sequence[int],
    plan: Plan,
    spec: Spec,
    obs_dtype: str = "float32",
    reward_shape: tuple[int, ...] = (),
) -> Replay:
    """A ring of at least `size` transitions.

    `batch_sizes`: what will be drawn at a time, each a whole number from every group. `obs_dtype`: how floating-point
    observations are stored: float32, bfloat16 (three digits), uint8 (rounded to whole numbers from 0 to 255).
    `reward_shape`: (N,) for agents that are paid apart.
    """
    num_unrolls = max(1, -(-size // (plan.num_envs * plan.unroll_length)))
    num_rows, groups = num_unrolls * plan.unroll_length, math.gcd(plan.num_groups, plan.num_envs, *batch_sizes)
    dtype = OBS_DTYPES[obs_dtype]

    def init() -> Rows:
        def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
            stored = dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
            return jnp.zeros((groups, num_rows, plan.num_envs // groups, *x.shape), stored)

        def column(kind: type, *shape: int) -> jax.Array:
            return jnp.zeros((groups, num_rows, plan.num_envs // groups, *shape), kind)

        actions = column(jnp.int32 if isinstance(spec.action, Discrete) else jnp.float32, *spec.action.shape)
        obs, next_obs = jax.tree.map(zeros, spec.obs), jax.tree.map(zeros, spec.obs)
        rewards = column(jnp.float32, *reward_shape)
        return Rows(obs, actions, rewards, column(jnp.bool_), column(jnp.bool_), next_obs)

    def insert(rows: Rows, trajectory: Transition, iteration: jax.Array) -> Rows:
        position = iteration % num_unrolls * plan.unroll_length

        def write(stored: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(plan.unroll_length, groups, plan.num_envs // groups, *new.shape[2:])
            return jax.lax.dynamic_update_slice_in_dim(
                stored, _encode(jnp.swapaxes(new, 0, 1), stored.dtype), position, 1
            )

        return jax.tree.map(write, rows, Rows(*trajectory[: len(Rows._fields)]))

    def sample(rows: Rows, iteration: jax.Array, key: Key, size: int, n_step: int, gamma: float | jax.Array) -> Batch:
        stored = jnp.minimum(iteration + 1, num_unrolls) * plan.unroll_length
        newest = (iteration % num_unrolls + 1) * plan.unroll_length - 1
        # One call, not one for each group and index: these cost a CPU more than the numbers. An index is up to
        # stored / 2^32 of its chance more probable than another.
        bits = jax.random.bits(key, (2, groups, size // groups), jnp.uint32)
        row = (bits[0] % stored.astype(jnp.uint32)).astype(jnp.int32)
        env = (bits[1] % (plan.num_envs // groups)).astype(jnp.int32)
        windows = partial(_windows, newest=newest, n_step=n_step, gamma=gamma)
        return jax.vmap(windows)(rows, row, env)

    return Replay(init, insert, sample, num_rows, groups)


def mix(parts: Sequence[Batch]) -> Batch:
    """One batch, leaves [sum of sizes, ...], of parts with leaves [G, size_i / G, ...].

    Group by group: joined one behind the other, parts that are split over devices would be moved between them.
    """
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, 1).reshape(-1, *xs[0].shape[2:]), *parts)


def _encode(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating) and dtype == jnp.uint8:
        x = jnp.clip(jnp.round(x), 0, 255)
    return x.astype(dtype)


def _windows(
    rows: Rows, row: jax.Array, env: jax.Array, newest: jax.Array, n_step: int, gamma: float | jax.Array
) -> Batch:
    """Those that begin at `row` of `env`, both [size], in a group, leaves [C, B/G, ...]; `newest` was written last."""
    num_rows = len(rows.reward)

    def window(row: jax.Array, env: jax.Array) -> Batch:
        steps = jnp.arange(n_step)
        index = (row + steps) % num_rows
        terminated, truncated = rows.terminated[index, env], rows.truncated[index, env]
        truncated |= (newest - row) % num_rows == steps  # the oldest rows follow
        reward, discount, last = n_step_window(rows.reward[index, env], terminated, truncated, gamma)
        next_obs = jax.tree.map(lambda x: x[index[last], env].astype(jnp.float32), rows.next_obs)
        obs = jax.tree.map(lambda x: x[row, env].astype(jnp.float32), rows.obs)
        return Batch(obs, rows.action[row, env], reward, discount, next_obs)

    return jax.vmap(window)(row, env)


def check_replay(
    plan: Plan,
    spec: Spec,
    size: int,
    batch_sizes: Sequence[int],
    obs_dtype: str,
    reward_shape: tuple[int, ...] = (),
) -> None:
    """Raises UserError for sizes that cannot be, or that do not fit a device, with the largest that does."""
    require(size >= 1, "algo.replay_size", size, "at least 1")
    replay = make_replay(size, batch_sizes, plan, spec, obs_dtype, reward_shape)
    allowed = (
        f"{plan.num_devices} devices need whole groups, and of num_groups = {plan.num_groups} it leaves "
        f"{replay.num_groups}; a multiple of {plan.num_groups} would do"
    )
    require(replay.num_groups % plan.num_devices == 0, "algo.batch_size", tuple(batch_sizes), allowed)
    taken = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(replay.init)))
    free = free_memory(plan.num_devices)
    copies = 2 if jax.default_backend() == "cpu" else 1  # a checkpoint begins with one on the host
    if free is not None and copies * taken > ROOM * free * plan.num_devices:
        per_iteration = plan.num_envs * plan.unroll_length
        share = ROOM * free * plan.num_devices / (copies * taken)
        fit = int(share * replay.num_rows * plan.num_envs) // per_iteration * per_iteration
        which = " (and again while a checkpoint is written)" if copies > 1 else ""
        allowed = f"it takes {mib(taken / plan.num_devices)}{which} of the {mib(free)} that are free on each device"
        require(False, "algo.replay_size", size, f"{allowed}; of a single run about {fit} fit")
