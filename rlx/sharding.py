"""One mesh over devices: environments are split over it, everything else is on each of them.

Only environments step under `shard_map`: a host callback under plainly sharded `jit` would run on one device, with
everybody's states gathered there. What learners compute from a trajectory [T, B, ...] split along B is left to the
partitioner, so they carry no axis names: a mean over B becomes a mean over all devices, and gradients are summed where
they leave the loss. Random numbers are those of one device (JAX's default generator promises it), so that a run differs
from that on one device by rounding, which learning amplifies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlx.errors import require
from rlx.machine import available_memory
from rlx.types import PyTree

AXIS = "devices"
Kind = TypeVar("Kind", bound=type)
_PER_ENV: set[type] = set()


def same_on_any_device() -> bool:
    """Whether random numbers do not depend on the number of devices."""
    values = jax.config.values
    return bool(values["jax_threefry_partitionable"]) and values["jax_default_prng_impl"] == "threefry2x32"


def make_mesh(num_devices: int) -> Mesh | None:
    """A mesh over the first `num_devices` devices; None for one, where nothing is to be split.

    Raises UserError where random numbers would depend on how many there are.
    """
    if num_devices == 1:
        return None
    generator = jax.config.values["jax_default_prng_impl"]
    require(same_on_any_device(), "jax_default_prng_impl", generator, "threefry2x32, with jax_threefry_partitionable")
    return Mesh(jax.devices()[:num_devices], AXIS)


def free_memory(num_devices: int) -> int | None:
    """Bytes free on each of `num_devices` devices, None if they do not say. CPU devices share the machine's.

    Other processes have other machines' memory, as far as is known here.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    free = available_memory() if device.platform == "cpu" else None
    return free // min(num_devices, jax.local_device_count()) if free else None


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
    """`function`, called on every device with the whole arguments: each does all of the work, and nothing is sent."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def per_env(kind: Kind) -> Kind:
    """Decorates a class of states whose leaves are all [B, ...]: they are split; what is in no such class is not.

    In a learner it is also its past (`without_past`): what a run that meets a NaN does not take back.
    """
    _PER_ENV.add(kind)
    return kind


def is_per_env(node: Any) -> bool:
    """Whether `node` of a tree is of such a class."""
    return type(node) in _PER_ENV


def without_past(tree: PyTree) -> PyTree:
    """`tree` with nothing in its `per_env` classes: a learner without the experience that it keeps."""
    return jax.tree.map(lambda node: () if is_per_env(node) else node, tree, is_leaf=is_per_env)


def bytes_per_env(tree: PyTree) -> int:
    """Of all leaves in `per_env` classes, on all devices together."""
    parts = [node for node in jax.tree.leaves(tree, is_leaf=is_per_env) if is_per_env(node)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts))


def place(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """Arrays that every process has whole, as `sharding` says; on the first device if it says nothing."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # device_put would send each of them around, to see that all have the same.
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__), tree)


def placement(tree: PyTree, mesh: Mesh, lead: tuple[str | None, ...] = ()) -> PyTree:
    """A sharding for every leaf: those in a `per_env` class split along B, the others whole.

    `lead` names the axes in front of B: (None,) for runs in one program.
    """
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(*lead, AXIS))

    def of_node(node: Any) -> PyTree:
        return jax.tree.map(lambda _: split, node) if is_per_env(node) else whole

    return jax.tree.map(of_node, tree, is_leaf=is_per_env)
