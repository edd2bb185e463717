"""Policies for others: in StableHLO, a function that takes jax and flatbuffers alone, and in ONNX.

    import json, jax, numpy as np
    act = jax.export.deserialize(bytearray(open("policy/policy.stablehlo", "rb").read())).call
    about = json.load(open("policy/policy.json"))
    inputs = {entry["name"]: np.zeros((8, *entry["shape"]), entry["dtype"]) for entry in about["inputs"]}
    act(inputs)["action"]  # of 8 observations

Weights and statistics of observations are inside: observations go in as the environment gives them, actions come out in
its own units. What a policy remembers inside an episode goes in as it came out, and begins as `initial` says. In mode
"sample" there is an input `key`, two uint32 without a batch: other bits for every call. ONNX has no such draws; its
inputs are those of policy.json too, its outputs `action` and, where a policy remembers, `next/memory`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from rlx.algorithm import Algorithm, Mode, Policy
from rlx.errors import UserError, require
from rlx.files import write_atomically
from rlx.machine import versions
from rlx.types import Box, PyTree, Spec

FORMAT = 1
ACTING = ("greedy", "sample")  # modes in which nothing is explored
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
STABLEHLO, ABOUT, ONNX = FILES = ("policy.stablehlo", "policy.json", "policy.onnx")
# jax2onnx asks for an orbax-checkpoint below that of rlx, of which it makes no use here.
INSTALL = "pip install 'rlx[onnx]' && pip install --no-deps jax2onnx==0.17.1"


def export_policy(
    folder: str | Path,
    spec: Spec,
    algorithm: Algorithm,
    policy: Policy,
    mode: Mode = "greedy",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    onnx: bool = False,
) -> dict[str, Any]:
    """Writes `policy.stablehlo`, `policy.json` and, if asked to, `policy.onnx` into `folder`, which it makes.

    Returns what policy.json says.

    Args:
        spec: of the environment that the policy acts in.
        algorithm: what acts, such as `rlx.ppo.make(config, spec, rlx.Plan(1, 1, 1))`.
        policy: its policy, such as that of a Run.
        mode: "greedy" or "sample".
        platforms: for which it is lowered: cpu, cuda, rocm, tpu.
        record: more entries for policy.json.
        overwrite: replaces a policy that `folder` already holds.
        onnx: writes `policy.onnx` too, by jax2onnx; of mode "greedy".

    Raises UserError for another mode, platforms that jax does not know, a folder that holds a policy, and for `onnx`
    where its converter is missing or cannot convert the policy.
    """
    target = Path(folder)
    check_target(target, platforms, overwrite)
    require(mode in ACTING, "mode", mode, " or ".join(ACTING))
    if onnx:
        check_onnx(mode)
    memory = algorithm.memory(jax.random.key(0))
    inputs = named("obs", spec.obs) | named("memory", memory)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {name: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for name, x in inputs.items()}
    shapes |= {"key": jax.ShapeDtypeStruct((2,), jnp.uint32)} if mode == "sample" else {}

    def call(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        obs, before = (like(tree, name, inputs) for name, tree in (("obs", spec.obs), ("memory", memory)))
        key = jax.random.wrap_key_data(inputs["key"], impl="threefry2x32") if mode == "sample" else jax.random.key(0)
        after, action, _ = algorithm.act(policy, before, obs, key, mode)
        return {"action": jax.vmap(partial(native, spec))(action)} | named("memory", after)

    exported = jax.export.export(jax.jit(call), platforms=tuple(platforms))(shapes)
    data = bytes(exported.serialize())
    model = to_onnx(call, shapes) if onnx else b""
    initial = {name: np.asarray(x).tolist() for name, x in named("memory", memory).items()}
    entries = [
        {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}
        | ({"initial": initial[name]} if name in initial else {})
        for name, x in inputs.items()
    ]
    about: dict[str, Any] = {**(record or {}), "format": FORMAT, "needs": ["jax", "flatbuffers"], "mode": mode}
    about |= {"platforms": list(platforms), "inputs": entries}
    about |= {"action": about_action(spec), "sha256": hashlib.sha256(data).hexdigest(), "versions": versions()}
    about |= {"onnx": {"sha256": hashlib.sha256(model).hexdigest()}} if onnx else {}
    target.mkdir(parents=True, exist_ok=True)
    (target / ONNX).unlink(missing_ok=True)
    write_atomically(target / STABLEHLO, data)
    if onnx:
        write_atomically(target / ONNX, model)
    write_atomically(target / ABOUT, json.dumps(about, indent=1) + "\n")
    return about


def check_target(folder: Path, platforms: Sequence[str], overwrite: bool) -> None:
    """Raises UserError for platforms that jax does not know, and a folder that holds a policy or is none."""
    known = not isinstance(platforms, str) and platforms and set(platforms) <= set(PLATFORMS)
    require(bool(known), "platforms", platforms, f"some of {', '.join(PLATFORMS)}")
    is_folder = folder.is_dir() or not folder.exists()
    require(is_folder, "folder", str(folder), "a folder, or a name that nothing has yet")
    if any((folder / name).exists() for name in FILES) and not overwrite:
        raise UserError(f"{str(folder)!r} already holds a policy: name another folder, or use --overwrite.")


def check_onnx(mode: Mode) -> None:
    """Raises UserError where no ONNX can be written."""
    require(mode == "greedy", "mode", mode, "greedy in ONNX, which has no draws of JAX's")
    try:
        with alone():
            importlib.import_module("jax2onnx")
    except ImportError as error:
        raise UserError(f"ONNX needs jax2onnx ({error}): {INSTALL}.") from error


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Around jax2onnx, which logs a traceback for every package that it could convert and does not find, and leaves a
    `jnp.cumsum` of its own behind."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels, cumsum = [logger.level for logger in loggers], jnp.cumsum
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        jnp.cumsum = cumsum
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def to_onnx(call: Callable[..., Mapping[str, jax.Array]], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> bytes:
    """A model of `call`, whose inputs are called as `shapes`, of any batch. Raises UserError where there is none."""
    outputs = jax.eval_shape(call, dict(shapes))
    names = ["action", *(name for name in outputs if name != "action")]

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        found = call(dict(zip(shapes, arrays, strict=True)))
        return [found[name] for name in names]

    # Traced here: jax2onnx would put operations of its own in the place of flax's layers, which vmap does not take.
    traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(flat)(*shapes.values()))
    try:
        with alone():
            from jax2onnx import to_onnx as convert

            naming = {"input_names": list(shapes), "output_names": ["action", *(f"next/{name}" for name in names[1:])]}
            return bytes(convert(traced, list(shapes.values()), model_name="policy", **naming).SerializeToString())
    except Exception as error:  # of any kind: each operation's converter has its own
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"jax2onnx cannot convert this policy: {why}") from error


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
    return jnp.clip((low + high) / 2 + (high - low) / 2 * action, low, high)  # roundings may pass a bound


def about_action(spec: Spec) -> dict[str, Any]:
    """What the output `action` is."""
    about: dict[str, Any] = {"shape": list(spec.action.shape)}
    about |= {"repeat": spec.action_repeat // spec.action_chunk, "chunk": spec.action_chunk}
    if spec.action_mask is not None:
        about["mask"] = np.asarray(spec.action_mask).tolist()  # of entries, or of values, that an agent has
    if not isinstance(spec.action, Box):
        return about | {"dtype": "int32", "num_values": spec.action.num_values}
    low, high = (x.tolist() for x in bounds(spec.action))
    return about | {"dtype": "float32", "low": low, "high": high}
