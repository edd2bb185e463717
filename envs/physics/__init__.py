"""One interface, three engines: `mjx` (XLA), `warp` (CUDA), `mujoco` (native C, on the CPU).

An environment's own code stays in JAX and is written once, on one unbatched instance:

    engine = physics.make("auto", mj_model)
    data = engine.forward(engine.model, engine.make_data(qpos=qpos))              # in reset
    data = engine.step(engine.model, data, ctrl, substeps)                        # in step
    data.qpos, data.sensordata, ...                                               # a `mujoco.mjx.Data` on every engine

`engine.model` is a `mujoco.mjx.Model`; domain randomisation replaces some of its arrays (`with_overrides`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlx.errors import UserError, is_whole, require, unknown

if TYPE_CHECKING:
    import jax
    import mujoco
    from mujoco import mjx

ENGINES = ("mjx", "warp", "mujoco")
# What MJX calls the implementation behind each engine's model. "cpp" holds the public fields and compiles nothing.
IMPLEMENTATIONS = {"mjx": "jax", "warp": "warp", "mujoco": "cpp"}


class Engine(Protocol):
    """Simulates one model. Pure: the whole physics state goes in and comes out in a `mujoco.mjx.Data`.

    After `step` derived fields (`xpos`, `sensordata`, ...) describe the state before the last substep, on every engine,
    as after MuJoCo's own `mj_step`; after `forward` they are current.
    """

    name: str
    model: mjx.Model  # what the environment reads of the model; arrays may be replaced, unbatched

    def make_data(self, **fields: Any) -> mjx.Data:
        """The model's default state, with state fields such as `qpos` replaced; derived fields are zero."""
        ...

    def forward(self, model: mjx.Model, data: mjx.Data) -> mjx.Data:
        """Computes derived fields of the state; time does not pass."""
        ...

    def step(self, model: mjx.Model, data: mjx.Data, ctrl: jax.Array, substeps: int) -> mjx.Data:
        """`substeps` steps of `model.opt.timestep` seconds under the controls `ctrl` [nu]."""
        ...

    def detach(self, data: mjx.Data) -> mjx.Data:
        """What of `data` the next step needs, and its public fields: every leaf has a batch axis under vmap.

        `_impl` of MJX and Warp (contacts, constraints, factors) is left out.
        """
        ...

    def attach(self, data: mjx.Data) -> mjx.Data:
        """`data` that `forward` and `step` take; what `detach` left out is at its default until then."""
        ...

    def diverged(self, data: mjx.Data) -> jax.Array:
        """() bool: whether a call since `make_data` failed. The episode must end: `data` is of no use any more."""
        ...


def resolve(physics: str) -> str:
    """The engine that `physics` means on this machine: "auto" takes the fastest for the default device.

    Raises UserError for an engine that does not exist or is not installed.
    """
    if physics not in ("auto", *ENGINES):
        raise unknown("physics", physics, ("auto", *ENGINES))
    warp = importlib.util.find_spec("warp") is not None
    if physics == "warp" and not warp:
        raise UserError("physics = 'warp' needs the package warp-lang, which is not installed: pip install warp-lang.")
    if physics != "auto":
        return physics
    import jax

    platform = jax.default_backend()
    if platform == "cpu":
        return "mujoco"
    return "warp" if warp and platform == "gpu" else "mjx"


