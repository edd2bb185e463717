"""What a compiled program takes: memory on a device, and what it sends to others. Read from the program itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from rlx.errors import UserError
from rlx.logging import Progress
from rlx.machine import available_memory
from rlx.schedule import Schedule


class Memory(NamedTuple):
    """Bytes on each device while a program runs, by XLA's own analysis."""

    state: int  # what goes in, which stays between calls
    temporaries: int  # what else it needs: intermediate values, and outputs that take the place of no input

    @property
    def total(self) -> int:
        return self.state + self.temporaries


def memory(compiled: Any) -> Memory:
    """Of a program that `jax.jit(...).lower(...).compile()` gave."""
    found = compiled.memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes + max(fresh, 0))


def device_memory(device: jax.Device) -> int | None:
    """Bytes free on a device, None if it does not say. CPU devices share what the machine has."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    free = available_memory() if device.platform == "cpu" else None
    return free // jax.local_device_count() if free else None


def mib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def report(programs: Sequence[Any], schedule: Schedule, num_runs: int, progress: Progress) -> None:
    """Says where a run is to be and what its programs take there, before anything of it is.

    Raises UserError, with what would fit, where that is more than a device has.
    """
    plan, free = schedule.plan, device_memory(jax.local_devices()[0])
    needed = max(map(memory, programs), key=lambda memory: memory.total)
    devices = plan.num_devices * schedule.num_run_devices
    where = f"{devices} device{'s' if devices > 1 else ''} ({jax.devices()[0].device_kind})"
    what = f"{plan.num_envs // plan.num_devices:,} environments each"
    if num_runs > 1:
        what = f"{num_runs // schedule.num_run_devices} runs of {what}"
    of = f" of {mib(free)} free" if free else ""
    takes = f"{mib(needed.state)} of state and {mib(needed.temporaries)} of temporaries"
    progress.message(f"{where}: {what}, {takes}{of}")
    if free and needed.total > free:
        fit = plan.num_envs * free // needed.total  # nearly all of it grows with the environments
        advice = [f"about num_envs = {2 ** int(math.log2(fit))}" if fit else "shorter unrolls or smaller networks"]
        advice += ["fewer runs in one program"] if num_runs > 1 else []
        raise UserError(
            f"the run takes {mib(needed.total)} on each device, which has {mib(free)} free. What would fit: "
            f"{', '.join(advice)}, or more devices (num_devices)."
        )


class Collective(NamedTuple):
    """An operation between devices in a compiled program."""

    kind: str  # all-reduce, all-gather, ...
    bytes: int  # of its result on a device
    times: int  # that one call of the program runs it


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")


def collectives(text: str) -> list[Collective]:
    """Those of an optimised HLO module (`compiled.as_text()`), the largest first.

    The body of a loop counts as often as it runs; once where the compiler does not know. Both branches of a condition
    count.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = computations[header[1]] = []
            entry = header[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)

    def visit(name: str, times: int) -> Iterator[Collective]:
        for line in computations.get(name, ()):
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            kind = found[2].removesuffix("-start")
            if kind in KINDS:
                yield Collective(kind, size_of(found[1]), times)
                continue
            trips = _TRIPS.search(line) if kind == "while" else None
            inside = times * int(trips[1]) if trips else times
            called = [name for _, name in _CALLED.findall(line)]
            called += [name.strip().lstrip("%") for names in _BRANCHES.findall(line) for name in names.split(",")]
            for callee in called:
                yield from visit(callee, inside)

    return sorted(visit(entry, 1), key=lambda c: -c.bytes)


def size_of(shape: str) -> int:
    """Bytes of an HLO shape such as `(f32[8,4]{1,0}, pred[])`."""
    found = re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shape)
    return sum(SIZES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found)
