"""Many runs in one program: what may differ between them, and the host's side, which records each as if it were alone.

Leaves of the state and of everything the program gives are [K, ...]; the iteration alone is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlx import storage
from rlx.algorithm import LearnerState, Policy
from rlx.checkpoint import Checkpointer
from rlx.errors import NonFiniteError, UserError, check_seed, require
from rlx.evaluation import EvalResult
from rlx.files import RUNS, write_atomically
from rlx.logging import Progress
from rlx.recording import Recorder, mirror, open_checkpoints, restore_newest
from rlx.records import check_same_settings
from rlx.rollout import where_done
from rlx.run_directory import FAILED, OWN_FILES, RunDirectory, read_metrics, run_directories
from rlx.types import PyTree


def check_free(run_dir: str | Path, names: Sequence[str], overwrite: bool) -> None:
    """Raises UserError where `run_dir` holds runs, unless `overwrite`, or anything else."""
    folder = Path(run_dir).absolute()
    if (folder / "config.json").exists():
        raise UserError(f"{str(folder)!r} holds a single run; name another folder for many.")
    if not (folder / RUNS).is_file():
        RunDirectory.check_free(folder)
    elif not overwrite:
        name = os.fspath(storage.home(folder))
        raise UserError(f"{name!r} already holds runs: use `rlx resume {name}`, or --overwrite.")
    for name in names:
        RunDirectory.check_free(folder / name, overwrite)


def check_names(run_dir: str | Path, names: Sequence[str]) -> None:
    """Raises UserError where `run_dir` does not hold the runs that are to be resumed."""
    folder = Path(run_dir).absolute()
    if not (folder / RUNS).is_file():
        what = "holds no runs of one program" if folder.is_dir() else "does not exist"
        raise UserError(f"run directory {str(folder)!r} {what} (no {RUNS}).")
    found = [path.name for path in run_directories(folder)]
    require(found == list(names), "runs", list(names), f"those that {str(folder)!r} was begun with: {found}")


def create(run_dir: str | Path, descriptions: Mapping[str, Mapping[str, Any]], overwrite: bool) -> list[RunDirectory]:
    """A run directory for each name, and the list of them. Raises UserError as `check_free` does."""
    folder = Path(run_dir).absolute()
    check_free(folder, list(descriptions), overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of the runs that these replace
    storage.clear(folder, ["checkpoints"])
    for old in run_directories(folder) if (folder / RUNS).is_file() else ():
        if old.is_dir() and set(os.listdir(old)) <= {*OWN_FILES}:
            shutil.rmtree(old)
            storage.clear(folder, [old.name])
    write_atomically(folder / RUNS, json.dumps({"runs": list(descriptions)}) + "\n")
    return [RunDirectory.create(folder / name, entries, overwrite) for name, entries in descriptions.items()]


def reopen(run_dir: str | Path, descriptions: Mapping[str, Mapping[str, Any]]) -> list[RunDirectory]:
    """Those of a program that is to go on. Raises UserError where they are others, or were begun otherwise."""
    check_names(run_dir, list(descriptions))
    found = []
    for name, description in descriptions.items():
        folder = Path(run_dir) / name
        if not (folder / "config.json").exists():  # a kill may have come before all were made
            RunDirectory.create(folder, description)
        found.append(RunDirectory.open(folder))
        check_same_settings(found[-1].config, description)
    return found


@contextlib.contextmanager
def traced(varied: Mapping[str, jax.Array]) -> Iterator[None]:
    """Raises UserError where an algorithm cannot be traced with settings of its Config that are arrays."""
    try:
        yield
    except jax.errors.JAXTypeError as error:
        if not varied:
            raise
        raise UserError(
            f"runs that differ in {', '.join(f'algo.{name}' for name in varied)} could not be traced as one program. "
            "Does the algorithm decide on it in Python (`if`, `float()`, a shape)? Floats of a Config may only enter "
            f"jax's functions. {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def varied_settings(runs: Mapping[str, tuple[Any, Any]]) -> tuple[Any, Any, dict[str, jax.Array]]:
    """What K runs share, a TrainConfig and a Config, and the fields of Config in which they differ, [K] float32.

    Raises UserError where they differ in what one program cannot vary.
    """
    require(bool(runs), "runs", dict(runs), "at least one")
    for name in runs:
        require(bool(name) and name == name.strip("./ ") and "/" not in name, "run", name, "the name of a folder")
    trains, configs = zip(*runs.values(), strict=True)
    for of_run in trains:
        check_seed(of_run.seed)
    hints = typing.get_type_hints(type(configs[0]))
    differing = [field for field in hints if any(getattr(c, field) != getattr(configs[0], field) for c in configs)]
    fixed = [f"algo.{field}" for field in differing if hints[field] is not float]
    train_fields = [field.name for field in dataclasses.fields(trains[0]) if field.name != "seed"]
    fixed += [field for field in train_fields if any(getattr(t, field) != getattr(trains[0], field) for t in trains)]
    if fixed:
        raise UserError(
            f"{fixed[0]} differs between the runs: in one program those may differ in the seed and in numbers of the "
            "algorithm's Config (floats); train the others one after another."
        )
    varied = {field: jnp.asarray([getattr(c, field) for c in configs], jnp.float32) for field in differing}
    return trains[0], configs[0], varied


def take(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda x: x[index], tree)


def unstack(tree: PyTree, count: int) -> list[PyTree]:
    """The parts of leaves [count, ...], as arrays on the host (keys on the first device).

    Indexed where they lie, on several devices, each part would be gathered on all of them.
    """

    def parts(leaf: jax.Array) -> list[Any]:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return list(jax.device_get(leaf))
        rows = jax.device_get(jax.random.key_data(leaf))
        return [jax.random.wrap_key_data(jnp.asarray(row), impl=jax.random.key_impl(leaf)) for row in rows]

    leaves, structure = jax.tree.flatten(tree)
    each = zip(*map(parts, leaves), strict=True) if leaves else [()] * count
    return [jax.tree.unflatten(structure, own) for own in each]


def of_each(state: Any) -> list[Any]:
    """The runs of a TrainState that holds many, as if each were alone; where one was stopped, as it was then.

    But for what its learner keeps of the past, which went on (`rlx.epoch.stop_nonfinite`).
    """
    stopped = state.stopped.tolist()
    kept = unstack((state.learner, state.source, state.key), len(stopped))
    iterations = [int(state.iteration) if at < 0 else at for at in stopped]
    return [
        state._replace(learner=learner, source=source, key=key, iteration=jnp.asarray(at, jnp.int32), stopped=None)
        for (learner, source, key), at in zip(kept, iterations, strict=True)
    ]


class Best(NamedTuple):
    """The best evaluation of each run so far."""

    policy: Policy  # [K, ...]
    value: jax.Array  # [K] float32, -inf before the first
    step: jax.Array  # [K, 2] uint32: low and high word


@jax.jit
def better(new: Best, old: Best) -> Best:
    """Of each run."""
    return where_done(new.value > old.value, new, old)


class GroupRecorder:
    """A `rlx.recording.Recorder` for many runs; each has one of its own in `members`.

    A run that is not finite stays as it was before (`rlx.epoch.stop_nonfinite`) and is recorded no further; `failed`
    says why. While they train there is one checkpoint of all, for a hundred small ones would take longer than the
    training; at the end each run gets its own.
    """

    def __init__(self, names: Sequence[str], steps_per_iteration: int, progress: Progress):
        quiet = Progress(quiet=True)
        quiet.phases = dict(progress.phases)
        self.members = {name: Recorder(steps_per_iteration, quiet) for name in names}
        self.failed: dict[str, str] = {}
        self._directories: dict[str, RunDirectory] = {}
        self._checkpointer: Checkpointer | None = None
        self._mirror: storage.Mirror | None = None
        self._best: Any = None  # `Best`, where runs are recorded
        self._keep = 1
        self._progress, self._steps_per_iteration = progress, steps_per_iteration

    def open(
        self,
        stack: contextlib.ExitStack,
        directories: Sequence[RunDirectory],
        keep: int,
        resume: bool,
        abstract_state: Any,
        abstract_policy: Policy,
    ) -> Any:
        """As `Recorder.open`. The checkpoints of all runs together lie beside their directories."""
        self._directories, self._keep = dict(zip(self.members, directories, strict=True)), keep
        self._best = Best(
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_policy),
            jnp.full(len(self.members), -jnp.inf, jnp.float32),
            jnp.zeros((len(self.members), 2), jnp.uint32),
        )
        first = directories[0]
        metadata = {name: first.config[name] for name in ("algorithm", "env")} | {"runs": list(self.members)}
        self._mirror = storage.Mirror(first.path.parent)
        self._mirror.upload()
        self._checkpointer = Checkpointer(first.path.parent / "checkpoints", keep, metadata)
        stack.callback(self._checkpointer.close)
        state, step = None, None
        if resume:
            abstract = (abstract_state, jax.eval_shape(lambda: self._best))
            found, step = restore_newest(self._checkpointer, abstract, self._progress, ("algorithm", "env", "runs"))
            state, self._best = found or (None, self._best)
        for index, (name, directory) in enumerate(self._directories.items()):
            file = directory.path / FAILED
            if state is not None and file.exists() and state.stopped[index] >= 0:
                self.failed[name] = json.loads(file.read_text())["error"]
                self.members[name].history = read_metrics(directory.metrics_path)
                continue
            file.unlink(missing_ok=True)  # it met it behind the checkpoint, and will again
            self.members[name].attach(stack, directory, step)
        self.check_any()
        return state

    def _live(self) -> list[str]:
        return [name for name in self.members if name not in self.failed]

    def _fail(self, name: str, iteration: int, error: NonFiniteError) -> None:
        self.failed[name] = str(error)
        self._progress.message(f"{name} is stopped, the others go on: {error}")
        if self._directories:
            entry = {"step": iteration * self._steps_per_iteration, "error": str(error)}
            write_atomically(self._directories[name].path / FAILED, json.dumps(entry) + "\n")

    def check_any(self) -> None:
        """Raises NonFiniteError where every run has failed."""
        if not self._live():
            raise NonFiniteError("; ".join(f"{name}: {error}" for name, error in self.failed.items()))

    def begin(self, iteration: int) -> None:
        for member in self.members.values():
            member.begin(iteration)

    time_if_ready = staticmethod(Recorder.time_if_ready)

    def epoch(self, iteration: int, metrics: Any, ended: float | None, learner: LearnerState) -> None:
        metrics = jax.device_get(metrics)
        for index, (name, member) in enumerate(self.members.items()):
            if name not in self.failed:
                try:
                    member.epoch(iteration, take(metrics, index), ended, ())  # no learner: it was taken back
                except NonFiniteError as error:
                    self._fail(name, iteration, error)

    def evaluation(self, iteration: int, result: EvalResult, policy: Policy) -> None:
        result = jax.device_get(result)
        for index, (name, member) in enumerate(self.members.items()):
            if name not in self.failed:
                member.evaluation(iteration, take(result, index), ())
        if self._best is not None:
            step = iteration * self._steps_per_iteration
            words = jnp.asarray([[step % 2**32, step >> 32]], jnp.uint32).repeat(len(self.members), axis=0)
            live = np.array([name not in self.failed for name in self.members])
            value = np.where(live & np.isfinite(result.returns).all(axis=1), result.returns.mean(axis=1), -np.inf)
            self._best = better(Best(policy, jnp.asarray(value, jnp.float32), words), self._best)

    def write(self, iteration: int) -> dict[str, dict[str, float]]:
        rows = {name: self.members[name].write(iteration) for name in self._live()}
        mirror(self._mirror, self._progress)
        shown = {}
        for key in ("train/return", "eval/return", "time/steps_per_second"):
            values = [row[key] for row in rows.values() if key in row]
            if values:
                shown[key] = float(np.mean(values))
        rate = shown.pop("time/steps_per_second", 0.0)
        self._progress.update(iteration * self._steps_per_iteration, rate, shown)
        return rows

    def save(self, iteration: int, state: Any) -> None:
        for name, stopped in zip(self.members, state.stopped.tolist(), strict=True):
            if stopped >= 0 and name not in self.failed:  # no metric showed it
                self._fail(name, iteration, NonFiniteError("the learner is not finite"))
        if self._checkpointer and self._mirror:
            self._mirror.upload()
            self._checkpointer.save(iteration * self._steps_per_iteration, (state, self._best))

    def save_each(self, states: Sequence[Any]) -> None:
        """Every run's state and best policy in its own directory, as a run alone leaves them."""
        if self._mirror:
            self._mirror.upload()
        each = unstack(self._best, len(states)) if self._directories else ()
        for directory, own, best in zip(self._directories.values(), states, each, strict=False):
            keeper = open_checkpoints(directory, self._keep)
            keeper.save(int(own.iteration) * self._steps_per_iteration, own)
            if np.isfinite(best.value):
                keeper.save_best(int(best.step[0]) + (int(best.step[1]) << 32), best.policy, float(best.value))
            keeper.close()

    def resume_clock(self) -> None:
        for member in self.members.values():
            member.resume_clock()
