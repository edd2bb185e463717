"""The host's side of the native engine: rows of float32 states in, MuJoCo's thread pool, rows out. NumPy alone.

(jax inside a callback on the CPU can wait for the very program that called it.)

Memory: a batch of 16384 simulations of CheetahRun took 2.0 KB a simulation, of HumanoidRun 4.7 KB, and 3.5 and 7.9 KB
with four fields of the model overridden; 13 MB more for the threads. Every batch size that is met keeps its own.

A forked process starts with no batches: the threads of its parent's are not there, and taking those apart would wait
for them, so they are kept, unused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
from mujoco import mjx
from mujoco.batch import MODEL_FIELDS, Batch, SimulationError

from rlx.errors import UserError

FATAL = [int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{what}")) for what in ("QPOS", "QVEL", "QACC", "CTRL")]
FULL = [int(getattr(mujoco.mjtWarning, f"mjWARN_{what}FULL")) for what in ("CONTACT", "CNSTR")]
# Of what mj_setConst derives from a model, these follow it: C relies on them, and where MJX and Warp do too,
# `with_overrides` derives them. The rest those engines keep at the nominal model's values.
FOLLOWING = (
    "body_subtreemass",
    "dof_M0",
    "body_sameframe",
    "geom_sameframe",
    "site_sameframe",
    "geom_rbound",
    "geom_aabb",
)
NOMINAL = (MODEL_FIELDS & {f.name for f in dataclasses.fields(mjx.Model)}) - {*FOLLOWING}


_all: weakref.WeakSet[Batches] = weakref.WeakSet()
_of_parents: list[Any] = []


def _forget_batches() -> None:
    for batches in list(_all):
        _of_parents.append(batches._free)
        batches._free, batches._lock = {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_batches)


class Batches:
    """Simulations of one model. Between calls it keeps scratch memory alone, by batch size.

    Calls at the same time (one a device) do not meet: each takes a batch of its own.
    """

    def __init__(self, model: mujoco.MjModel):
        self._model, self._lock = model, threading.Lock()
        self._free: dict[tuple[int, int, tuple[str, ...]], list[Batch]] = {}
        try:
            self._free[1, 1, ()] = [Batch(model, 1, 1)]
        except ValueError as error:
            raise UserError(f"physics = 'mujoco' cannot simulate this model: {error}") from error
        self._warned: set[str] = set()
        _all.add(self)

    def run(
        self,
        threads: int,
        substeps: int,
        fields: Sequence[str],
        overridden: tuple[str, ...],
        out: np.ndarray,
        failed: np.ndarray,
        state: np.ndarray,
        *overrides: np.ndarray,
    ) -> None:
        """`substeps` steps, or derived fields alone if 0: `state` [..., W] -> `out` [..., W + D], `failed` [...] bool.

        D: the derived `fields`. A simulation that fails keeps its state; its derived fields are zero. So does one whose
        `overrides` [..., *] of the model fields `overridden` MuJoCo cannot take.
        """
        state, out, failed = (x.reshape(-1, *x.shape[-1:]) for x in (state, out, failed[..., None]))
        size, width = state.shape
        with self._take(threads, size, overridden) as batch:
            bound = [batch.bind(field) for field in fields]  # before the call: fresh ones are zero until the next
            refused, reason = write_overrides(batch, overridden, [x.reshape(size, -1) for x in overrides])
            if reason:
                self._warn("overrides", f"simulations are given up whose overrides MuJoCo cannot take: {reason}")
            batch.state[...] = state
            batch.warning[...] = 1  # MuJoCo prints and logs the first of each kind alone
            with contextlib.suppress(SimulationError):  # `status` tells which
                if substeps:
                    batch.step(nstep=substeps)
                else:
                    batch.forward()
            out[:, :width] = batch.state
            start = width
            for values in bound:
                values = values.reshape(size, -1)
                out[:, start : start + values.shape[1]] = values
                start += values.shape[1]
            if (batch.warning[:, FULL, -1] > 1).any():
                self._warn(
                    "memory",
                    "contacts or constraints are dropped, for the model's memory is full: raise `memory` in <size>.",
                )
            # Not 1: a state that is not finite is reset by MuJoCo, and its other counts to 0.
            bad = refused | (batch.status != 0) | (batch.warning[:, FATAL, -1] != 1).any(axis=1)
            if not substeps:  # MuJoCo looks at accelerations when it steps
                bad |= ~np.isfinite(out).all(axis=1)
        failed[:, 0] = bad
        if bad.any():
            out[bad, :width] = state[bad]
            out[bad, width:] = 0

    def _warn(self, what: str, text: str) -> None:
        """Once for each `what`."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"physics = 'mujoco': {text}", stacklevel=2)

    @contextlib.contextmanager
    def _take(self, threads: int, size: int, overridden: tuple[str, ...]) -> Iterator[Batch]:
        """A batch of `size` simulations, whose fields `overridden` are its own; after an error it is thrown away."""
        key = (threads, size, overridden)
        with self._lock:
            free = self._free.setdefault(key, [])
            batch = free.pop() if free else None
        if batch is None:
            batch = Batch(self._model, size, threads)
        yield batch
        with self._lock:
            free.append(batch)


