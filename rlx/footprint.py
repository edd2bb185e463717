"""What a compiled program takes: memory on a device, and what it sends to others. Read from the program itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from rlx.errors import UserError
from rlx.logging import Progress
from rlx.machine import mib
from rlx.schedule import Schedule
from rlx.sharding import bytes_per_env, free_memory


class Memory(NamedTuple):
    """Bytes on each device while a program runs, by XLA's own analysis."""

    state: int  # what goes in, which stays between calls
    temporaries: int  # what else it needs: intermediate values, and outputs that take the place of no input

    @property
    def total(self) -> int:
        return self.state + self.temporaries


def memory(compiled: Any) -> Memory | None:
    """Of a program that `jax.jit(...).lower(...).compile()` gave; None where the backend does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes + max(fresh, 0))


def report(
    compiled: tuple[Any, Any, Any],
    state: Any,
    arrays: Any,
    schedule: Schedule,
    num_runs: int,
    progress: Progress,
) -> None:
    """Says where a run is to be and what its programs take there, before anything of it is.

    `compiled`: init, epoch and evaluate; `state`: its shapes; `arrays`: those of a data set. Raises UserError, with
    what would fit, where that is more than a device has.
    """
    plan, free = schedule.plan, free_memory(schedule.num_devices)
    init, epoch, evaluate = (memory(program) for program in compiled)
    devices = f"{schedule.num_devices} device{'s' if schedule.num_devices > 1 else ''}"
    devices += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    unused = 0 if jax.devices()[0].platform == "cpu" else len(jax.devices()) - schedule.num_devices
    where = f"{devices} ({jax.devices()[0].device_kind}{f'; {unused} more are not used' if unused else ''})"
    what = f"{plan.num_envs // plan.num_devices:,} environments each"
    if num_runs > 1:
        on_each = num_runs // schedule.num_run_devices
        what = f"{on_each} run{'s' if on_each > 1 else ''} of {what}"
    if init is None or epoch is None or evaluate is None:
        progress.message(f"{where}: {what}; it does not say what they take")
        return
    # The state stays all the time; `init` makes it, and more states of environments than are kept.
    temporaries = max(epoch.temporaries, evaluate.temporaries, init.total - epoch.state)
    needed = Memory(epoch.state, temporaries)
    of = f" of {mib(free)} free" if free else ""
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    share = max(schedule.num_devices, 1)
    kept = bytes_per_env(state.learner) // share
    takes = f"{mib(needed.state - read)} of state{f' ({mib(kept)} of it experience)' if kept else ''}"
    takes += f"{f', {mib(read)} of data' if read else ''} and "
    takes += f"{mib(needed.temporaries)} of temporaries"
    progress.message(f"{where}: {what}, {takes}{of}")
    copies = 2 if jax.default_backend() == "cpu" else 1  # a checkpoint begins with a copy of the state on the host
    total = needed.state + max(needed.temporaries, (copies - 1) * (needed.state - read))
    if free and total > free:
        # Parameters, the pool, what the learner keeps of the past: whatever the environments.
        of_envs = bytes_per_env(state.source) // share
        fixed = copies * (needed.state - read - of_envs) + read
        fit = plan.num_envs * (free - fixed) // max(of_envs + max(needed.temporaries, (copies - 1) * of_envs), 1)
        power = 2 ** int(math.log2(fit)) if plan.num_devices <= fit < plan.num_envs else 0
        advice = [f"about num_envs = {power}"] if power else []
        if kept:
            room = (free - needed.total + kept) / kept, (free - fixed - copies * (of_envs - kept)) / (copies * kept)
            advice += [f"{max(min(*room), 0.0):.0%} of the experience in the learner, which takes {mib(kept)}"]
        advice += [] if advice else ["fewer environments, shorter unrolls, smaller networks"]
        advice += ["fewer runs in one program"] if num_runs > schedule.num_run_devices else []
        advice += ["more of the devices (num_devices)"] if unused else []
        advice += ["less data"] if read else []
        raise UserError(
            f"the run takes {mib(total)} on each device, which has {mib(free)} free. What would help: "
            f"{', '.join(advice)}."
        )


class Collective(NamedTuple):
    """An operation between devices in a compiled program."""

    kind: str  # all-reduce, all-gather, ...
    bytes: int  # of its result on a device
    times: int  # that one call of the program runs it
    arrays: int  # of which its result consists


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
OPERANDS_FIRST = ("all-gather-start", "collective-permute-start")  # what these give holds their operands too
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}  # the others have four bytes
SIZES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_SHAPE = re.compile(r"\b([a-z]+[a-z0-9]*)\[([0-9,]*)\]")


def collectives(text: str) -> list[Collective]:
    """Those of an optimised HLO module (`compiled.as_text()`), the largest first.

    The body of a loop counts as often as it runs; once where the compiler does not know. Both branches of a condition
    count. Raises ValueError for a text that is no such module.
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
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is no HLO module.")

    def visit(name: str, times: int) -> Iterator[Collective]:
        for line in computations.get(name, ()):
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            kind = found[2].removesuffix("-start")
            if kind in KINDS:
                parts = sizes_of(found[1], found[2] in OPERANDS_FIRST)
                yield Collective(kind, sum(parts), times, len(parts))
                continue
            trips = _TRIPS.search(line) if kind == "while" else None
            inside = times * int(trips[1]) if trips else times
            called = [name for _, name in _CALLED.findall(line)]
            called += [name.strip().lstrip("%") for names in _BRANCHES.findall(line) for name in names.split(",")]
            for callee in called:
                yield from visit(callee, inside)

    return sorted(visit(entry, 1), key=lambda c: -c.bytes)


def sizes_of(shape: str, results_alone: bool = False) -> list[int]:
    """Bytes of each array of an HLO shape such as `(f32[8,4]{1,0}, pred[])`; of its second half alone where operands
    come first.
    """
    found = _SHAPE.findall(shape)
    if results_alone:
        found = [part for part in found if part != ("u32", "")]  # contexts
        found = found[len(found) // 2 :]
    sizes = (math.prod(int(n) for n in size.split(",") if n) for _, size in found)
    widths = (SIZES.get(kind, 1 if kind.startswith("f8") else 4) for kind, _ in found)
    return [size * width for size, width in zip(sizes, widths, strict=True)]
