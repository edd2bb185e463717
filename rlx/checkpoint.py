"""Save and restore one whole state: an arbitrary pytree of arrays and keys, bit for bit, through orbax (its v1 API).

A checkpoint is a flat dictionary {path of the leaf: numpy array}, not the pytree itself: orbax then never meets our
NamedTuples, dataclasses, typed keys or empty containers, the leaves of two trees compare by name, and the restored
tree takes its structure from the caller. Leaves without elements, which orbax refuses, live in the manifest alone.

How they lie on disk: `rlx/checkpoint_store.py`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx import storage
from rlx.checkpoint_store import FORMAT, Damaged, Store, orbax, verify
from rlx.distributed import on_first, several
from rlx.errors import UserError, require
from rlx.files import require_space
from rlx.machine import versions
from rlx.types import PyTree


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(leaf: Any) -> str:
    """Shape and dtype as compared and reported: `float32[3, 4]`, `key<fry>[]`."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _host_copy(leaf: jax.Array) -> np.ndarray:
    # A copy, never a view: on a CPU `np.asarray` shares the buffer that the caller may donate next.
    return np.array(_data(leaf))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def first_nonfinite(tree: PyTree) -> str | None:
    """The path of the first floating-point leaf with a NaN or an infinity, or None. One transfer to the host."""
    leaves = {
        path: leaf for path, leaf in _named_leaves(tree).items() if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    }
    if not leaves:
        return None
    finite = np.asarray(_all_finite(list(leaves.values())))
    return None if finite.all() else list(leaves)[int(np.argmin(finite))]


def _compare(
    folder: Path, manifest: Mapping[str, Any], abstract: PyTree, metadata: Mapping[str, Any], partial: bool
) -> None:
    """Raises UserError, with the first difference, if the checkpoint is not of this tree or these `metadata`.

    With `partial` it may hold more than the tree.
    """
    stored = manifest["metadata"]
    for name, value in metadata.items():
        if name in stored and stored[name] != value:
            raise UserError(f"checkpoint {folder} was written by a run with {name} = {stored[name]!r}, not {value!r}.")
    found = {path: description for path, description, _ in manifest["leaves"]}
    expected = {path: _describe(leaf) for path, leaf in _named_leaves(abstract).items()}
    for path in expected if partial else (*expected, *found):
        if found.get(path) != expected.get(path):
            difference = f"{path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
            origin = ", ".join(f"{name} = {value!r}" for name, value in stored.items()) or "unknown"
            raise UserError(
                f"checkpoint {folder} is of another algorithm, environment or setting, or of an earlier version of "
                f"rlx. First leaf that differs: "
                f"{difference}. It was written by: {origin}."
            )


