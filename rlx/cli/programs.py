"""Programs of many runs: their devices on a CPU; those of a sweep or a study begun, gone on with or found finished."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.errors import NonFiniteError
from rlx.files import RUNS, write_atomically
from rlx.logging import Progress
from rlx.run_directory import FINISHED

if TYPE_CHECKING:
    from rlx.signals import StopSignal


CPU_DEVICES = 32


def spread_over_cpu(num_runs: int = CPU_DEVICES) -> None:
    """Gives JAX a CPU device for each of `num_runs` runs of a program, 32 at most, before it begins.

    On one device many runs are one batch, whose small matrix products XLA works off one after another, on a core and a
    half of two. With a device each, two cores train 3 and 16 runs of CartPole 1.9 and 2.2 times as fast, and 3 of
    CheetahRun, most of whose time is native physics on all cores either way, 1.1 times (measured). No more of them than
    runs: XLA keeps a thread for every device, and those without work look for some (3 runs of SAC took 1.5 times as
    long with 32 devices as with 3). Devices of another kind are used before these; who names a number
    (JAX_NUM_CPU_DEVICES, XLA_FLAGS) keeps it, as does a process whose JAX has begun. May be called first for as many as
    there may be, which keeps a user's file from beginning JAX with one, and again with their number.
    """
    import jax

    named = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not named and jax.config.values["jax_num_cpu_devices"] in (-1, CPU_DEVICES):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(num_runs, CPU_DEVICES))


def finished(place: Path) -> bool:
    """Whether nothing is left to do in the folder of a program."""
    return (place / FINISHED).is_file()


def failures(place: Path) -> dict[str, str]:
    """Of a finished program: run -> the error that stopped it."""
    return json.loads((place / FINISHED).read_text())["failed"]


def train_program(
    place: Path,
    env: Any,
    algorithm: Any,
    runs: Mapping[str, tuple[Any, Any]],
    records: Mapping[str, Mapping[str, Any]],
    stop: StopSignal,
    quiet: bool,
    **keywords: Any,
) -> None:
    """Trains `runs` to their end, or until `stop` is requested, which it also notes. `keywords`: more of those of
    `rlx.training.train_many`."""
    from rlx.training import train_many

    keywords |= {"run_dir": place, "records": records, "resume": (place / RUNS).is_file()}
    keywords["on_epoch"] = lambda rows: stop.requested  # a signal that came while this was compiled
    try:
        done = train_many(env, algorithm, runs, progress=Progress(quiet=quiet), **keywords)
        failed = {name: run.error for name, run in done.items() if run.error}
        interrupted = any(run.interrupted for run in done.values())
        stop.requested |= interrupted
        if interrupted:
            return
    except NonFiniteError as error:  # all runs of this program; other programs may fare better
        failed = dict.fromkeys(runs, str(error))
    write_atomically(place / FINISHED, json.dumps({"failed": failed}) + "\n")
