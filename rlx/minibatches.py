"""Splitting a trajectory into shuffled minibatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlx.algorithm import Key
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
) -> tuple[Any, Any]:
    """Runs `step(carry, minibatch, key) -> (carry, out)` over `num_epochs` shuffles of `batch`, leaves [T, B, ...].

    With `segments` a minibatch holds whole columns, [T, B / num_minibatches, ...]; otherwise single transitions,
    [1, T * B / num_minibatches, ...]. Every transition is used once an epoch. Returns the carry and `out` stacked to
    [num_epochs, num_minibatches, ...].
    """
    if not segments:
        batch = jax.tree.map(lambda x: x.reshape((1, -1) + x.shape[2:]), batch)
    size = jax.tree.leaves(batch)[0].shape[1]

    def one_minibatch(carry, inputs):
        index, key = inputs
        return step(carry, jax.tree.map(lambda x: x[:, index], batch), key)

    def one_epoch(carry, key):
        shuffle_key, step_key = jax.random.split(key)
        indices = permutation(shuffle_key, size).reshape(num_minibatches, -1)
        return jax.lax.scan(one_minibatch, carry, (indices, jax.random.split(step_key, num_minibatches)))

    return jax.lax.scan(one_epoch, carry, jax.random.split(key, num_epochs))


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


def check_minibatches(num_envs: int, unroll_length: int, num_minibatches: int, segments: bool = False) -> None:
    """Raises UserError where a trajectory does not split into equal minibatches."""
    require(num_minibatches >= 1, "algo.num_minibatches", num_minibatches, "at least 1")
    size, what = (num_envs, "num_envs") if segments else (num_envs * unroll_length, "num_envs * unroll_length")
    allowed = f"{what} = {size} must be divisible by it"
    require(size % num_minibatches == 0, "algo.num_minibatches", num_minibatches, allowed)
