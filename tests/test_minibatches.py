"""Minibatches: random orders, and that every transition is used once an epoch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx.algorithm import Plan
from rlx.errors import UserError
from rlx.minibatches import check_minibatches, permutation, scan_minibatches, shuffle_groups


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


@pytest.mark.parametrize("segments", [False, True])
def test_every_minibatch_has_an_equal_part_of_each_group_in_the_groups_order(segments):
    time, envs, groups = 4, 12, 2
    columns = jnp.broadcast_to(jnp.arange(envs), (time, envs))

    def step(carry, minibatch, key):
        return carry, minibatch

    _, seen = scan_minibatches(step, (), columns, jax.random.key(3), 2, 3, segments, groups)
    members = np.asarray(seen) // (envs // groups)
    half = members.shape[-1] // groups
    np.testing.assert_array_equal(members[..., :half], 0)
    np.testing.assert_array_equal(members[..., half:], 1)
    for epoch in np.asarray(seen):
        np.testing.assert_array_equal(np.bincount(epoch.ravel()), np.full(envs, time))


@pytest.mark.parametrize(
    ("wanted", "num_envs", "num_minibatches", "segments", "expected"),
    [(32, 256, 8, False, 32), (32, 64, 8, True, 8), (32, 6, 3, False, 2), (32, 5, 1, False, 1), (3, 12, 4, True, 3)],
)
def test_groups_are_as_many_as_sizes_allow(wanted, num_envs, num_minibatches, segments, expected):
    assert shuffle_groups(wanted, num_envs, 32, num_minibatches, segments) == expected


def test_devices_that_would_share_a_group_are_refused():
    plan = Plan(num_envs=64, unroll_length=4, num_iterations=1, num_groups=32, num_devices=16)
    check_minibatches(plan, 8)
    with pytest.raises(UserError, match="16 devices need whole groups, .* it leaves 8; .* num_devices = 8 would do"):
        check_minibatches(plan, 8, segments=True)
