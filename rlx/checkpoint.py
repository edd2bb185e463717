"""Save and restore one whole state: an arbitrary pytree of arrays and keys, bit for bit, through orbax (its v1 API).

A checkpoint is a flat dictionary {path of the leaf: numpy array}, not the pytree itself: orbax then never meets our
NamedTuples, dataclasses, typed keys or empty containers, the leaves of two trees compare by name, and the restored
tree takes its structure from the caller. Leaves without elements, which orbax refuses, live in the manifest alone.

On disk: `<directory>/<step>/` is an orbax checkpoint with `manifest.json` inside. It is written as `<step>.new`, its
manifest last (sha256 of every file, since orbax loads a damaged file silently), then renamed, and only then are older
ones removed. So a process killed at any moment leaves every whole checkpoint that was there before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx.errors import UserError, require
from rlx.logging import versions, write_atomically
from rlx.types import PyTree

FORMAT = 1
MANIFEST = "manifest.json"
SPACE_MARGIN = 2**20  # bytes beside the arrays themselves: orbax's indices and the manifest


class Damaged(Exception):
    """Why a checkpoint is not whole."""


def _orbax() -> Any:
    from orbax.checkpoint import v1  # imported when used: it takes a fifth of a second

    return v1


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(leaf: Any) -> str:
    """Shape and dtype as compared and reported: `float32[3, 4]`, `key<fry>[]`."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _host_copy(leaf: jax.Array) -> np.ndarray:
    # A copy, never a view: on a CPU `np.asarray` shares the buffer that the caller may donate next.
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


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


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone. Raises Damaged, and UserError for another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        digest = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise Damaged("it has no manifest, so it was never completed") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged("its manifest cannot be read") from error
    if digest != _digest(manifest):
        raise Damaged("its manifest is damaged (checksum)")
    if manifest["format"] != FORMAT:
        newer = manifest["format"] > FORMAT
        age, cure = ("newer", "update rlx") if newer else ("older", "use the version that wrote it")
        known = f"this version of rlx reads format {FORMAT}"
        raise UserError(f"checkpoint {folder} has the {age} format {manifest['format']}; {known}: {cure}.")
    return manifest


