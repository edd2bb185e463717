"""MuJoCo's own C code on a thread pool of the CPU, as a pure function inside a JAX program.

A callback hands the batch of physics states to `mujoco.batch.Batch`: MuJoCo's integration state (time, positions,
velocities, activations, warm start, controls, applied forces, equality switches, mocap bodies, user data) as one
float32 row an environment. Rows come back with those derived fields that the environment reads. Nothing is kept between
calls but scratch memory, so `jit`, `scan`, `vmap`, donation and bit-exact resume hold, at any number of threads; the
result is that of a loop over `mj_step` whose state is rounded to float32 after each control step.

A simulation that MuJoCo gives up (an error, or positions, velocities, accelerations or controls that are not finite or
huge), or whose overrides of the model it does not take, keeps the state it came with and is marked (`diverged`); the
others go on.

On a CPU `buffer_callback` reads and writes XLA's own memory; `pure_callback`, which serves learners on an accelerator,
goes through `jax.device_put`, which on a CPU costs copies and can deadlock (jax issues 24255 and 25861).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from mujoco import mjx
from mujoco.batch import DATA_FIELDS, MODEL_FIELDS

from envs.physics import IMPLEMENTATIONS, with_overrides
from envs.physics.batches import Batches, refusal
from rlx.errors import UserError
from rlx.machine import usable_cores

# The parts of MuJoCo's integration state, in its order.
STATE = (
    *("time", "qpos", "qvel", "act", "history", "qacc_warmstart", "ctrl", "qfrc_applied", "xfrc_applied"),
    *("eq_active", "mocap_pos", "mocap_quat", "userdata", "plugin_state"),
)
MATRICES = ("xmat", "ximat", "geom_xmat", "site_xmat", "cam_xmat")  # [n, 9] in C, [n, 3, 3] in MJX

NEVER_COMPUTED = ("qfrc_inverse",)  # by a step: a batch's scratch memory would show through


class UnboundField(UserError):
    """A derived field was read that the engine was not told to compute. `field` names it."""

    def __init__(self, field: str):
        super().__init__(
            f"data.{field} is not computed on physics = 'mujoco': call bind({field!r}) of the engine first."
        )
        self.field = field


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Unbound:
    """Stands for a derived field that is not computed: a pytree without leaves whose every use raises UnboundField."""

    field: str

    def tree_flatten(self):
        return (), self.field

    @classmethod
    def tree_unflatten(cls, field: str, children: Sequence[Any]) -> Unbound:
        return cls(field)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__jax_array__":
            raise AttributeError(name)
        raise UnboundField(self.field)


def _use(self: Unbound, *arguments: Any) -> Any:
    raise UnboundField(self.field)


_ARITHMETIC = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
_OTHERS = (
    "lt le eq ne gt ge neg pos abs invert round bool int float complex index len iter contains getitem array".split()
)
for _operator in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), *_OTHERS):
    setattr(Unbound, f"__{_operator}__", _use)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NativeData:
    """What `mjx.Data` has no field for."""

    diverged: jax.Array  # () bool: a call since `make_data` failed, and gave back the state it came with


class Piece(NamedTuple):
    """A field's place in a row."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]  # as in mjx.Data
    dtype: Any


def layout(fields: Sequence[str], like: mujoco.MjData, start: int = 0) -> list[Piece]:
    """Where each field lies in a row that begins at `start`."""
    pieces = []
    for name in fields:
        value = np.asarray(getattr(like, name))
        shape = (-1, 3, 3) if name in MATRICES else value.shape
        shape = value.reshape(shape).shape
        dtype = jnp.bool_ if name == "eq_active" else jnp.float32
        pieces.append(Piece(name, start, start := start + value.size, shape, dtype))
    return pieces


