"""What a run writes and shows while it goes: metrics, progress.

rich, tensorboardX and wandb are imported when they are used, so that `import rlx` stays fast.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from rlx.errors import UserError
from rlx.files import write_atomically
from rlx.run_directory import RunDirectory, read_metrics


class Writer(Protocol):
    """Takes metrics and gives nothing back. Names: `train/...`, `eval/...`, `time/...`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def _row(step: int, metrics: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps({"step": int(step), **{k: v if v is None else float(v) for k, v in finite.items()}}) + "\n"


class JsonlWriter:
    """One JSON object a line: `step`, then the metrics; a value that is not finite is null. Flushed line by line.

    `resume_step` cuts what an earlier process wrote behind that step; without it the file starts empty.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None):
        file = Path(path)
        kept = [] if resume_step is None or not file.exists() else read_metrics(file)
        rows = (dict(row) for row in kept if row["step"] <= (resume_step or 0))
        write_atomically(file, "".join(_row(int(row.pop("step")), row) for row in rows))
        self._path = file

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with open(self._path, "a") as file:  # not kept open: one process may record hundreds of runs
            file.write(_row(step, metrics))

    def close(self) -> None:
        pass


def cut_events(path: Path, last_step: int) -> None:
    """Removes from a TensorBoard event file what lies behind `last_step`, and a torn last record.

    A record is length uint64, its checksum, the Event, its checksum (TFRecord); whole records are copied as they are.
    """
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    kept, start = [], 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        stop = start + 12 + length + 4
        if stop > len(data):
            break
        if Event.FromString(data[start + 12 : stop - 4]).step <= last_step:
            kept.append(data[start:stop])
        start = stop
    temporary = path.with_name("cut.tmp")  # no "tfevents" in the name: TensorBoard must not read it
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


class TensorboardWriter:
    """Scalars as TensorBoard events. `resume_step` cuts the existing event files behind that step.

    Not tensorboardX's SummaryWriter, which holds threads and open files: one process may record hundreds of runs.
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int | None = None):
        from tensorboardX.proto.event_pb2 import Event

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        existing = sorted(folder.glob("*tfevents*"))
        if resume_step is not None:
            for path in existing:
                cut_events(path, resume_step)
        # Without the last number a quick resume would write into the file before it.
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{len(existing)}"
        self._append([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def _append(self, events: Sequence[Any]) -> None:
        from tensorboardX.record_writer import masked_crc32c

        with open(self._path, "ab") as file:
            for event in events:
                data = event.SerializeToString()
                header = struct.pack("<Q", len(data))
                checksums = [struct.pack("<I", masked_crc32c(part)) for part in (header, data)]
                file.write(header + checksums[0] + data + checksums[1])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        now, finite = time.time(), {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._append([Event(wall_time=now, step=int(step), summary=scalar(k, v)) for k, v in finite.items()])

    def close(self) -> None:
        pass


class WandbWriter:
    """Weights & Biases. A resumed run directory goes on with the same W&B run, which keeps the first row of a step.

    Raises UserError if wandb is not installed.
    """

    def __init__(self, run: RunDirectory, project: str = "rlx", resume_step: int | None = None):
        try:
            import wandb
        except ImportError as error:
            raise UserError("W&B is not installed: pip install 'rlx[wandb]'.") from error
        folder = run.path / "wandb"
        folder.mkdir(exist_ok=True)
        file = folder / "id.txt"
        if resume_step is None or not file.exists():
            write_atomically(file, uuid.uuid4().hex[:8])
        options = {"id": file.read_text(), "name": run.path.name, "config": run.config, "dir": str(run.path)}
        self._run = wandb.init(project=project, resume="allow", **options)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=int(step))

    def close(self) -> None:
        self._run.finish()


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"


class Progress:
    """Says what is happening: the phases of a run with their seconds, then steps, steps/s, return, time left.

    A live bar on a terminal, plain lines elsewhere. A phase that comes again (an evaluation) is announced once;
    `phases` sums the seconds of each name.
    """

    def __init__(self, total_steps: int = 0, stream: TextIO | None = None, quiet: bool = False):
        self.phases: dict[str, float] = {}
        self.total_steps = total_steps  # known once the run is planned
        self._stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self._shown: dict[str, float] = {}
        self._since: tuple[int, float] | None = None  # step and time of a run's first report
        self._last = ""
        self._bar: Any = None
        self._task: Any = None
        if self._stream.isatty() and not quiet:
            self._bar = self._start_bar()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        text = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), text, BarColumn(bar_width=24), TimeElapsedColumn())
        bar = RichProgress(*columns, console=Console(file=self._stream), transient=True)
        bar.start()
        return bar

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announces what is done inside the block, and its seconds when it is done."""
        first = name not in self.phases
        task = None if self._bar is None else self._bar.add_task(name, total=None)
        if task is None and first:
            self.message(f"{name} ...")
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.phases[name] = self.phases.get(name, 0.0) + seconds
            if task is not None:
                self._bar.remove_task(task)
        if first:
            self.message(f"{name}: {seconds:.1f} s")

    def update(self, step: int, steps_per_second: float, metrics: Mapping[str, float]) -> None:
        """One report. Returns are remembered, since not every report has an evaluation."""
        if self.quiet:
            return
        for name in ("train/return", "eval/return"):
            if math.isfinite(metrics.get(name, math.nan)):
                self._shown[name] = metrics[name]
        now = time.perf_counter()
        if self._since is None or step <= self._since[0]:  # the first, or the first of another run
            self._since = (step, now)
        done, seconds = step - self._since[0], now - self._since[1]  # evaluations and checkpoints take their part
        rate = done / seconds if done and seconds > 1 else steps_per_second
        left = (self.total_steps - step) / rate if rate > 0 else math.inf
        parts = [f"{step:,}/{self.total_steps:,} steps", f"{steps_per_second:,.0f} steps/s"]
        parts += [f"{name} {value:.4g}" for name, value in self._shown.items()]
        text = "  ".join([*parts, f"{_duration(max(left, 0.0))} left"])
        if self._bar is None:
            self.message(text)
            return
        self._last = text
        if self._task is None:
            self._task = self._bar.add_task(text, total=self.total_steps)
        self._bar.update(self._task, completed=step, description=text)

    def message(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self.quiet:
            try:
                print(text, file=self._stream, flush=True)
            except BrokenPipeError:  # nobody reads any more (`| head`): the run goes on
                self.quiet = True

    def close(self) -> None:
        """Ends the bar and leaves its last report as a line."""
        if self._bar is None:
            return
        self._bar.stop()
        self._bar = None
        if self._last:
            self.message(self._last)
