"""The running normaliser: streaming equals batch, also where float32 makes that hard."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import normalize

SPEC = jax.ShapeDtypeStruct((3,), jnp.float32)
update = jax.jit(normalize.update)


def stream(batches, offset=0.0, drift=0.0, seed=0):
    """[batches, 16, 3] float32 with standard deviations .1, 1 and 10; the mean moves by `drift` over the stream."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batches, 16, 3)) * [0.1, 1.0, 10.0] + offset
    return (x + np.linspace(0, drift, batches)[:, None, None]).astype(np.float32)


def fold(data, spec=SPEC):
    stats = normalize.init(spec)
    for batch in data:
        stats = update(stats, batch)
    return stats


def moments(data):
    """Mean and population standard deviation in float64 over all but the last axis."""
    flat = np.asarray(data, np.float64).reshape(-1, data.shape[-1])
    return flat.mean(axis=0), flat.std(axis=0)


def test_one_batch_by_hand():
    stats = normalize.update(normalize.init(SPEC), jnp.array([[0, 0, 1], [2, 4, 1], [4, 8, 1]], jnp.float32))
    np.testing.assert_array_equal(stats.count, [3, 0])
    np.testing.assert_allclose(stats.mean, [2, 4, 1], rtol=1e-6)
    np.testing.assert_allclose(stats.m2, [8, 32, 0], rtol=1e-6)
    np.testing.assert_allclose(stats.std[:2], np.sqrt([8 / 3, 32 / 3]), rtol=1e-6)


def test_two_batches_by_hand():
    # {0, 2} and {4, 10}: mean 4, squared deviations 16 + 4 + 0 + 36
    stats = normalize.init(jax.ShapeDtypeStruct((), jnp.float32))
    stats = normalize.update(stats, jnp.array([0, 2], jnp.float32))
    stats = normalize.update(stats, jnp.array([4, 10], jnp.float32))
    assert float(stats.mean) == 4.0
    assert float(stats.m2) == 56.0
    assert float(normalize.normalize(stats, jnp.float32(4 + np.sqrt(14)))) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("drift", [0.0, 5.0])
def test_streaming_equals_batch_over_hundreds_of_updates(offset, drift):
    data = stream(400, offset, drift)
    mean, std = moments(data)
    stats = fold(data)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-7, atol=1e-4)
    np.testing.assert_allclose(stats.std, std, rtol=2e-5)
    # What the learner sees: as exact as the float32 observations themselves.
    expected = (data[-1].astype(np.float64) - mean) / std
    np.testing.assert_allclose(normalize.normalize(stats, data[-1]), expected, rtol=1e-4, atol=1e-3)
    whole = normalize.update(normalize.init(SPEC), data)
    np.testing.assert_allclose(stats.std, whole.std, rtol=2e-5)


def test_the_deviation_does_not_decay_with_the_number_of_updates():
    """A normaliser that drops its accumulator gives sigma / sqrt(updates)."""
    data = np.broadcast_to(stream(1), (300, 16, 3))
    np.testing.assert_allclose(fold(data).std, fold(data[:1]).std, rtol=1e-4)
    np.testing.assert_allclose(fold(data).m2, 300 * fold(data[:1]).m2, rtol=1e-4)


def test_the_mean_keeps_moving_late_in_a_stream_offset_by_1e4():
    """Here an increment of the mean is below the resolution of float32 at 1e4."""
    data = np.full((3000, 1, 3), 1e4, np.float32)
    data[1000:] += 1.0
    stats = fold(data)
    np.testing.assert_allclose(np.asarray(stats.shift), 2 / 3, rtol=1e-4)
    np.testing.assert_allclose(stats.std, np.sqrt(2 / 9), rtol=1e-4)


def test_a_constant_entry_normalises_to_zero_whatever_its_size():
    data = np.full((50, 16, 3), [0.0, 0.1, 12345.678], np.float32)
    np.testing.assert_allclose(normalize.normalize(fold(data), data), 0.0, atol=1e-2)


def test_order_and_split_of_the_stream_do_not_matter():
    data = stream(20, offset=100.0)
    forward, backward = fold(data), fold(data[::-1])
    uneven = fold([data[:1], data[1:13], data[13:]])
    for other in (backward, uneven):
        np.testing.assert_array_equal(forward.count, other.count)
        np.testing.assert_allclose(forward.mean, other.mean, rtol=1e-6)
        np.testing.assert_allclose(forward.std, other.std, rtol=1e-5)


def test_a_fresh_normaliser_is_the_identity():
    obs = jnp.array([-3.0, 0.0, 1e4], jnp.float32)
    np.testing.assert_array_equal(normalize.normalize(normalize.init(SPEC), obs), obs)


def test_any_number_of_leading_axes_counts_as_one_batch():
    data = jnp.asarray(stream(4))
    expected = normalize.update(normalize.init(SPEC), data.reshape(64, 3))
    for shape in [(4, 16, 3), (2, 2, 16, 3)]:
        stats = normalize.update(normalize.init(SPEC), data.reshape(shape))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), stats, expected)
    single = normalize.update(normalize.init(SPEC), data[0, 0])
    np.testing.assert_array_equal(single.count, [1, 0])
    np.testing.assert_array_equal(single.mean, data[0, 0])