def _load(folder: Path, manifest: Mapping[str, Any], abstract: PyTree) -> PyTree:
    """The leaves of `abstract`. Where several processes train, each reads its own parts of them alone."""
    wanted = _named_leaves(abstract)
    impls = {path: impl for path, _, impl in manifest["leaves"]}
    shardings = {path: getattr(like, "sharding", None) for path, like in wanted.items()}

    def zeros(path: str) -> np.ndarray:
        like = wanted[path]
        if _is_key(like):
            return np.zeros((*like.shape, *jax.random.key_data(jax.random.key(0, impl=impls[path])).shape), np.uint32)
        return np.zeros(like.shape, like.dtype)

    def asked(path: str) -> Any:
        """What orbax is to make of a leaf: ... leaves it out."""
        if path not in wanted:
            return ...
        if several() and shardings[path] is not None:
            return jax.ShapeDtypeStruct(zeros(path).shape, zeros(path).dtype, sharding=shardings[path])
        return zeros(path)

    shapes = {path: json.loads(text[text.index("[") :]) for path, text, _ in manifest["leaves"]}
    has_data = {path for path, shape in shapes.items() if 0 not in shape}
    tree = {"step": ..., "leaves": {path: asked(path) for path in has_data}}
    values = orbax().load(folder, tree)["leaves"] if has_data else {}

    def leaf(path: str, like: Any) -> jax.Array:
        value = values[path] if path in has_data else zeros(path)
        if not isinstance(value, jax.Array):
            value = jnp.array(value)
        if _is_key(like):
            value = jax.random.wrap_key_data(value, impl=impls[path])
        return value if shardings[path] is None else jax.device_put(value, shardings[path])  # there already, if read so

    return jax.tree_util.tree_map_with_path(lambda path, like: leaf(jax.tree_util.keystr(path), like), abstract)


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Checkpointer:
    """Checkpoints of a run, written by one background thread; `best/` holds the best Policy.

    `metadata`: a small JSON dictionary (algorithm, environment, ...) that every manifest records. `keep`: how many
    whole checkpoints stay. `warn` gets a line for each checkpoint that is passed over.

    A write that fails in the background raises UserError at the next `save`, `save_best`, `wait` or `close`.

    Where several processes train, every method but `steps` is called by each of them, and writing is not in the
    background: each writes and reads its own parts, the first one manifests and checksums. What lies on disk is the
    same, so a run goes on on any number of processes.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        metadata: Mapping[str, Any] = {},
        warn: Callable[[str], None] = _warn,
    ):
        require(keep >= 1, "keep", keep, "at least 1 checkpoint")
        self.directory: Path = storage.home(directory)
        self._metadata = json.loads(json.dumps(dict(metadata)))  # as a manifest gives it back
        self._warn = warn
        self._runs = Store(self.directory, keep, self.directory.parent)
        self._best = Store(self.directory / "best", 1, self.directory.parent)
        self._pending: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, step: int, state: PyTree) -> None:
        """Copies `state` to the host and writes it in the background; the caller may donate it at once.

        Waits for the save before it. Raises UserError if the disk is too full; what is there stays.
        """
        self._submit(self._runs, step, state, {})

    def save_best(self, step: int, policy: PyTree, value: float) -> bool:
        """Writes `policy` to `best/` if `value` is higher than that of every one before, over restarts too."""
        self._finish("best")
        best = on_first(lambda: max((m["value"] for m in self._best.manifests().values()), default=-math.inf))
        if not float(value) > best:
            return False
        self._submit(self._best, step, policy, {"value": float(value)})
        return True

    def _submit(self, store: Store, step: int, tree: PyTree, extra: dict[str, Any]) -> None:
        name = store.directory.name
        self._finish(name)
        leaves = {path: jnp.asarray(leaf) for path, leaf in _named_leaves(tree).items()}
        if not storage.is_remote(store.directory):  # there are no folders, and no disk to fill
            num_bytes = sum(leaf.nbytes for leaf in leaves.values())
            on_first(lambda: self._require_space(store.directory, num_bytes))
        impls = {path: str(jax.random.key_impl(leaf)) if _is_key(leaf) else None for path, leaf in leaves.items()}
        manifest = {
            "format": FORMAT,
            "step": int(step),
            "metadata": self._metadata,
            "versions": versions(),
            "leaves": [[path, _describe(leaf), impls[path]] for path, leaf in leaves.items()],
            **extra,
        }
        if several():
            try:
                store.write(int(step), {path: _data(leaf) for path, leaf in leaves.items() if leaf.size}, manifest)
            except (UserError, OSError) as error:
                raise self._unwritten(error) from error
            return
        arrays = {path: _host_copy(leaf) for path, leaf in leaves.items() if leaf.size}
        orbax()  # imported here: two threads that import at once may fail (CPython 3.11)
        self._pending[name] = self._thread.submit(store.write, int(step), arrays, manifest)

    def _require_space(self, folder: Path, num_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        require_space(self.directory, num_bytes, f"a checkpoint in {self.directory}")

    def _finish(self, name: str) -> None:
        future = self._pending.pop(name, None)
        error = None if future is None else future.exception()
        if error is not None:
            raise self._unwritten(error) from error

    def _unwritten(self, error: BaseException) -> UserError:
        return UserError(f"a checkpoint could not be written to {self.directory}: {error}")

    def wait(self) -> None:
        """Returns when everything saved so far is on disk with its manifest."""
        for name in list(self._pending):
            self._finish(name)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending. Files are verified only when one is restored."""
        return list(self._runs.manifests())

    def empty(self) -> bool:
        """Whether nothing was ever committed; a damaged checkpoint counts, so that a run does not start over it."""
        return on_first(lambda: not self._runs.folders())

    def restore(
        self,
        abstract_state: PyTree,
        step: int | None = None,
        expect: Iterable[str] = ("algorithm", "env"),
        partial: bool = False,
    ) -> tuple[PyTree, int]:
        """The newest intact state and its step, or that of `step`.

        `abstract_state`: a pytree of `jax.ShapeDtypeStruct` (`jax.eval_shape`); the result has its structure, and its
        shardings where it names some; with `partial` it may leave out leaves of what was saved. `expect` names the
        metadata that must equal this Checkpointer's. A checkpoint
        that is damaged or half-written is passed over with a warning. Raises UserError if none is left, or if the
        newest intact one differs in a leaf's path, shape or dtype.
        """

        def order() -> list[int]:
            folders = self._runs.folders()
            if step is not None and step not in folders:
                raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {list(folders)}.")
            return [step] if step is not None else list(reversed(folders))

        return self._restore(self._runs, order, abstract_state, expect, partial)

    def restore_best(self, abstract_policy: PyTree, expect: Iterable[str] = ("algorithm", "env")) -> tuple[PyTree, int]:
        """The best intact Policy and its step. Raises UserError as `restore` does."""

        def order() -> list[int]:
            manifests = self._best.manifests()
            return sorted(manifests, key=lambda step: -manifests[step]["value"])

        return self._restore(self._best, order, abstract_policy, expect)

    def _restore(
        self,
        store: Store,
        order: Callable[[], list[int]],
        abstract: PyTree,
        expect: Iterable[str],
        partial: bool = False,
    ) -> tuple[PyTree, int]:
        metadata = {name: self._metadata[name] for name in expect if name in self._metadata}

        def choose() -> tuple[int, str, dict[str, Any]]:
            reasons = []
            folders = store.folders()
            for step in order():
                folder = folders[step]
                try:
                    manifest = verify(folder)
                except Damaged as error:
                    store.damaged.add(step)
                    reasons.append(f"{folder.name}: {error}")
                    self._warn(f"checkpoint {folder} is passed over: {error}.")
                    continue
                _compare(folder, manifest, abstract, metadata, partial)
                return step, folder.name, manifest
            found = "; ".join(reasons) or "the folder holds none"
            raise UserError(f"no whole checkpoint in {store.directory} ({found}).")

        step, name, manifest = on_first(choose)
        return _load(store.directory / name, manifest, abstract), step

    def close(self) -> None:
        """Waits, then ends the background thread. Reading still works."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
