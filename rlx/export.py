"""Policies for others: a function in StableHLO (`jax.export`) that jax alone can call, and what its numbers mean.

    import json, jax, numpy as np
    act = jax.export.deserialize(bytearray(open("policy/policy.stablehlo", "rb").read())).call
    about = json.load(open("policy/policy.json"))
    inputs = {entry["name"]: np.zeros((8, *entry["shape"]), entry["dtype"]) for entry in about["inputs"]}
    act(inputs)["action"]  # of 8 observations

Weights and statistics of observations are inside: observations go in as the environment gives them, actions come out in
its own units. What a policy remembers inside an episode goes in as it came out, and begins as `initial` says. In mode
"sample" there is an input `key`, two uint32 without a batch: other bits for every call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx.algorithm import Algorithm, Mode, Policy
from rlx.errors import UserError, require
from rlx.machine import versions
from rlx.run_directory import write_atomically
from rlx.types import Box, PyTree, Spec

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FILES = ("policy.stablehlo", "policy.json")


def export_policy(
    folder: str | Path,
    spec: Spec,
    algorithm: Algorithm,
    policy: Policy,
    mode: Mode = "greedy",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes `policy.stablehlo` and `policy.json` into `folder`, which it makes. Returns what the second one says.

    Args:
        spec: of the environment that the policy acts in.
        algorithm: what acts, such as `rlx.ppo.make(config, spec, rlx.Plan(1, 1, 1))`.
        policy: its policy, such as that of a Run.
        mode: "greedy" or "sample".
        platforms: for which it is lowered: cpu, cuda, rocm, tpu.
        record: more entries for policy.json.
        overwrite: replaces a policy that `folder` already holds.

    Raises UserError for platforms that jax does not know, and a folder that holds a policy.
    """
    target = Path(folder)
    check_target(target, platforms, overwrite)
    memory = algorithm.memory(jax.random.key(0))
    inputs = named("obs", spec.obs) | named("memory", memory)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {name: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for name, x in inputs.items()}
    shapes |= {"key": jax.ShapeDtypeStruct((2,), jnp.uint32)} if mode == "sample" else {}

    def call(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        obs, before = (like(tree, name, inputs) for name, tree in (("obs", spec.obs), ("memory", memory)))
        key = jax.random.wrap_key_data(inputs["key"]) if mode == "sample" else jax.random.key(0)
        after, action, _ = algorithm.act(policy, before, obs, key, mode)
        return {"action": jax.vmap(partial(native, spec))(action)} | named("memory", after)

    exported = jax.export.export(jax.jit(call), platforms=tuple(platforms))(shapes)
    data = bytes(exported.serialize())
    initial = {name: np.asarray(x).tolist() for name, x in named("memory", memory).items()}
    entries = [
        {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}
        | ({"initial": initial[name]} if name in initial else {})
        for name, x in inputs.items()
    ]
    about: dict[str, Any] = {"format": FORMAT, "mode": mode, "platforms": list(platforms), "inputs": entries}
    about |= {"action": about_action(spec), "sha256": hashlib.sha256(data).hexdigest(), "versions": versions()}
    about |= record or {}
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / FILES[0], data)
    write_atomically(target / FILES[1], json.dumps(about, indent=1) + "\n")
    return about


def check_target(folder: Path, platforms: Sequence[str], overwrite: bool) -> None:
    """Raises UserError for platforms that jax does not know, and a folder that holds a policy or is none."""
    for platform in platforms or ("",):
        require(platform in PLATFORMS, "--platforms", platform, f"some of {', '.join(PLATFORMS)}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder.")
    if any((folder / name).exists() for name in FILES) and not overwrite:
        raise UserError(f"{str(folder)!r} already holds a policy: name another folder, or --overwrite.")


def named(name: str, tree: PyTree) -> dict[str, Any]:
    """Path -> leaf: `obs` where there is one alone, `obs/state` and the like of more."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join([name, *(jax.tree_util.keystr((part,), simple=True) for part in path)]): x for path, x in leaves}


def like(tree: PyTree, name: str, inputs: Mapping[str, Any]) -> PyTree:
    """Undoes `named`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [inputs[path] for path in named(name, tree)])


def bounds(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """The native bounds of actions, in their shape, float32."""
    low, high = (np.asarray(x, np.float32) for x in (box.low, box.high))
    return tuple(np.broadcast_to(x.reshape(box.shape) if x.size > 1 else x, box.shape) for x in (low, high))  # type: ignore[return-value]


def native(spec: Spec, action: jax.Array) -> jax.Array:
    """One action as the environment's own documentation has it; discrete ones are."""
    if not isinstance(spec.action, Box):
        return action
    low, high = bounds(spec.action)
    return (low + high) / 2 + (high - low) / 2 * action


def about_action(spec: Spec) -> dict[str, Any]:
    """What the output `action` is."""
    if not isinstance(spec.action, Box):
        return {"shape": list(spec.action.shape), "dtype": "int32", "num_values": spec.action.num_values}
    low, high = (x.tolist() for x in bounds(spec.action))
    about = {"shape": list(spec.action.shape), "dtype": "float32", "low": low, "high": high}
    return about | {"repeat": spec.action_repeat // spec.action_chunk, "chunk": spec.action_chunk}
