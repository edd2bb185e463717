"""A data set on disk: an npz of Minari's columns, written as a stream, read without unpickling, checked as a whole.

N steps of E episodes, one after another:

    observations   [N + E, ...]  raw, in the environment's dtype: T + 1 of an episode of T steps, its final one last
    actions        [N, ...]      what the environment received: float32 in [-1, 1] ([n * a] of action chunks), or int32
    rewards        [N]           float32, raw ([N, agents] where agents are paid apart)
    terminations   [N] bool      the MDP ended
    truncations    [N] bool      a time limit, or the end of collecting; the last step of an episode has one of the two
    episode_ids    [N] int64     0 .. E - 1
    metadata       ()            a JSON text: format, env, action, ..., sha256 of the columns

Step i of episode e was taken in observations[i + e] and led to observations[i + e + 1], at both endings too. A dict
observation has a column `observations/KEY` for each entry.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlx.environment import Environment
from rlx.errors import UserError
from rlx.files import require_space
from rlx.machine import available_memory
from rlx.types import Box, PyTree

FORMAT = 1


class Column(NamedTuple):
    """An array that is given in blocks, one after another along its first axis."""

    shape: tuple[int, ...]
    dtype: Any
    blocks: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def column(array: Any) -> Column:
    """A Column of a whole array."""
    array = np.asarray(array)
    return Column(array.shape, array.dtype, [array])


def obs_columns(obs: PyTree) -> dict[str, Any]:
    """{name of the column: leaf} of a pytree of observations, or of their specs."""
    leaves = jax.tree_util.tree_leaves_with_path(obs)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {"/".join(filter(None, ("observations", name))): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def describe_env(env: Environment) -> dict[str, Any]:
    """What metadata keep of an environment: its name, and what an action means there (native bounds, repeat, chunk).

    "chunk" is left out where it is 1, as in files from before there were any.
    """
    action = env.spec.action
    if isinstance(action, Box):
        bounds = np.array([np.broadcast_to(np.ravel(x), math.prod(action.shape)) for x in (action.low, action.high)])
        meaning: dict[str, Any] = {"low": bounds[0].tolist(), "high": bounds[1].tolist()}
    else:
        meaning = {"num_values": action.num_values}
    meaning["repeat"] = env.spec.action_repeat
    meaning |= {"chunk": env.spec.action_chunk} if env.spec.action_chunk > 1 else {}
    return {"env": env.spec.name or type(env).__name__, "action": meaning}


def check_target(path: str | Path, num_bytes: int = 0, overwrite: bool = False) -> None:
    """Raises UserError for a place that no data set can be written to: taken, no folder, no space."""
    file = Path(path)
    if file.suffix != ".npz":
        raise UserError(f"a data set is an .npz file; {str(path)!r} is none.")
    if not file.absolute().parent.is_dir():
        raise UserError(f"the folder of {str(path)!r} does not exist.")
    if file.is_dir() or (file.exists() and not overwrite):
        raise UserError(f"{str(path)!r} exists already; name another file, or use --overwrite.")
    require_space(file.absolute().parent, num_bytes, repr(str(path)))


def write(path: str | Path, columns: Mapping[str, Column], metadata: Mapping[str, Any], overwrite: bool = False) -> str:
    """Writes a data set, whole or not at all; the same content gives the same bytes. Returns its sha256.

    `metadata`: JSON; at least what `describe_env` gives. Raises UserError as `check_target` does.
    """
    file = Path(path)
    check_target(file, sum(c.nbytes for c in columns.values()), overwrite)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as raw:
            with zipfile.ZipFile(raw, "w") as archive:
                for name in sorted(columns):
                    _write_column(archive, name, columns[name], digest)
                full = {**metadata, "format": FORMAT, "sha256": digest.hexdigest()}
                _write_column(archive, "metadata", column(json.dumps(full)), hashlib.sha256())
            raw.flush()
            os.fsync(raw.fileno())
        check_target(file, 0, overwrite)  # it took a while
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def _write_column(archive: zipfile.ZipFile, name: str, column: Column, digest: Any) -> None:
    dtype, written = np.dtype(column.dtype), 0
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": column.shape}
    digest.update(_title(name, column.shape, dtype))
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:  # its date is always the same
        np.lib.format.write_array_header_1_0(entry, header)
        for block in column.blocks:
            data = np.asarray(block, dtype).tobytes()
            written += len(data)
            digest.update(data)
            entry.write(data)
    assert written == column.nbytes, f"{name}: {written} bytes for {column.shape} {dtype}"


def _title(name: str, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    return f"{name} {dtype.str} {list(shape)}\n".encode()


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns and the metadata of a file, unchecked but for the checksum.

    Raises UserError for a file that is none, that would not fit into memory or that was changed.
    """
    if not path.is_file():
        raise UserError("there is no such file.")
    if not zipfile.is_zipfile(path):
        raise UserError("it is no npz archive, or not a whole one.")
    try:
        with zipfile.ZipFile(path) as archive:
            size, free = sum(entry.file_size for entry in archive.infolist()), available_memory()
        if free and size > free:
            raise UserError(f"it has {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free.")
        with np.load(path, allow_pickle=False) as arrays:  # an object array is refused, never unpickled
            columns = {name: arrays[name] for name in arrays.files}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"it cannot be read: {error}") from error
    try:
        metadata = json.loads(str(columns.pop("metadata")))
        version, digest = metadata["format"], metadata["sha256"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"its metadata cannot be read ({error!r}); `rlx.data_file.write` makes data sets.") from error
    if version != FORMAT:
        raise UserError(f"it has format {version}; this version of rlx reads format {FORMAT}.")
    found = hashlib.sha256()
    for name in sorted(columns):
        found.update(_title(name, columns[name].shape, columns[name].dtype))
        found.update(np.ascontiguousarray(columns[name]).reshape(-1).view(np.uint8).data)
    if found.hexdigest() != digest:
        raise UserError("its columns are not those that it was written with (checksum).")
    return columns, metadata
