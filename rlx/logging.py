"""What a run leaves on disk and shows on the screen: run directory, metrics writers, progress.

rich, tensorboardX and wandb are imported when they are used, so that `import rlx` stays fast.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from rlx import storage
from rlx.errors import UserError

FORMAT = 1  # of config.json
FAILED = "failed.json"  # of a run among many that met a NaN or an infinity: step, error
OWN_FILES = ("config.json", "metrics.jsonl", "tensorboard", "wandb", "checkpoints", "eval.json", "curve.png", FAILED)
FINISHED = "finished.json"  # in the folder of a sweep's or a study's program, once nothing of it is left to run
RUNS = "runs.json"  # in a folder of many runs: their names
PACKAGES = "rlx jax jaxlib flax optax numpy orbax-checkpoint brax mujoco mujoco-mjx playground gymnax".split()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: whoever reads `path`, at any moment, finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may write it too
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def run_directories(path: str | os.PathLike[str]) -> list[Path]:
    """The run directories in a folder of many runs, or `path` itself. Raises UserError for a damaged list."""
    folder = Path(path).absolute()
    file = folder / RUNS
    if not file.is_file():
        return [folder]
    try:
        return [folder / str(name) for name in json.loads(file.read_text())["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(file)!r} is damaged: {error!r}.") from error


def group_of(path: str | os.PathLike[str]) -> Path | None:
    """The folder of many runs, trained as one program, that a run directory is one of; None for a run alone."""
    folder = Path(path).absolute()
    whole = folder.parent
    return whole if (whole / RUNS).is_file() and folder in run_directories(whole) else None


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
                        raise storage.BusyError(text) from error
                time.sleep(0.5)
        yield
    finally:
        os.close(handle)


class RunDirectory:
    """One run on disk: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `eval.json`, `curve.png`."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        self.config = config
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints_path = path / "checkpoints"
        self.tensorboard_path = path / "tensorboard"

    @staticmethod
    def check_free(path: str | os.PathLike[str], overwrite: bool = False) -> list[str]:
        """What the folder holds now. Raises UserError for a run (unless `overwrite`) and for anything else."""
        folder = Path(path).absolute()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run directory {str(folder)!r} is a file; name another.")
        present = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.exists() else []
        if "config.json" in present and not overwrite:
            name = os.fspath(storage.home(folder))
            raise UserError(f"{name!r} already holds a run: use `rlx resume {name}`, or --overwrite.")
        if present and "config.json" not in present:
            names = ", ".join(present[:4])
            raise UserError(f"{str(folder)!r} is not empty and holds no run ({names}); name another run directory.")
        return present

    @staticmethod
    def create(path: str | os.PathLike[str], config: Mapping[str, Any], overwrite: bool = False) -> RunDirectory:
        """Makes the folder and its `config.json`: `config`, plus "format" and "versions".

        Raises UserError as `check_free` does. `overwrite` removes what a run writes and nothing more.
        """
        folder = Path(path).absolute()
        present = RunDirectory.check_free(folder, overwrite)
        for name in present:
            if name in OWN_FILES:
                target = folder / name
                shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        if present:
            storage.clear(folder, sorted(OWN_FILES, key="config.json".__eq__))  # without it the rest belongs to no run
        folder.mkdir(parents=True, exist_ok=True)
        full = {**config, "format": FORMAT, "versions": versions()}
        write_atomically(folder / "config.json", json.dumps(full, indent=2) + "\n")
        return RunDirectory(folder, json.loads(json.dumps(full)))

    @staticmethod
    def open(path: str | os.PathLike[str]) -> RunDirectory:
        """An existing run. Raises UserError if there is none, or if its `config.json` cannot be read."""
        folder = Path(path).absolute()
        file = folder / "config.json"
        if not file.is_file():
            what = "holds no run (no config.json)" if folder.is_dir() else "does not exist"
            inside = sorted(path.parent.name for path in folder.glob(f"*/{RUNS}"))
            what += f"; name one of the folders of runs in it: {', '.join(inside)}" if inside else ""
            raise UserError(f"run directory {str(folder)!r} {what}.")
        try:
            config = json.loads(file.read_text())
            found = int(config["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(file)!r} is damaged: {error!r}.") from error
        if found != FORMAT:
            raise UserError(f"{str(file)!r} has format {found}; this version of rlx reads format {FORMAT}.")
        return RunDirectory(folder, config)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; null becomes NaN. A torn last line is left out, as after a kill.

    Raises UserError if there is no such file, or if a line before the last cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{str(file)!r} does not exist.")
    rows = []
    lines = file.read_bytes().split(b"\n")  # what follows the last line break is torn, or nothing
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row.pop("step")), **{k: math.nan if v is None else v for k, v in row.items()}})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"line {number} of {str(file)!r} is damaged: {error!r}.") from error
    return rows


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
        for name in ("train/return", "eval/return"):
            if math.isfinite(metrics.get(name, math.nan)):
                self._shown[name] = metrics[name]
        left = (self.total_steps - step) / steps_per_second if steps_per_second > 0 else math.inf
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