class Native:
    """See `envs.physics.Engine`. Not differentiable.

    `threads`: 0 for all usable cores, shared out over the devices of the program that calls. Raises UserError for a
    model whose state is not all in the integration state, or that needs memory of its own for each simulation (sleep,
    say).
    """

    name = "mujoco"

    def __init__(self, mj_model: mujoco.MjModel, model: mjx.Model | None = None, threads: int = 0):
        self.mj_model = mj_model
        self.model = mjx.put_model(mj_model, impl=IMPLEMENTATIONS[self.name]) if model is None else model
        self.fields: tuple[str, ...] = ()  # derived fields that every call computes
        self._like = mujoco.MjData(mj_model)
        self._state = layout(STATE, self._like)
        width = mujoco.mj_stateSize(mj_model, mujoco.mjtState.mjSTATE_INTEGRATION)
        if self._state[-1].stop != width:
            raise UserError("the native engine cannot carry this model's state: it has parts that mjx.Data has not.")
        public = {f.name for f in dataclasses.fields(mjx.Data)}
        self._derivable = sorted(DATA_FIELDS & public - {*STATE, *NEVER_COMPUTED})
        self.threads = threads
        self._batches = Batches(mj_model)

    def bind(self, *fields: str) -> None:
        """Computes these derived fields too from now on. Raises UserError for one that MuJoCo does not have."""
        for field in fields:
            if field not in self._derivable:
                raise UserError(
                    f"data.{field} is not a derived field of MuJoCo's; there are {', '.join(self._derivable)}."
                )
        self.fields = tuple(sorted({*self.fields, *fields}))

    def check_overrides(self, overrides: Mapping[str, jax.Array]) -> None:
        """Raises UserError if there are `overrides`, [n, ...] each, that MuJoCo takes in none of n simulations."""
        arrays = jax.vmap(lambda values: replaced(self.model, with_overrides(self.model, values)))(overrides)
        reason = refusal(self.mj_model, {name: np.asarray(value) for name, value in arrays.items()})
        if reason:
            raise UserError(f"physics = 'mujoco' can never override {reason}. physics = 'mjx' has no such limit.")

    def make_data(self, **fields: Any) -> mjx.Data:
        state = {p.name: jnp.asarray(getattr(self._like, p.name), p.dtype).reshape(p.shape) for p in self._state}
        derived = layout(self.fields, self._like)
        values: dict[str, Any] = {f.name: Unbound(f.name) for f in dataclasses.fields(mjx.Data)}
        values |= state | {p.name: jnp.zeros(p.shape, p.dtype) for p in derived}
        values["_impl"] = NativeData(jnp.zeros((), bool))
        return mjx.Data(**values).replace(**fields)

    def forward(self, model: mjx.Model, data: mjx.Data) -> mjx.Data:
        return self._call(model, data, 0)

    def step(self, model: mjx.Model, data: mjx.Data, ctrl: jax.Array, substeps: int) -> mjx.Data:
        return self._call(model, data.replace(ctrl=ctrl), substeps)

    def detach(self, data: mjx.Data) -> mjx.Data:
        return data

    def attach(self, data: mjx.Data) -> mjx.Data:
        return data

    def diverged(self, data: mjx.Data) -> jax.Array:
        return data._impl.diverged

    def _call(self, model: mjx.Model, data: mjx.Data, substeps: int) -> mjx.Data:
        """`substeps` steps, or derived fields alone if 0."""
        values = [jnp.asarray(getattr(data, p.name), jnp.float32).reshape(-1) for p in self._state]
        state = jnp.concatenate(values)
        width = state.size
        derived = layout(self.fields, self._like, width)
        row = jax.ShapeDtypeStruct((derived[-1].stop if derived else width,), jnp.float32)
        overrides = replaced(self.model, model)
        threads = self.threads or max(1, usable_cores() // calling_devices())
        run = functools.partial(self._batches.run, threads, substeps, self.fields, tuple(overrides))
        host_call = through_buffers if jax.default_backend() == "cpu" else through_copies
        simulate = without_gradient(host_call(run, (row, jax.ShapeDtypeStruct((), bool))))
        out, failed = simulate(state, *overrides.values())
        fields = {p.name: out[p.start : p.stop].reshape(p.shape).astype(p.dtype) for p in (*self._state, *derived)}
        return data.replace(**fields, _impl=NativeData(failed | data._impl.diverged))


def calling_devices() -> int:
    """Of this host, at once: those of the `shard_map` that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else max(1, mesh.size // jax.process_count())


def through_buffers(simulate: Callable[..., None], result: Any) -> Callable[..., Any]:
    """`simulate(*outputs, *inputs)`, which writes into its outputs, as a function of JAX arrays; on the CPU alone."""

    def call(context: Any, out: Any, *arguments: Any) -> None:
        simulate(*map(np.asarray, out), *map(np.asarray, arguments))

    return buffer_callback(call, result, vmap_method="broadcast_all")


def through_copies(simulate: Callable[..., None], result: Any) -> Callable[..., Any]:
    """As `through_buffers`, on any device."""

    def call(*arguments: Any) -> Any:
        arrays = [np.asarray(x) for x in arguments]
        lead = arrays[0].shape[:-1]
        out = tuple(np.empty(lead + like.shape, like.dtype) for like in result)
        simulate(*out, *arrays)
        return out

    return lambda *arguments: jax.pure_callback(call, result, *arguments, vmap_method="broadcast_all")


def without_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which says so when it is asked for its derivative."""
    wrapped: Any = jax.custom_jvp(function)

    @wrapped.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise UserError("physics = 'mujoco' has no gradients: take physics = 'mjx' to differentiate a simulation.")

    return wrapped


def replaced(base: mjx.Model, model: mjx.Model) -> dict[str, jax.Array]:
    """The arrays of `model` that are not those of `base`, as MuJoCo calls them. Raises UserError for a fixed one."""
    found = {}
    for owner, other, prefix in ((base, model, ""), (base.opt, model.opt, "opt.")):
        for field in dataclasses.fields(owner):
            value = getattr(other, field.name)
            if value is getattr(owner, field.name) or field.name in ("opt", "stat", "_impl"):
                continue
            name = prefix + field.name
            if name not in MODEL_FIELDS:
                raise UserError(
                    f"model field {name} cannot differ between environments on physics = 'mujoco'. (A model that is "
                    "an argument of a jitted function differs in every field: override some of engine.model instead.)"
                )
            found[name] = jnp.asarray(value)
    return found
