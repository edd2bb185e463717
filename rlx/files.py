"""Files and folders that other processes look at too: replaced as a whole, held, not begun without the space."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlx.errors import UserError

RUNS = "runs.json"  # in a folder of many runs: their names
SPACE_MARGIN = 2**20  # bytes beside the arrays themselves: indices, manifests, directories of archives


class BusyError(UserError):
    """Another process trains into a folder."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: whoever reads `path`, at any moment, finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may write it too
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raises UserError where the disk of `folder` has not as much left as `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPACE_MARGIN:
        needs, has = (num_bytes + SPACE_MARGIN) / 2**20, free / 2**20
        raise UserError(f"disk full: {what} needs {needs:,.1f} MiB, {has:,.1f} MiB free.")


@contextmanager
def locked(path: str | os.PathLike[str], patience: float = 0.0) -> Iterator[None]:
    """Holds an existing folder against other processes that train into it, until they end or are killed.

    Raises UserError where one still does after `patience` seconds. File systems without locks go without.
    """
    import fcntl

    handle, last = os.open(path, os.O_RDONLY), time.monotonic() + patience
    try:
        with suppress(OSError):
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= last:
                        text = f"{str(path)!r}: another process trains there; wait for it, or stop it."
                        raise BusyError(text) from error
                time.sleep(0.5)
        yield
    finally:
        os.close(handle)