def test_dict_observations_are_treated_leafwise_and_integers_and_bools_as_floats():
    spec = {
        "state": jax.ShapeDtypeStruct((2,), jnp.float32),
        "pixels": jax.ShapeDtypeStruct((2, 2), jnp.uint8),
        "touch": jax.ShapeDtypeStruct((), jnp.bool_),
    }
    obs = {
        "state": jnp.array([[1, 5], [3, 5]], jnp.float32),
        "pixels": jnp.array([[[0, 10], [20, 255]], [[0, 30], [20, 255]]], jnp.uint8),
        "touch": jnp.array([True, False]),
    }
    stats = update(normalize.init(spec), obs)
    np.testing.assert_array_equal(stats.mean["pixels"], [[0, 20], [20, 255]])
    np.testing.assert_array_equal(stats.mean["touch"], 0.5)
    normalized = normalize.normalize(stats, obs)
    np.testing.assert_allclose(normalized["state"], [[-1, 0], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(normalized["pixels"][:, 0, 1], [-1, 1], atol=1e-6)
    np.testing.assert_allclose(normalized["touch"], [1, -1], atol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(normalized)} == {jnp.dtype("float32")}


def test_clip_bounds_the_result_and_there_is_none_by_default():
    stats = fold(stream(10))
    far = jnp.full(3, 1e3, jnp.float32)
    assert (normalize.normalize(stats, far) > 50).all()
    np.testing.assert_array_equal(normalize.normalize(stats, far, clip=5.0), 5.0)
    np.testing.assert_array_equal(jax.jit(normalize.normalize)(stats, -far, 5.0), -5.0)


@pytest.mark.parametrize("seen", [2**24, 2**32 - 10, 5 * 2**32])
def test_the_count_stays_exact_past_what_float32_and_32_bits_hold(seen):
    stats = fold(stream(10)).replace(count=jnp.array([seen % 2**32, seen // 2**32], jnp.uint32))
    for _ in range(3):
        stats = update(stats, jnp.zeros((7, 3), jnp.float32))
    low, high = (int(x) for x in stats.count)
    assert low + high * 2**32 == seen + 21


def test_one_by_one_a_late_observation_still_has_its_weight():
    """A float32 count would stay at 2^24 for ever; what it divides by would be too small by a fifth in the end."""
    seen = 2**24
    stats = normalize.init(jax.ShapeDtypeStruct((), jnp.float32))
    stats = stats.replace(count=jnp.array([seen, 0], jnp.uint32), m2=jnp.float32(seen))
    after = update(stats, jnp.ones((seen // 4,), jnp.float32))
    assert float(after.mean) == pytest.approx(0.2, rel=1e-5)
    step = jax.jit(lambda s: jax.lax.fori_loop(0, 1000, lambda _, s: normalize.update(s, jnp.float32(0.0)), s))
    np.testing.assert_array_equal(step(stats).count, [seen + 1000, 0])


def test_the_state_is_a_fixed_point_in_shape_dtype_and_weak_type():
    stats = normalize.init({"a": SPEC, "b": jax.ShapeDtypeStruct((), jnp.int32)})
    batch = {"a": jnp.ones((5, 3)), "b": jnp.arange(5)}
    after = jax.eval_shape(normalize.update, stats, batch)
    kinds = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)] for s in (stats, after)]
    assert kinds[0] == kinds[1]


def test_the_state_can_be_donated():
    donated = jax.jit(normalize.update, donate_argnums=0)
    stats = donated(normalize.init(SPEC), jnp.ones((4, 3)))
    np.testing.assert_array_equal(donated(stats, jnp.ones((4, 3))).count, [8, 0])


def test_statistics_of_several_seeds_are_kept_apart_by_vmap():
    data = jnp.asarray(stream(2))
    both = jax.vmap(lambda x: normalize.update(normalize.init(SPEC), x))(data)
    for i in range(2):
        np.testing.assert_allclose(jax.vmap(lambda s: s.std)(both)[i], fold(data[i : i + 1]).std, rtol=1e-6)


def test_wrong_shapes_and_structures_are_refused():
    stats = normalize.init({"a": SPEC, "b": SPEC})
    ones = jnp.ones((4, 3))
    for batch in [ones, {"a": ones}, {"a": ones, "b": jnp.ones((4, 2))}, {"a": ones, "b": jnp.ones((5, 3))}]:
        with pytest.raises(AssertionError):
            normalize.update(stats, batch)
    with pytest.raises(AssertionError):
        normalize.update(stats, {"a": ones[:0], "b": ones[:0]})
    with pytest.raises(AssertionError):
        normalize.normalize(stats, ones)


def test_a_range_is_mapped_to_the_box_and_grows():
    stats = normalize.init(SPEC)
    first = jnp.asarray([[0.0, -1.0, 5.0], [2.0, -3.0, 5.0]])
    stats = jax.jit(normalize.update_range)(stats, first)
    np.testing.assert_allclose(normalize.normalize(stats, first), [[-1, 1, 0], [1, -1, 0]], atol=1e-5)
    stats = normalize.update_range(stats, jnp.asarray([[6.0, -2.0, 5.0]]))
    np.testing.assert_allclose(stats.mean, [3.0, -2.0, 5.0], rtol=1e-6)
    np.testing.assert_allclose(stats.std[:2], [3.0, 1.0], rtol=1e-6)
    assert int(stats.count[0]) == 3


def test_a_range_is_that_of_all_batches():
    data = stream(50, offset=3.0, drift=0.5)
    stats = normalize.init(SPEC)
    for batch in data:
        stats = jax.jit(normalize.update_range)(stats, batch)
    flat = data.reshape(-1, 3)
    np.testing.assert_allclose(stats.mean - stats.std, flat.min(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.mean + stats.std, flat.max(axis=0), rtol=1e-4, atol=1e-4)
