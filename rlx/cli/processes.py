"""The flags of a run of several processes, its start, and how a process of it ends that meets an error."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rlx.errors import UserError


def take_flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of several processes, and the other arguments."""
    parser = argparse.ArgumentParser("rlx", add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-index", type=int)
    parser.add_argument("--start-timeout", type=float, default=60.0)
    return parser.parse_known_args(arguments)


OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # what XLA says of this process, not of the others
LOST = ("UNKNOWN: ", "UNAVAILABLE: ", "INTERNAL: ", "ABORTED: ", "CANCELLED: ", "DEADLINE_EXCEEDED: ")  # or of them


def lost_others(error: Exception) -> bool:
    """Whether XLA says of another process that it is gone. Reading an array turns its errors into ValueErrors."""
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        return not str(error).startswith(OWN)
    return isinstance(error, ValueError) and str(error).startswith(LOST)


@contextlib.contextmanager
def joined(flags: argparse.Namespace, report: Callable[[Exception], int]) -> Iterator[None]:
    """Inside, this process is one of several. One that meets an error ends without an ordinary exit, in which it would
    wait for the others, which wait for it.
    """
    import jax

    from rlx import distributed

    met = False
    try:
        distributed.start(flags.coordinator, flags.num_processes, flags.process_index, flags.start_timeout)
        met = True
        yield
    except Exception as error:
        if lost_others(error):
            why = str(error).splitlines()[0]
            report(UserError(f"this process lost the others ({why}). The last checkpoint stands: start all again."))
            leave(1)
        status = report(error)
        if met and isinstance(error, UserError):
            with contextlib.suppress(Exception):  # most often all meet it
                jax.distributed.shutdown()
        leave(status)


def begun() -> bool:
    """Whether this process was started with --distributed. Imports nothing: names are checked before jax is loaded."""
    return "rlx.distributed" in sys.modules and sys.modules["rlx.distributed"].started()


def writes() -> bool:
    """Whether this process is the one, of several, that shows what is done."""
    return not begun() or sys.modules["rlx.distributed"].is_first()


def leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
