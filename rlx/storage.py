"""Run directories on object storage, `gs://bucket/path`: logs in a local staging folder, checkpoints there directly.

`$RLX_STAGING/gs/bucket/path` (by default in ~/.cache/rlx/staging) stands for `gs://bucket/path`: `fetch` leads from the
address to the folder, `home` back, so that everything else works on local files. config.json, metrics.jsonl,
tensorboard/, eval.json and curve.png are written to the folder and uploaded at every visit to the host; `fetch`
downloads them. checkpoints/ never lies in the folder: orbax writes and reads it where it is.

What holds there: an object is replaced as a whole and seen by all readers at once; nothing else is. There is no
renaming, so a checkpoint is whole once its manifest, uploaded last, is there (`rlx.checkpoint_store`). There is no
appending, so a log is uploaded anew whenever it has grown. There are no locks, so the newest process owns a run: it
writes its id to writer.json, and an older one that finds another id there stops before its next upload or manifest.
What both upload between two of those looks may mix; checksums tell where it does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlx.errors import UserError, require
from rlx.files import RUNS, BusyError, locked

WRITER = "writer.json"
OURS = uuid.uuid4().hex  # this process's id in it


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address (`scheme://...`)."""
    return "://" in os.fspath(path)


def staging() -> Path:
    """The folder of all staging folders."""
    return Path(os.environ.get("RLX_STAGING") or Path.home() / ".cache" / "rlx" / "staging").absolute()


def home(path: str | os.PathLike[str]) -> Any:
    """Where a file or folder truly lies: an `etils.epath.Path` for an address or for what is staged, else absolute."""
    if is_remote(path):
        import fsspec
        from etils import epath

        # A listing kept in memory does not have what tensorstore and other processes write.
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
        return epath.Path(os.fspath(path))
    folder = Path(path).absolute()
    if not folder.is_relative_to(staging()) or len(folder.relative_to(staging()).parts) < 2:
        return folder
    scheme, *parts = folder.relative_to(staging()).parts
    return home(f"{scheme}://{'/'.join(parts)}")


def _check(address: str) -> None:
    """Raises UserError for an address that cannot be used with what is installed."""
    scheme, _, rest = address.partition("://")
    allowed = "orbax writes arrays to local paths and to gs://BUCKET/PATH alone"
    require(scheme == "gs" and "/" in rest.strip("/") and ".." not in rest.split("/"), "run_dir", address, allowed)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{address!r} needs gcsfs, which is not installed: pip install 'rlx[gcs]'.")


def _unreachable(path: Any, error: Exception) -> UserError:
    return UserError(
        f"{os.fspath(path)!r} cannot be used: {type(error).__name__}: {error}. Does the bucket exist, and may this "
        "account write to it? Credentials: `gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS."
    )


def _files(folder: Any) -> Iterator[Any]:
    """The logs in a run directory or a folder of them, local or not: no checkpoints, nothing that W&B keeps itself."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif path != folder and path.name != "checkpoints" and folder.name != "wandb":
            yield from _files(path)


def fetch(path: str | os.PathLike[str]) -> Path:
    """The local folder that stands for `path`, its logs downloaded; `path` itself, absolute, if it is local.

    A folder into which a process of this machine trains is left as it is: that process is the one that uploads it.

    Raises UserError, before anything compiles, for a scheme that does not serve, a missing library or credential, and
    for a folder that holds something else.
    """
    if not is_remote(path):
        collapsed = re.match(r"[a-z0-9]+:/", os.fspath(path))
        require(
            not collapsed, "run_dir", os.fspath(path), "an address is a str; a pathlib.Path drops one of its slashes"
        )
        return Path(path).absolute()
    address = os.fspath(path).rstrip("/")
    _check(address)
    there, folder = home(address), staging() / address.replace("://", "/")
    try:
        names = {entry.name for entry in there.iterdir()} - {there.name, WRITER} if there.is_dir() else set()
        if names and not names & {"config.json", RUNS}:
            found = ", ".join(sorted(names)[:4])
            raise UserError(f"{address!r} is not empty and holds no run ({found}); name another run directory.")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder):
                _download(there, folder)
        except BusyError:
            pass
        if (there.parent / RUNS).exists():  # one of many runs, whose checkpoints may lie there
            (folder.parent / RUNS).write_bytes((there.parent / RUNS).read_bytes())
    except UserError:
        raise
    except Exception as error:  # gcsfs and google.auth raise classes of their own
        raise _unreachable(there, error) from error
    return folder


def _download(there: Any, folder: Path) -> None:
    """Replaces the logs in a staged folder, but for those of runs in it that train now, and W&B's, which lie here."""
    busy = {"wandb"}
    for old in folder.iterdir():
        if not old.is_dir():
            old.unlink()
        elif old.name not in busy:
            try:
                with locked(old):
                    shutil.rmtree(old)
            except BusyError:
                busy.add(old.name)
    for file in _files(there) if there.is_dir() else ():
        target = folder / file.relative_to(there).as_posix()
        if file.name != WRITER and target.relative_to(folder).parts[0] not in busy:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