def write_overrides(batch: Batch, names: Sequence[str], values: Sequence[np.ndarray]) -> tuple[np.ndarray, str]:
    """Gives each simulation its own `values` [n, ...] of the model fields `names`.

    What only C derives from them follows; what MJX does not derive either keeps the nominal model's values. Returns
    which simulations MuJoCo refused, [n] bool, and what it said, "" if none: those have the nominal model.
    """
    refused, reason = np.zeros(batch.nsim, bool), ""
    changed = np.zeros(batch.nsim, bool)
    for name, value in zip(names, values, strict=True):
        own = batch.expand(name).reshape(batch.nsim, -1)
        value = value.astype(own.dtype)
        changed |= (own != value).any(axis=1)
        own[...] = value
    inputs = set(mujoco.MjModel._setconst_inputs)
    if not changed.any() or not any(name in inputs or name.startswith("opt.") for name in names):
        return refused, reason
    try:
        batch.set_const(changed)
    except SimulationError as error:
        refused[error.ids], reason = True, str(error)
        for name in names:
            batch.expand(name)[refused] = nominal(batch.model, name)
        batch.set_const(refused)
    for name in NOMINAL.difference(names):
        if batch.expanded(name) is not None:
            batch.expand(name)[...] = getattr(batch.model, name)
    for name, value in zip(names, values, strict=True):  # where MuJoCo has derived them itself
        batch.expand(name).reshape(batch.nsim, -1)[~refused] = value[~refused]
    return refused, reason


def nominal(model: mujoco.MjModel, name: str) -> np.ndarray:
    """What `model` has in a field of MODEL_FIELDS."""
    return getattr(model.opt, name[4:]) if name.startswith("opt.") else getattr(model, name)


def refusal(model: mujoco.MjModel, overrides: Mapping[str, np.ndarray]) -> str:
    """Which of the `overrides`, [n, ...] each, MuJoCo takes in none of n simulations, and why; "" if it takes them."""
    everything, said = tuple(overrides), {}
    for names in (everything, *((name,) for name in overrides)):
        values = [overrides[name].reshape(len(overrides[name]), -1) for name in names]
        refused, reason = write_overrides(Batch(model, len(values[0]), 1), names, values)
        if refused.all():
            said[names] = reason
    if everything not in said:
        return ""
    names = min(said, key=len)  # one field alone, if it is to blame
    named = re.sub(r"\bbody (\d+)", lambda match: f"body {model.body(int(match[1])).name!r}", said[names])
    return f"{', '.join(names)}: {named}"
