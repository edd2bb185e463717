"""One mesh over all devices: environments are split over it, everything else is on each of them.

Only environments step under `shard_map`: a host callback under plainly sharded `jit` would run on one device, with
everybody's states gathered there. What learners compute from a trajectory [T, B, ...] split along B is left to the
partitioner, so they carry no axis names: a mean over B becomes a mean over all devices, exact, and gradients are summed
where they leave the loss. Random numbers are those of one device (`jax_threefry_partitionable`), so that a run differs
from that on one device by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlx.types import PyTree

AXIS = "devices"
T = TypeVar("T")
_PER_ENV: set[type] = set()


def make_mesh(num_devices: int) -> Mesh | None:
    """A mesh over the first `num_devices` devices; None for one, where nothing is to be split."""
    return None if num_devices == 1 else Mesh(jax.devices()[:num_devices], AXIS)


def on_parts(function: Callable[..., Any], mesh: Mesh | None, num_shared: int = 0) -> Callable[..., Any]:
    """`function` of arguments with leaves [B, ...], called on every device with its own part of them.

    The last `num_shared` arguments are given whole. What it returns is [B, ...] again.
    """
    if mesh is None:
        return function

    def call(*arguments: Any) -> Any:
        specs = (P(AXIS),) * (len(arguments) - num_shared) + (P(),) * num_shared
        # Without the check that values vary over devices: scans inside environments start from constants.
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)(*arguments)

    return call


def on_all(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`function`, called on every device with the whole arguments."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def per_env(kind: type[T]) -> type[T]:
    """Decorates a class of states whose leaves are [B, ...]: `placement` splits them."""
    _PER_ENV.add(kind)
    return kind


def placement(tree: PyTree, mesh: Mesh, lead: tuple[str | None, ...] = ()) -> PyTree:
    """A sharding for every leaf: those in a `per_env` class split along B, the others whole.

    `lead` names the axes in front of B: (None,) for runs in one program.
    """
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(*lead, AXIS))

    def is_split(node: Any) -> bool:
        return type(node) in _PER_ENV

    return jax.tree.map(lambda n: jax.tree.map(lambda _: split, n) if is_split(n) else whole, tree, is_leaf=is_split)
