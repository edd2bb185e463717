"""Splitting a trajectory into shuffled minibatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

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
        indices = jax.random.permutation(shuffle_key, size).reshape(num_minibatches, -1)
        return jax.lax.scan(one_minibatch, carry, (indices, jax.random.split(step_key, num_minibatches)))

    return jax.lax.scan(one_epoch, carry, jax.random.split(key, num_epochs))


def check_minibatches(num_envs: int, unroll_length: int, num_minibatches: int, segments: bool = False) -> None:
    """Raises UserError where a trajectory does not split into equal minibatches."""
    require(num_minibatches >= 1, "algo.num_minibatches", num_minibatches, "at least 1")
    size, what = (num_envs, "num_envs") if segments else (num_envs * unroll_length, "num_envs * unroll_length")
    allowed = f"{what} = {size} must be divisible by it"
    require(size % num_minibatches == 0, "algo.num_minibatches", num_minibatches, allowed)
