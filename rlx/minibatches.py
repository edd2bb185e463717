"""Splitting a trajectory into shuffled minibatches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlx.algorithm import Key, Plan
from rlx.errors import require
from rlx.types import PyTree


def scan_minibatches(
    step: Callable[[Any, PyTree, Key], tuple[Any, Any]],
    carry: Any,
    batch: PyTree,
    key: Key,
    num_epochs: int,
    num_minibatches: int,
    segments: bool = False,
    num_groups: int = 1,
) -> tuple[Any, Any]:
    """Runs `step(carry, minibatch, key) -> (carry, out)` over `num_epochs` shuffles of `batch`, leaves [T, B, ...].

    With `segments` a minibatch holds whole columns, [T, B / num_minibatches, ...]; otherwise single transitions,
    [1, T * B / num_minibatches, ...]. Every transition is used once an epoch. Returns the carry and `out` stacked to
    [num_epochs, num_minibatches, ...].

    Neighbouring environments form `num_groups` groups (fewer where the sizes do not divide, see `shuffle_groups`); each
    is shuffled by itself and gives every minibatch an equal part. Experience so stays on the device that holds its
    group: a permutation over all of it would move all of it between devices, in every epoch.
    """
    time, num_envs = jax.tree.leaves(batch)[0].shape[:2]
    groups = shuffle_groups(num_groups, num_envs, time, num_minibatches, segments)
    length = 1 if not segments else time  # of what stays together
    size = time * num_envs // (groups * length)

    def grouped(x):
        """[T, B, ...] to [groups, size, length, ...]."""
        x = jnp.swapaxes(x.reshape(time, groups, num_envs // groups, *x.shape[2:]), 0, 1)
        return (jnp.swapaxes(x, 1, 2) if segments else x).reshape(groups, size, length, *x.shape[3:])

    def minibatch(x, index):
        """[groups, size, length, ...] at index [groups, k] to [length, groups * k, ...]."""
        taken = jax.vmap(lambda of_group, i: of_group[i])(x, index)
        return jnp.moveaxis(taken.reshape(-1, *x.shape[2:]), 1, 0)

    batch = jax.tree.map(grouped, batch)

    def one_minibatch(carry, inputs):
        index, key = inputs
        return step(carry, jax.tree.map(lambda x: minibatch(x, index), batch), key)

    def one_epoch(carry, key):
        shuffle_key, step_key = jax.random.split(key)
        orders = jax.vmap(permutation, (0, None))(jax.random.split(shuffle_key, groups), size)
        indices = jnp.swapaxes(orders.reshape(groups, num_minibatches, -1), 0, 1)
        return jax.lax.scan(one_minibatch, carry, (indices, jax.random.split(step_key, num_minibatches)))

    return jax.lax.scan(one_epoch, carry, jax.random.split(key, num_epochs))


def shuffle_groups(num_groups: int, num_envs: int, unroll_length: int, num_minibatches: int, segments: bool) -> int:
    """The largest divisor of `num_groups` into which environments split, with an equal part for every minibatch."""
    parts = num_envs if segments else num_envs * unroll_length
    return math.gcd(num_groups, num_envs, parts // num_minibatches)


def permutation(key: Key, size: int) -> jax.Array:
    """A random order of 0 .. size - 1, [size] uint32.

    One sort of single words, random bits above and the index below: on a CPU several times as fast as
    `jax.random.permutation`, which showed in PPO's update. Equal random bits (at least 16 of them) leave a pair in
    its order, one pair in 65,536 or fewer; larger sizes take jax's own.
    """
    index_bits = max(1, (size - 1).bit_length())
    if index_bits > 16:
        return jax.random.permutation(key, size).astype(jnp.uint32)
    index = jnp.arange(size, dtype=jnp.uint32)
    words = (jax.random.bits(key, (size,), jnp.uint32) << index_bits) | index
    return jnp.sort(words) & jnp.uint32((1 << index_bits) - 1)


def check_minibatches(plan: Plan, num_minibatches: int, segments: bool = False, of: str = "num_envs") -> None:
    """Raises UserError where a trajectory does not split into equal minibatches, on every device. `of`: what stands in
    the place of num_envs."""
    num_envs = plan.num_envs
    require(num_minibatches >= 1, "algo.num_minibatches", num_minibatches, "at least 1")
    size, what = (num_envs, "num_envs") if segments else (num_envs * plan.unroll_length, f"{of} * unroll_length")
    allowed = f"{what} = {size} must be divisible by it"
    require(size % num_minibatches == 0, "algo.num_minibatches", num_minibatches, allowed)
    groups = shuffle_groups(plan.num_groups, num_envs, plan.unroll_length, num_minibatches, segments)
    allowed = (
        f"{plan.num_devices} devices need whole groups, and of num_groups = {plan.num_groups} it leaves {groups}; "
        f"fewer minibatches, more environments or num_devices = {math.gcd(groups, plan.num_devices)} would do"
    )
    require(groups % plan.num_devices == 0, "algo.num_minibatches", num_minibatches, allowed)
