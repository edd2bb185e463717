"""Running statistics of observations, and normalisation by them.

Statistics are leafwise over any pytree of observations. Batches merge by the parallel form of Welford's algorithm
(Chan, Golub and LeVeque 1983): a running *sum* of squared deviations, to which each batch adds its own and the part
between the two means.

Two things keep float32 honest:
- Everything is accumulated about `origin`, the mean of the first batch. For observations offset by 1e4 a float32 mean
  resolves 1e-3, and after a few hundred updates no longer moves; the difference to the origin is of the size of
  the deviations and keeps their resolution.
- `count` is an exact 64-bit integer in two uint32. A float32 count stops growing once it exceeds 2^24 batches' worth of
  observations (2^24 observations where they come one by one). The float32 sum of squares stops growing after as many
  *updates*, which no run makes.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rlx.types import PyTree

MIN_STD = 1e-6  # constant entries normalise to about zero instead of dividing by it


@struct.dataclass
class RunningStatistics:
    """Statistics of all observations seen. Leaves of `origin`, `shift`, `m2`: float32 in the observation's shape."""

    count: jax.Array  # [2] uint32: observations seen, low and high word
    origin: PyTree  # mean of the first batch; what the other two are measured from
    shift: PyTree  # mean minus origin
    m2: PyTree  # sum of squared deviations from the mean

    @property
    def mean(self) -> PyTree:
        return jax.tree.map(jnp.add, self.origin, self.shift)

    @property
    def std(self) -> PyTree:
        """Population standard deviation, at least `MIN_STD`; 1 before any observation."""
        count = _as_float(self.count)
        variance = jax.tree.map(lambda m2: jnp.where(count > 0, m2 / jnp.maximum(count, 1.0), 1.0), self.m2)
        return jax.tree.map(lambda v: jnp.sqrt(jnp.maximum(v, MIN_STD**2)), variance)


def _as_float(count: jax.Array) -> jax.Array:
    low, high = count.astype(jnp.float32)
    return high * jnp.float32(2**32) + low


def _add(count: jax.Array, n: int) -> jax.Array:
    low = count[0] + jnp.uint32(n)
    carry = (low < count[0]).astype(jnp.uint32)
    return jnp.stack([low, count[1] + carry])


def init(obs_spec: PyTree) -> RunningStatistics:
    """Statistics of nothing, by which `normalize` is the identity.

    Args:
      obs_spec: a pytree of jax.ShapeDtypeStruct (or arrays): one unbatched observation.
    """

    def zeros() -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), obs_spec)

    # Three separate copies: leaves that share a buffer cannot be donated.
    return RunningStatistics(jnp.zeros(2, jnp.uint32), zeros(), zeros(), zeros())


def _leading(stats: RunningStatistics, batch: PyTree) -> tuple[int, ...]:
    """The axes in front of one observation, the same for all leaves of `batch`."""
    chex.assert_trees_all_equal_structs(batch, stats.origin)
    leading = set()
    for x, like in zip(jax.tree.leaves(batch), jax.tree.leaves(stats.origin), strict=True):
        split = x.ndim - like.ndim
        chex.assert_shape(x, (*x.shape[:split], *like.shape))
        leading.add(x.shape[:split])
    if len(leading) != 1:
        raise AssertionError(f"Observation leaves must agree in their leading axes, got {sorted(leading)}.")
    return leading.pop()


def update(stats: RunningStatistics, batch: PyTree) -> RunningStatistics:
    """Statistics after `batch` too. Equal, to float32, to those of all observations in one batch.

    Args:
      batch: observations, leaves [..., *shape] with the same leading axes, one or more observations in all (an
        AssertionError otherwise). Integer and bool leaves count as float32.
    """
    leading = _leading(stats, batch)
    n = math.prod(leading)
    chex.assert_scalar_positive(n)
    axes = tuple(range(len(leading)))  # reduced as they are: merged into one, an axis split over devices would be moved
    old = _as_float(stats.count)
    weight = n / (old + n)  # of the batch among all

    def merge(x: jax.Array, origin: jax.Array, shift: jax.Array, m2: jax.Array):
        x = x.astype(jnp.float32)
        origin = jnp.where(old > 0, origin, x.mean(axes))
        x = x - jnp.broadcast_to(origin, x.shape)
        mean = x.mean(axes)
        batch_m2 = n * jnp.square(x - jnp.broadcast_to(mean, x.shape)).mean(axes)
        delta = mean - shift
        return origin, shift + weight * delta, m2 + batch_m2 + old * weight * jnp.square(delta)

    merged = jax.tree.map(merge, batch, stats.origin, stats.shift, stats.m2)
    outer = jax.tree.structure(batch)
    origin, shift, m2 = jax.tree.transpose(outer, jax.tree.structure((0, 0, 0)), merged)
    return RunningStatistics(_add(stats.count, n), origin, shift, m2)


def update_range(stats: RunningStatistics, batch: PyTree) -> RunningStatistics:
    """Statistics by which `normalize` maps the range of all observations seen to [-1, 1]: "mean" is its middle and
    "std" half its width. They do not merge with those of `update`. Args as there."""
    leading = _leading(stats, batch)
    axes = tuple(range(len(leading)))
    old = _as_float(stats.count)
    count = _add(stats.count, math.prod(leading))

    def merge(x: jax.Array, middle: jax.Array, half: jax.Array):
        x = x.astype(jnp.float32)
        low, high = x.min(axes), x.max(axes)
        wider = (old == 0) | (low < middle - half) | (high > middle + half)  # or rounding would widen it every time
        low = jnp.where(old > 0, jnp.minimum(middle - half, low), low)
        high = jnp.where(old > 0, jnp.maximum(middle + half, high), high)
        half = jnp.where(wider, (high - low) / 2, half)
        return jnp.where(wider, (low + high) / 2, middle), jnp.zeros_like(middle), jnp.square(half) * _as_float(count)

    merged = jax.tree.map(merge, batch, stats.mean, stats.std)
    middle, shift, m2 = jax.tree.transpose(jax.tree.structure(batch), jax.tree.structure((0, 0, 0)), merged)
    return RunningStatistics(count, middle, shift, m2)


def normalize(stats: RunningStatistics, obs: PyTree, clip: float | jax.Array = math.inf) -> PyTree:
    """(obs - mean) / std, float32, clipped to [-clip, clip]. `obs` leaves are [..., *shape]."""
    chex.assert_trees_all_equal_structs(obs, stats.origin)

    def leaf(x: jax.Array, origin: jax.Array, shift: jax.Array, std: jax.Array) -> jax.Array:
        origin, shift, std = (jnp.broadcast_to(y, x.shape) for y in (origin, shift, std))
        return jnp.clip((x.astype(jnp.float32) - origin - shift) / std, -clip, clip)

    return jax.tree.map(leaf, obs, stats.origin, stats.shift, stats.std)


def observe(config: Any, stats: RunningStatistics, obs: PyTree) -> PyTree:
    """Observations as the networks of a learner read them, whose Config has `normalize_obs`."""
    return normalize(stats, obs, clip=10.0) if config.normalize_obs else obs
