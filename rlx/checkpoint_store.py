"""A folder of checkpoints on disk: manifests with checksums, whole or not at all, older ones removed last.

`<directory>/<step>/` is an orbax checkpoint with `manifest.json` inside. It is written as `<step>.new`, its manifest
last (sha256 of every file, since orbax loads a damaged file silently), then renamed, and only then are older ones
removed. So a process killed at any moment leaves every whole checkpoint that was there before.

Object storage renames nothing (`rlx.storage`): there `<step>/` is written in place, and it is a checkpoint only once
its manifest, the last object, is there; whatever is removed loses its manifest first. A process that finds that
another has claimed the run leaves its own half there, for the next writer to remove. A step that is saved once more is
not whole until that is done.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlx import storage
from rlx.distributed import is_first, on_first
from rlx.errors import UserError
from rlx.files import write_atomically

FORMAT = 1
MANIFEST = "manifest.json"


class Damaged(Exception):
    """Why a checkpoint is not whole."""


def orbax() -> Any:
    from orbax.checkpoint import v1  # imported when used: it takes a fifth of a second

    return v1


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(p for p in _files(folder) if p != folder / MANIFEST):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif path != folder:  # object storage may list a folder inside itself
            yield from _files(path)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
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


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it. Raises Damaged and UserError."""
    manifest = read_manifest(folder)
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


_saving = threading.Lock()  # orbax's saves out of several threads at once fail (0.12.8)


class Store:
    """One folder of checkpoints, a sub-folder a step, of the run in the folder `run`."""

    def __init__(self, directory: Path, keep: int, run: Path):
        self.directory, self.run = directory, run
        self.keep = keep
        self.damaged: set[int] = set()  # found so by a restore; they do not count as kept
        self._remote = storage.is_remote(directory)
        self._clean = False

    def folders(self) -> dict[int, Path]:
        """Committed checkpoints by step, ascending; `.new` with a manifest lacks only its last renaming.

        On object storage, those with a manifest.
        """
        found: dict[int, Path] = {}
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            match = re.fullmatch(r"(\d+)(\.new)?", path.name)
            if match and (not (match[2] or self._remote) or (path / MANIFEST).exists()):
                found[int(match[1])] = path if not match[2] else found.get(int(match[1]), path)
        return dict(sorted(found.items()))

    def manifests(self) -> dict[int, dict[str, Any]]:
        """Manifests of the checkpoints that are whole as far as names and manifests tell."""
        found = {}
        for step, folder in self.folders().items():
            try:
                found[step] = read_manifest(folder)
            except Damaged:
                continue
        return found

    def write(self, step: int, arrays: Mapping[str, np.ndarray | jax.Array], manifest: dict[str, Any]) -> None:
        """Writes one checkpoint, then removes the ones no longer kept.

        Where several processes train, each calls this and writes its own parts of `arrays`, which lie on the devices of
        all; the first does the rest.
        """
        final = self.directory / str(step)
        new = final if self._remote else self.directory / f"{step}.new"

        def clear() -> None:
            storage.check_writer(self.run)
            if not self._clean:
                self._remove_leftovers()
            self._clean = False  # until it is whole
            self._remove(new)

        def complete() -> None:
            manifest["files"] = _hashes(new)
            text = json.dumps({**manifest, "sha256": _digest(manifest)})
            storage.check_writer(self.run)
            (new / MANIFEST).write_text(text) if self._remote else write_atomically(new / MANIFEST, text)

        def commit() -> None:
            if not self._remote:
                self._remove(final)
                new.rename(final)
            self._clean = True
            self.damaged.discard(step)
            self._retain(step)

        try:
            on_first(clear)
            with _saving:
                orbax().save(new, {"step": np.array(step), "leaves": arrays})
            on_first(complete)
        except BaseException:
            if is_first() and not self._remote:
                self._remove_leftovers()
            raise
        on_first(commit)

    def _retain(self, step: int) -> None:
        # Steps behind the one just written belong to a future that a restore of an earlier step gave up.
        whole = [s for s in self.manifests() if s <= step and s not in self.damaged]
        for other in self.folders():
            if other > step or other in self.damaged or (other in whole and other not in whole[-self.keep :]):
                self._remove(self.directory / str(other))
        self.damaged.clear()

    def _remove(self, folder: Path) -> None:
        if self._remote:
            (folder / MANIFEST).unlink(missing_ok=True)
            storage.remove(folder)
        elif folder.exists():
            old = folder.with_name(f"{folder.name}.old")  # renamed first: a folder half removed must not look whole
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            shutil.rmtree(old)

    def _remove_leftovers(self) -> None:
        """What a killed process left. Only a writer does this: a reader may look while another process writes."""
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if self._remote:
                if re.fullmatch(r"\d+", path.name) and not (path / MANIFEST).exists():
                    storage.remove(path)
                continue
            if re.fullmatch(r"\d+\.new", path.name) and (path / MANIFEST).exists():
                final = path.with_suffix("")
                if not final.exists():
                    path.rename(final)
            if re.match(r"\d+\.", path.name):
                shutil.rmtree(path, ignore_errors=True)
        self._clean = True