def make(
    physics: str,
    mj_model: mujoco.MjModel,
    model: mjx.Model | None = None,
    threads: int = 0,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> Engine:
    """An engine for `mj_model`.

    `model`: the engine's own form of it, where the caller has that already. `threads`: of the native engine; 0 for all
    cores. `sizes`: Warp's (`envs.physics.mjx.MJX`). Raises UserError for an engine that cannot be had or a number of
    threads that is none, ValueError or NotImplementedError out of MJX for a model that it cannot simulate.
    """
    name = resolve(physics)
    require(is_whole(threads), "physics_threads", threads, "a whole number of at least 0; 0 for all cores")
    if name == "mujoco":
        from envs.physics.native import Native

        return Native(mj_model, model, threads)
    from envs.physics.mjx import MJX

    return MJX(name, mj_model, model, sizes)


def with_overrides(model: mjx.Model, overrides: Mapping[str, jax.Array]) -> mjx.Model:
    """`model` with arrays replaced: fields of MjModel ("body_mass"), or of its options ("opt.gravity").

    Raises UserError, with close matches, for a field that there is not, or an array of another shape.
    """
    import jax.numpy as jnp
    from mujoco import mjx

    # Not those of `model`: brax's own class has more, which nothing reads.
    names = {f.name for f in dataclasses.fields(mjx.Model)} - {"_impl", "opt", "stat"}
    names |= {f"opt.{f.name}" for f in dataclasses.fields(model.opt)} - {"opt._impl"}
    for field, value in overrides.items():
        if field not in names:
            raise unknown("model field", field, names)
        head, _, tail = field.rpartition(".")
        owner = model.opt if head else model
        old = getattr(owner, tail)
        if jnp.shape(old) != jnp.shape(value):
            raise UserError(f"model field {field} has shape {jnp.shape(old)}; the override has {jnp.shape(value)}.")
        owner = owner.replace(**{tail: jnp.asarray(value, jnp.asarray(old).dtype)})
        model = model.replace(opt=owner) if head else owner
    if "body_mass" in overrides and "body_subtreemass" not in overrides:
        # Both C and MJX read it, for centres of mass and their velocities; neither recomputes it.
        model = model.replace(body_subtreemass=subtrees(model.body_parentid) @ model.body_mass)
    if "geom_size" in overrides and model.impl.value != "cpp":  # C derives them itself
        derived = dict(zip(("geom_rbound", "geom_aabb"), bounds(model), strict=True))
        model = model.replace(**{name: value for name, value in derived.items() if name not in overrides})
    return model


def bounds(model: mjx.Model) -> tuple[jax.Array, jax.Array]:
    """`geom_rbound` and `geom_aabb` that follow from `geom_size`; those of planes, meshes and height fields stay.

    By them MJX ranks pairs, where a model caps their number, and Warp leaves pairs out.
    """
    import jax.numpy as jnp
    from mujoco import mjtGeom

    radius, box = jnp.asarray(model.geom_rbound), jnp.asarray(model.geom_aabb)
    box_shape, box = box.shape, box.reshape(-1, 6)  # Warp's has a shape of its own
    of_kind: dict[mjtGeom, Callable[[jax.Array], tuple[Any, jax.Array]]] = {  # sizes [n, 3] -> reach [n], half [n, 3]
        mjtGeom.mjGEOM_SPHERE: lambda s: (s[:, 0], s[:, [0, 0, 0]]),
        mjtGeom.mjGEOM_CAPSULE: lambda s: (s[:, 0] + s[:, 1], s[:, [0, 0, 0]].at[:, 2].add(s[:, 1])),
        mjtGeom.mjGEOM_ELLIPSOID: lambda s: (s.max(axis=1), s),
        mjtGeom.mjGEOM_CYLINDER: lambda s: (jnp.hypot(s[:, 0], s[:, 1]), s[:, [0, 0, 1]]),
        mjtGeom.mjGEOM_BOX: lambda s: (jnp.linalg.norm(s, axis=1), s),
    }
    for kind, derive in of_kind.items():
        rows = np.flatnonzero(np.asarray(model.geom_type) == kind)
        reach, half = derive(jnp.asarray(model.geom_size)[rows])
        radius, box = radius.at[rows].set(reach), box.at[rows, 3:].set(half)
    return radius, box.reshape(box_shape)


def subtrees(parents: np.ndarray) -> np.ndarray:
    """[nbody, nbody] float32: 1 where the column's body is the row's or hangs from it."""
    below = np.eye(len(parents), dtype=np.float32)
    for body in range(len(parents) - 1, 0, -1):  # children come after their parents
        below[parents[body]] += below[body]
    return below
