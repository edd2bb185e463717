"""The host's side of a run: rows of metrics, evaluations, checkpoints. Gives nothing back to the program."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from rlx.algorithm import LearnerState, Policy
from rlx.checkpoint import Checkpointer, first_nonfinite
from rlx.distributed import is_first, on_first
from rlx.errors import NonFiniteError, UserError
from rlx.evaluation import EvalResult
from rlx.files import write_atomically
from rlx.logging import JsonlWriter, Progress, TensorboardWriter, WandbWriter, Writer
from rlx.plotting import plot
from rlx.run_directory import RunDirectory, read_metrics
from rlx.storage import Mirror, put


class Recorder:
    """Takes what an epoch measured and the state after it to every place that keeps some of it."""

    def __init__(self, steps_per_iteration: int, progress: Progress):
        self.history: list[dict[str, float]] = []  # the rows of metrics.jsonl
        self.writers: list[Writer] = []
        self._steps_per_iteration, self._progress = steps_per_iteration, progress
        self._directory: RunDirectory | None = None
        self._checkpointer: Checkpointer | None = None
        self._mirror: Mirror | None = None
        self._start_phases = dict(progress.phases)
        self._started = self._last_ready = time.perf_counter()
        self._last_iteration = 0
        self._row: dict[str, float] = {}

    def open(
        self,
        stack: contextlib.ExitStack,
        directory: RunDirectory,
        keep: int,
        resume: bool,
        abstract_state: Any,
    ) -> Any:
        """Records into `directory` from here on; `stack` closes the files.

        Returns the state of the newest whole checkpoint if `resume` finds one, and cuts the logs behind it; else None.
        """
        self._mirror = Mirror(directory.path)
        on_first(self._mirror.upload)
        self._checkpointer = open_checkpoints(directory, keep)
        stack.callback(self._checkpointer.close)
        state, step = None, None
        if resume:
            state, step = restore_newest(self._checkpointer, abstract_state, self._progress)
        self.attach(stack, directory, step)
        return state

    def attach(self, stack: contextlib.ExitStack, directory: RunDirectory, step: int | None) -> None:
        """Writes rows and evaluations into `directory`, no checkpoints; `step` cuts what lies behind a restored one.

        Of several processes the first one alone writes.
        """
        if step is not None and directory.metrics_path.exists():
            self.history = [row for row in read_metrics(directory.metrics_path) if row["step"] <= step]
        if not is_first():
            return
        self._directory = directory
        self.writers += [
            JsonlWriter(directory.metrics_path, step),
            TensorboardWriter(directory.tensorboard_path, step),
        ]
        if directory.config.get("wandb"):
            self.writers.append(WandbWriter(directory, directory.config["wandb"], step))
        for writer in self.writers:
            stack.callback(writer.close)

    def begin(self, iteration: int) -> None:
        """Training starts here, at `iteration`."""
        self._last_iteration = iteration
        self._started = self._last_ready = time.perf_counter()

    @staticmethod
    def time_if_ready(metrics: Any) -> float | None:
        """Now, if an epoch has ended by the time its dispatch returned, as on a CPU with callbacks; else None."""
        return time.perf_counter() if all(leaf.is_ready() for leaf in jax.tree.leaves(metrics)) else None

    def epoch(self, iteration: int, metrics: Any, ended: float | None, learner: LearnerState) -> None:
        """Waits for an epoch's metrics (`rlx.epoch.EpochMetrics`), checks that they are finite, fills the row.

        `ended`: when it ended, if that is known.
        """
        metrics = jax.device_get(metrics)
        now = ended or time.perf_counter()
        self._check_finite(iteration, metrics, learner)
        rate = (self.step(iteration) - self.step(self._last_iteration)) / (now - self._last_ready)
        self._last_iteration, self._last_ready = iteration, now
        stats, count = metrics.stats, metrics.iterations
        row = {f"train/{k}": float(v / count) for k, v in metrics.train.items()}
        row |= {f"train/{k}": float(v / count) for k, v in stats.info.items()}
        row["train/episodes"] = float(stats.episodes)
        if stats.episodes:
            row["train/return"] = float(stats.returns / stats.episodes)
            row["train/length"] = float(stats.lengths / stats.episodes)
        self._row |= row | {"time/steps_per_second": rate, "time/elapsed": now - self._started}

    def _check_finite(self, iteration: int, metrics: Any, learner: LearnerState) -> None:
        ends = f"in the epoch that ended at iteration {iteration}"
        for leaf, index in metrics.stats.nonfinite.items():
            if index >= 0:
                raise NonFiniteError(f"Environment {index} gave a value that is not finite in {leaf} {ends}.")
        for name, value in metrics.train.items():
            if not np.isfinite(value):
                leaf = first_nonfinite(learner)
                where = f"; first leaf of the learner not finite: {leaf}" if leaf else ""
                raise NonFiniteError(f"{name} is {value} {ends}{where}.")

    def evaluation(self, iteration: int, result: EvalResult, policy: Policy) -> None:
        """Writes eval.json, keeps the policy if it is the best so far, and puts the returns in the row."""
        returns, lengths = np.asarray(result.returns), np.asarray(result.lengths)
        step = self.step(iteration)
        if self._directory:
            mode = self._directory.config["train"].get("eval_mode", "greedy")
            entry = {"step": step, "mode": mode, "physics": self._directory.config.get("physics", "")}
            write_atomically(self._directory.path / "eval.json", json.dumps(entry | episodes(result)))
        if self._checkpointer:
            self._checkpointer.save_best(step, policy, float(returns.mean()))
        mean, std = float(returns.mean()), float(returns.std())
        self._row |= {"eval/return": mean, "eval/return_std": std, "eval/length": float(lengths.mean())}
        if result.diverged is not None:
            self._row["eval/diverged"] = float(np.mean(result.diverged))
        if result.agent_returns is not None:
            means = np.asarray(result.agent_returns).mean(axis=0)
            self._row |= {f"eval/return_agent_{i}": float(mean) for i, mean in enumerate(means)}

    def write(self, iteration: int) -> dict[str, float]:
        """Sends the row to every writer and to the progress display. The first one holds the seconds of the start."""
        step = self.step(iteration)
        row = self._row | {f"time/{name}": seconds for name, seconds in self._start_phases.items()}
        self._row, self._start_phases = {}, {}
        for writer in self.writers:
            writer.write(step, row)
        self.history.append({"step": step, **row})
        if is_first():
            mirror(self._mirror, self._progress)
        self._progress.update(step, row.get("time/steps_per_second", 0.0), row)
        return self.history[-1]

    def save(self, iteration: int, state: Any) -> None:
        """Copies a `rlx.epoch.TrainState` and writes it in the background."""
        if self._checkpointer:
            leaf = first_nonfinite(state.learner)
            if leaf:
                raise NonFiniteError(f"The learner is not finite at iteration {iteration}: {leaf}. Nothing was saved.")
            if self._mirror:
                on_first(self._mirror.upload)  # a checkpoint must never be ahead of the logs
            self._checkpointer.save(self.step(iteration), state)

    def resume_clock(self) -> None:
        """What the host did since the last epoch (evaluation, saving) does not count as training time."""
        self._last_ready = time.perf_counter()

    def step(self, iteration: int) -> int:
        return iteration * self._steps_per_iteration


def mirror(logs: Mirror | None, progress: Progress) -> None:
    """Uploads logs that belong on object storage; while it is out of reach they wait for the next visit."""
    failed = logs.try_upload() if logs else ""
    if failed:
        progress.message(f"the logs are not uploaded, which is tried again: {failed}")


def episodes(result: EvalResult) -> dict[str, list[Any]]:
    """What eval.json holds of an evaluation, one entry an episode; `diverged` only where the environment tells,
    `agent_returns`, a list an episode, only where it pays its agents apart."""
    return {name: np.asarray(value).tolist() for name, value in result._asdict().items() if value is not None}


def open_checkpoints(directory: RunDirectory, keep: int) -> Checkpointer:
    """A run's checkpoints; each records whose it is."""
    metadata = {name: directory.config[name] for name in ("algorithm", "env")}
    return Checkpointer(directory.checkpoints_path, keep, metadata)


def restore_newest(
    checkpointer: Checkpointer, abstract: Any, progress: Progress, expect: Iterable[str] = ("algorithm", "env")
) -> tuple[Any, int]:
    """What the newest whole checkpoint holds, and its step; None and -1 where there is none yet."""
    if checkpointer.empty():
        progress.message("no checkpoint yet: starting from the beginning")
        return None, -1
    found, step = checkpointer.restore(abstract, expect=expect)
    progress.message(f"resuming at step {step}")
    return found, step


def draw_curve(directory: RunDirectory, progress: Progress) -> None:
    """curve.png, where the run is; one without returns, or a disk that is full by now, is no reason to fail."""
    try:
        plot([directory.path], directory.path / "curve.png")
        put(directory.path / "curve.png")
    except (UserError, OSError) as error:
        progress.message(f"no curve.png: {error}")
