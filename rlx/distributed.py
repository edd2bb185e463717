"""Several processes, one run: start-up through `jax.distributed`, and how they agree.

Every process runs the same program; the first one alone writes logs and shows progress. A function here that says "on
every process" must be called by all of them, in the same order. With one process it does nothing that costs.

What stays exact when a run goes on on another number of processes or devices: parameters, optimiser, step, and all else
that a checkpoint holds, bit for bit. What it learns from then on differs by rounding, as over devices
(`rlx/sharding.py`). On as many devices as before, in however many processes, each device does the same work; only the
order in which gradients are summed between processes may differ.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from rlx import storage
from rlx.errors import UserError, require
from rlx.machine import versions

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost, and the others end
WAIT = 3600  # seconds in which the first process must have done what the others wait for
LEAVE = 30  # seconds that a process which ends waits for the others
T = TypeVar("T")
_calls, _epochs = itertools.count(), itertools.count(1)


def started() -> bool:
    """Whether this process was told to be one of several, of which there may be one."""
    return jax.distributed.is_initialized()


def several() -> bool:
    """Whether this run has more than one process."""
    return started() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def start(
    coordinator: str = "", num_processes: int | None = None, process_index: int | None = None, timeout: float = 60
) -> None:
    """Joins the other processes of a run, before JAX has looked for devices. On every process.

    Args:
        coordinator: HOST:PORT at which process 0 can be reached; with nothing given, TPU pods, SLURM and Open MPI say.
        num_processes, process_index: how many there are, and which of them this is.
        timeout: seconds in which all must have begun.

    Raises UserError for settings that cannot be, a process that does not come in time, an address that nobody answers,
    and processes with different versions. Afterwards this process should end: jax still waits in a thread.
    """
    given = (bool(coordinator), num_processes is not None, process_index is not None)
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-index go together: all three, or none of them.")
    if num_processes is not None and process_index is not None:
        require(num_processes >= 1, "num_processes", num_processes, "at least 1")
        require(0 <= process_index < num_processes, "process_index", process_index, f"from 0 to {num_processes - 1}")
        host, _, port = coordinator.rpartition(":")
        require(bool(host) and port.isdigit() and 0 < int(port) < 2**16, "coordinator", coordinator, "HOST:PORT")
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            raise UserError(
                f"coordinator = {coordinator!r} is not possible: no address for {host!r}: {error}"
            ) from error
    joined: Future[None] = Future()

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator or None,
                num_processes,
                process_index,
                # Later than `timeout`: at its own, jax ends the process with a stack trace and no word of the cause.
                initialization_timeout=int(timeout) + 30,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=LEAVE,
            )
            joined.set_result(None)
        except BaseException as error:
            joined.set_exception(error)

    threading.Thread(target=join, daemon=True, name="join").start()
    try:
        joined.result(timeout)
    except TimeoutError:
        raise UserError(why_alone(coordinator, num_processes, process_index, timeout)) from None
    except ValueError as error:
        raise UserError(
            f"no TPU pod, SLURM or Open MPI job was found here ({error}): --coordinator HOST:PORT, "
            "--num-processes N and --process-index I say what it would have."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the processes could not join at {coordinator!r}: {str(error).splitlines()[0]}") from error
    if not is_first():  # of this machine, maybe, whose logs are another's to write
        os.environ["RLX_STAGING"] = str(storage.staging() / f"process-{jax.process_index()}")
    check_versions()


def why_alone(coordinator: str, num_processes: int | None, process_index: int | None, timeout: float) -> str:
    """What is most likely wrong where not all processes have joined in time."""
    after = f"after {timeout:g} s"
    if process_index is None:
        return f"the processes of this job have not all begun {after}."
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"nobody answers at {coordinator!r} {after} ({error}): is process 0 running, is that its address, and is "
            "the port open?"
        )
    return f"not all {num_processes} processes have come to {coordinator!r} {after}: is one missing?"


def check_versions() -> None:
    """Raises UserError where a process has another version of what decides a run's numbers. On every process."""
    if not several():
        return
    found = gather(versions())
    for index, other in enumerate(found):
        for name in {**found[0], **other}:
            was, has = found[0].get(name, "none"), other.get(name, "none")
            if was != has:
                raise UserError(
                    f"the processes have different versions: {name} is {was} on process 0 and {has} on process {index}."
                )


def gather(value: Any) -> list[Any]:
    """The `value`s, any JSON, of all processes, in their order. On every process."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(2 ** int(max(sizes) - 1).bit_length(), np.uint8)  # few sizes, few programs
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(function: Callable[[], T]) -> T:
    """What `function` gives, any JSON, on the first process, which alone calls it. On every process.

    No process goes on before it has returned. An exception of the first process is a UserError of all.
    """
    if not several():
        return function()
    from jax.experimental import multihost_utils
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": function()}
        except Exception as error:  # the others wait: none may pass unheard
            known = isinstance(error, UserError | OSError)
            answer = {"error": str(error) if known else f"{type(error).__name__}: {error}"}
    # On the hosts, not on the devices: gloo gives processes half a minute to come to what they first do together, and
    # the checksums of a large checkpoint take longer.
    get_barrier_sync_fn()(key=f"rlx on first {next(_calls)}", timeout_ms=WAIT * 1000)
    data = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = np.zeros(2 ** (size - 1).bit_length(), np.uint8)
    padded[: data.size] = data[: padded.size]
    answer = json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def check_shared(folder: Path) -> None:
    """Raises UserError where a process cannot write into what is to become `folder`, or sees not what the first wrote.

    On every process.
    """
    if not several() or storage.is_remote(storage.home(folder)):
        return

    name, error = "", ""
    try:
        parent = next(path for path in (folder, *folder.parents) if path.is_dir())
        handle, name = tempfile.mkstemp(prefix=".rlx-", dir=parent)
        os.close(handle)
    except OSError as failed:
        error = str(failed)
    names, errors = zip(*gather([name, error]), strict=True)
    seen = gather(os.path.exists(names[0]))
    if name:
        os.unlink(name)
    where = f"run_dir = {str(folder)!r}"
    if not errors[0] and not all(seen):
        raise UserError(
            f"{where} lies on a disk of process 0 that process {seen.index(False)} does not see: name a folder on a "
            "file system that all share, or gs://BUCKET/PATH."
        )
    for index, text in enumerate(errors):
        if text:
            raise UserError(f"{where} cannot be written to by process {index}: {text}")


def told_to_stop() -> bool:
    """Whether all processes stop now, because one of them got SIGTERM. On every process, once an epoch.

    jax's preemption service carries the word between the hosts, so the devices are not kept waiting: it finds the
    furthest call of this that any process has made, and all stop at the next. So calls are counted from the start of
    the process, not of the run: a run that goes on would else have passed the call that is found before its first.
    """
    from jax.experimental import multihost_utils

    return several() and bool(multihost_utils.reached_preemption_sync_point(next(_epochs)))
