"""Minibatches: random orders, and that every transition is used once an epoch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.minibatches import permutation, scan_minibatches


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 8192, 2**16, 2**16 + 3])
def test_a_permutation_holds_every_index_once(size):
    order = np.asarray(jax.jit(permutation, static_argnums=1)(jax.random.key(0), size))
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_every_order_of_three_is_as_likely_as_any_other():
    orders = jax.vmap(permutation, in_axes=(0, None))(jax.random.split(jax.random.key(0), 60_000), 3)
    words = np.asarray(orders) @ np.array([9, 3, 1])
    _, counts = np.unique(words, return_counts=True)
    assert len(counts) == 6
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in a thousand draws, and the key is fixed


@pytest.mark.parametrize("size", [64, 1000])
def test_an_index_lands_anywhere(size):
    """The place of index 0 and of the last one is uniform: mean and spread of their places over many draws."""
    orders = jax.vmap(permutation, in_axes=(0, None))(jax.random.split(jax.random.key(1), 4000), size)
    for index in (0, size - 1):
        places = np.argmax(np.asarray(orders) == index, axis=1)
        assert abs(places.mean() / (size - 1) - 0.5) < 4 * np.sqrt(1 / 12 / 4000)
        assert abs(places.std() / size - np.sqrt(1 / 12)) < 0.02


@pytest.mark.parametrize("segments", [False, True])
def test_every_transition_is_used_once_an_epoch_and_its_leaves_stay_together(segments):
    time, envs = 4, 6
    batch = {"a": jnp.arange(time * envs).reshape(time, envs), "b": jnp.arange(time * envs).reshape(time, envs, 1) * 10}

    def step(carry, minibatch, key):
        return carry + 1, minibatch

    count, seen = scan_minibatches(step, jnp.int32(0), batch, jax.random.key(0), 2, 3, segments)
    assert int(count) == 6
    assert seen["a"].shape == ((2, 3, 4, 2) if segments else (2, 3, 1, 8))
    np.testing.assert_array_equal(seen["b"][..., 0], seen["a"] * 10)
    for epoch in np.asarray(seen["a"]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(time * envs))
    assert (np.asarray(seen["a"][0]) != np.asarray(seen["a"][1])).any()
    if segments:  # whole columns: an environment's steps in their order
        np.testing.assert_array_equal(np.diff(np.asarray(seen["a"]), axis=2), envs)