def _verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it. Raises Damaged and UserError."""
    manifest = _read_manifest(folder)
    try:
        found = _hashes(folder)
    except OSError as error:  # unreadable, or removed meanwhile by the process that writes
        raise Damaged(f"its files cannot be read: {error}") from error
    for name, digest in manifest["files"].items():
        if name not in found:
            raise Damaged(f"its file {name} is missing")
        if found[name] != digest:
            raise Damaged(f"its file {name} is damaged (checksum)")
    return manifest


def _compare(folder: Path, manifest: Mapping[str, Any], abstract: PyTree, metadata: Mapping[str, Any]) -> None:
    """Raises UserError, with the first difference, if the checkpoint is not of this tree or these `metadata`."""
    stored = manifest["metadata"]
    for name, value in metadata.items():
        if name in stored and stored[name] != value:
            raise UserError(f"checkpoint {folder} was written by a run with {name} = {stored[name]!r}, not {value!r}.")
    found = {path: description for path, description, _ in manifest["leaves"]}
    expected = {path: _describe(leaf) for path, leaf in _named_leaves(abstract).items()}
    for path in (*expected, *found):
        if found.get(path) != expected.get(path):
            difference = f"{path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
            origin = ", ".join(f"{name} = {value!r}" for name, value in stored.items()) or "unknown"
            raise UserError(
                f"checkpoint {folder} is of another algorithm, environment or setting. First leaf that differs: "
                f"{difference}. It was written by: {origin}."
            )


def _load(folder: Path, manifest: Mapping[str, Any], abstract: PyTree) -> PyTree:
    values = _orbax().load(folder)["leaves"]
    impls = {path: impl for path, _, impl in manifest["leaves"]}

    def leaf(path: str, like: Any) -> jax.Array:
        if _is_key(like):
            shape = (*like.shape, *jax.random.key_data(jax.random.key(0, impl=impls[path])).shape)
            data = jnp.array(values.get(path, np.zeros(shape, np.uint32)))
            value = jax.random.wrap_key_data(data, impl=impls[path])
        else:
            value = jnp.array(values.get(path, np.zeros(like.shape, like.dtype)))
        sharding = like.sharding if isinstance(like, jax.ShapeDtypeStruct) else None
        return value if sharding is None else jax.device_put(value, sharding)

    return jax.tree_util.tree_map_with_path(lambda path, like: leaf(jax.tree_util.keystr(path), like), abstract)


class _Store:
    """One folder of checkpoints, a sub-folder a step."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep
        self.damaged: set[int] = set()  # found so by a restore; they do not count as kept
        self._clean = False

    def folders(self) -> dict[int, Path]:
        """Committed checkpoints by step, ascending; `.new` with a manifest lacks only its last renaming."""
        found: dict[int, Path] = {}
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            match = re.fullmatch(r"(\d+)(\.new)?", path.name)
            if match and (not match[2] or (path / MANIFEST).exists()):
                found[int(match[1])] = path if not match[2] else found.get(int(match[1]), path)
        return dict(sorted(found.items()))

    def manifests(self) -> dict[int, dict[str, Any]]:
        """Manifests of the checkpoints that are whole as far as names and manifests tell."""
        found = {}
        for step, folder in self.folders().items():
            try:
                found[step] = _read_manifest(folder)
            except Damaged:
                continue
        return found

    def write(self, step: int, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        """Writes one checkpoint, then removes the ones no longer kept."""
        if not self._clean:
            self._remove_leftovers()
        final, new = self.directory / str(step), self.directory / f"{step}.new"
        try:
            shutil.rmtree(new, ignore_errors=True)
            _orbax().save(new, {"step": np.array(step), "leaves": arrays})
            manifest["files"] = _hashes(new)
            write_atomically(new / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}))
        except BaseException:
            self._remove_leftovers()
            raise
        self._remove(final)
        new.rename(final)
        self.damaged.discard(step)
        self._retain(step)

    def _retain(self, step: int) -> None:
        # Steps behind the one just written belong to a future that a restore of an earlier step gave up.
        whole = [s for s in self.manifests() if s <= step and s not in self.damaged]
        for other in self.folders():
            if other > step or other in self.damaged or (other in whole and other not in whole[-self.keep :]):
                self._remove(self.directory / str(other))
        self.damaged.clear()

    def _remove(self, folder: Path) -> None:
        if folder.exists():
            old = folder.with_name(f"{folder.name}.old")  # renamed first: a folder half removed must not look whole
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            shutil.rmtree(old)

    def _remove_leftovers(self) -> None:
        """What a killed process left. Only a writer does this: a reader may look while another process writes."""
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if re.fullmatch(r"\d+\.new", path.name) and (path / MANIFEST).exists():
                final = path.with_suffix("")
                if not final.exists():
                    path.rename(final)
            if re.match(r"\d+\.", path.name):
                shutil.rmtree(path, ignore_errors=True)
        self._clean = True


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Checkpointer:
    """Checkpoints of a run, written by one background thread; `best/` holds the best Policy.

    `metadata`: a small JSON dictionary (algorithm, environment, ...) that every manifest records. `keep`: how many
    whole checkpoints stay. `warn` gets a line for each checkpoint that is passed over.

    A write that fails in the background raises UserError at the next `save`, `save_best`, `wait` or `close`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        metadata: Mapping[str, Any] = {},
        warn: Callable[[str], None] = _warn,
    ):
        require(keep >= 1, "keep", keep, "at least 1 checkpoint")
        self.directory = Path(directory).absolute()
        self._metadata = json.loads(json.dumps(dict(metadata)))  # as a manifest gives it back
        self._warn = warn
        self._runs = _Store(self.directory, keep)
        self._best = _Store(self.directory / "best", 1)
        self._pending: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, step: int, state: PyTree) -> None:
        """Copies `state` to the host, so that the caller may donate it at once, and writes it in the background.

        Waits for the save before it. Raises UserError if the disk is too full; what is there stays.
        """
        self._submit(self._runs, step, state, {})

    def save_best(self, step: int, policy: PyTree, value: float) -> bool:
        """Writes `policy` to `best/` if `value` is higher than that of every one before, over restarts too."""
        self._finish("best")
        best = max((m["value"] for m in self._best.manifests().values()), default=-math.inf)
        if not float(value) > best:
            return False
        self._submit(self._best, step, policy, {"value": float(value)})
        return True

    def _submit(self, store: _Store, step: int, tree: PyTree, extra: dict[str, Any]) -> None:
        name = store.directory.name
        self._finish(name)
        leaves = {path: jnp.asarray(leaf) for path, leaf in _named_leaves(tree).items()}
        store.directory.mkdir(parents=True, exist_ok=True)
        self._require_space(sum(leaf.nbytes for leaf in leaves.values()))
        impls = {path: str(jax.random.key_impl(leaf)) if _is_key(leaf) else None for path, leaf in leaves.items()}
        manifest = {
            "format": FORMAT,
            "step": int(step),
            "metadata": self._metadata,
            "versions": versions(),
            "leaves": [[path, _describe(leaf), impls[path]] for path, leaf in leaves.items()],
            **extra,
        }
        arrays = {path: _host_copy(leaf) for path, leaf in leaves.items() if leaf.size}
        self._pending[name] = self._thread.submit(store.write, int(step), arrays, manifest)

    def _require_space(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < num_bytes + SPACE_MARGIN:
            needs, has = (num_bytes + SPACE_MARGIN) / 2**20, free / 2**20
            raise UserError(f"disk full: a checkpoint in {self.directory} needs {needs:,.1f} MiB, {has:,.1f} MiB free.")

    def _finish(self, name: str) -> None:
        future = self._pending.pop(name, None)
        error = None if future is None else future.exception()
        if error is not None:
            raise UserError(f"a checkpoint could not be written to {self.directory}: {error}") from error

    def wait(self) -> None:
        """Returns when everything saved so far is on disk with its manifest."""
        for name in list(self._pending):
            self._finish(name)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending. Files are verified only when one is restored."""
        return list(self._runs.manifests())

    def empty(self) -> bool:
        """Whether nothing was ever committed; a damaged checkpoint counts, so that a run does not start over it."""
        return not self._runs.folders()

    def restore(
        self, abstract_state: PyTree, step: int | None = None, expect: Iterable[str] = ("algorithm", "env")
    ) -> tuple[PyTree, int]:
        """The newest intact state and its step, or that of `step`.

        `abstract_state`: a pytree of `jax.ShapeDtypeStruct` (`jax.eval_shape`); the result has its structure, and its
        shardings where it names some. `expect` names the metadata that must equal this Checkpointer's. A checkpoint
        that is damaged or half-written is passed over with a warning. Raises UserError if none is left, or if the
        newest intact one differs in a leaf's path, shape or dtype.
        """
        folders = self._runs.folders()
        if step is not None and step not in folders:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {list(folders)}.")
        order = [step] if step is not None else list(reversed(folders))
        return self._restore(self._runs, order, abstract_state, expect)

    def restore_best(self, abstract_policy: PyTree, expect: Iterable[str] = ("algorithm", "env")) -> tuple[PyTree, int]:
        """The best intact Policy and its step. Raises UserError as `restore` does."""
        manifests = self._best.manifests()
        order = sorted(manifests, key=lambda step: -manifests[step]["value"])
        return self._restore(self._best, order, abstract_policy, expect)

    def _restore(self, store: _Store, order: list[int], abstract: PyTree, expect: Iterable[str]) -> tuple[PyTree, int]:
        metadata = {name: self._metadata[name] for name in expect if name in self._metadata}
        reasons = []
        folders = store.folders()
        for step in order:
            folder = folders[step]
            try:
                manifest = _verify(folder)
            except Damaged as error:
                store.damaged.add(step)
                reasons.append(f"{folder.name}: {error}")
                self._warn(f"checkpoint {folder} is passed over: {error}.")
                continue
            _compare(folder, manifest, abstract, metadata)
            return _load(folder, manifest, abstract), step
        found = "; ".join(reasons) or "the folder holds none"
        raise UserError(f"no whole checkpoint in {store.directory} ({found}).")

    def close(self) -> None:
        """Waits, then ends the background thread. Reading still works."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