def claim(folder: Path) -> None:
    """Makes this process the writer of a staged run, and stages what the one before it has uploaded meanwhile.

    Nothing for a local one. Raises UserError if it may not write.
    """
    there = home(folder)
    if is_remote(there):
        try:
            (there / WRITER).write_text(json.dumps({"id": OURS, "host": socket.gethostname(), "pid": os.getpid()}))
            if folder.is_dir():
                _download(there, folder)
        except Exception as error:
            raise _unreachable(there, error) from error


def check_writer(there: Any) -> None:
    """Raises UserError if a newer process has claimed the run at this address, or those of which it is one.

    Nothing for a local path.
    """
    if not is_remote(there):
        return
    claims = [path for path in (there / WRITER, there.parent / WRITER) if path.exists()]
    if not claims:
        return  # as by a Checkpointer alone
    owner = json.loads(claims[0].read_text())
    if owner["id"] != OURS:
        by = f"process {owner['pid']} on {owner['host']}"
        raise BusyError(f"{os.fspath(there)!r}: another process ({by}) trains there since; this one stops.")


def put(path: Path) -> None:
    """Uploads one staged file; nothing for a local one. Raises UserError if the storage does not take it."""
    there = home(path)
    if is_remote(there):
        try:
            there.write_bytes(path.read_bytes())
        except Exception as error:
            raise _unreachable(there, error) from error


def clear(folder: Path, names: Iterable[str]) -> None:
    """Removes these files and folders of a staged run from where it lies; nothing for a local one."""
    there = home(folder)
    if is_remote(there):
        for name in names:
            remove(there / name)


def remove(there: Any) -> None:
    """An object, or all objects in a folder, if there are any."""
    if there.is_dir():
        there.rmtree(missing_ok=True)
    else:
        there.unlink(missing_ok=True)


class Mirror:
    """Uploads what has changed in a staged folder of logs; does nothing for a local one."""

    def __init__(self, folder: Path):
        self._folder, self._home = folder, home(folder)
        self._sent: dict[str, tuple[int, int] | None] | None = None  # by name: time and size

    def upload(self) -> None:
        """Whole files; those that are gone here are removed there.

        Raises UserError if a newer process has claimed the run, or if the storage does not take them.
        """
        if not is_remote(self._home):
            return
        try:
            check_writer(self._home)
            if self._sent is None:
                names = (file.relative_to(self._home).as_posix() for file in _files(self._home))
                self._sent = {name: None for name in names if name != WRITER}
            present = {path.relative_to(self._folder).as_posix(): path for path in _files(self._folder)}
            for name in sorted(present, key=lambda name: (name.count("/"), name)):  # config.json, runs.json first
                stat = present[name].stat()
                if not name.endswith(".tmp") and self._sent.get(name) != (stat.st_mtime_ns, stat.st_size):
                    put(present[name])
                    self._sent[name] = (stat.st_mtime_ns, stat.st_size)
            for name in [name for name in self._sent if name not in present]:
                remove(self._home / name)
                del self._sent[name]
        except UserError:
            raise
        except Exception as error:
            raise _unreachable(self._home, error) from error

    def try_upload(self) -> str:
        """As `upload`, but what a storage out of reach says is returned: the next one sends what this one did not."""
        try:
            self.upload()
        except BusyError:
            raise
        except UserError as error:
            return str(error)
        return ""
