"""What the runs of a study came to, read from their run directories, and how it stands to its references. Free of jax.

The score of a run is the mean return of its last evaluation, after its last step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlx.errors import require
from rlx.files import RUNS
from rlx.run_directory import FAILED, FINISHED, RunDirectory, read_metrics, run_directories
from rlx.statistics import Summary, iqm_band
from rlx.study import Program, Reference, Study, Task, run_name

FLOOR = "the reference's interval reaches the lowest score"
CLOSE = 0.01  # budgets that differ by this share are the same


class RunResult(NamedTuple):
    """One seed."""

    seed: int
    steps: tuple[int, ...]  # of its evaluations
    returns: tuple[float, ...]
    error: str  # of a NaN or an infinity; empty where it finished
    minutes: tuple[float, ...] = ()  # of training before each evaluation, of all runs of the program together

    @property
    def score(self) -> float:
        return self.returns[-1] if self.returns and not self.error else math.nan


class Result(NamedTuple):
    """One program: an algorithm on an environment."""

    program: Program
    state: str  # missing, begun, finished
    runs: tuple[RunResult, ...] = ()
    recorded: Mapping[str, Any] = {}  # config.json of the first run
    minutes: float = 0.0  # of training, evaluations between the first and the last included, of all runs together
    steps_per_second: float = math.nan  # of training, of all runs together; the median over epochs

    @property
    def steps(self) -> int:
        """Environment steps of each run."""
        return max((run.steps[-1] for run in self.runs if run.steps), default=0)

    @property
    def scores(self) -> np.ndarray:
        """[finished runs]"""
        found = np.array([run.score for run in self.runs], np.float64)
        return found[np.isfinite(found)]

    @property
    def failed(self) -> list[RunResult]:
        return [run for run in self.runs if run.error]


class Verdict(NamedTuple):
    word: str  # within, better, worse, not comparable; empty: not finished
    reason: str


def read(program: Program, out: Path) -> Result:
    """The runs of a program below the folder of the study's size. Raises UserError for damaged files."""
    place = out / program.folder
    if not (place / RUNS).is_file():
        return Result(program, "missing")
    names = [path.name for path in run_directories(place)]
    wanted = [run_name(seed) for seed in program.seeds]
    require(names == wanted, f"runs of {program.title}", wanted, f"{str(place)!r} holds {names}; name another --out")
    finished = (place / FINISHED).is_file()
    runs, clocks, rates = [], [], []
    recorded: dict[str, Any] = {}
    for seed in program.seeds:
        folder = place / run_name(seed)
        if not (folder / "config.json").is_file():
            continue
        recorded = recorded or RunDirectory.open(folder).config
        rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        every = [row for row in rows if "eval/return" in row]
        evaluated = [row for row in every if math.isfinite(row["eval/return"])]
        clock = dict(zip((row["step"] for row in rows), clock_of(rows), strict=True))
        minutes = tuple(clock[row["step"]] for row in evaluated)
        steps, returns = (tuple(row[key] for row in evaluated) for key in ("step", "eval/return"))
        failure = folder / FAILED
        error = json.loads(failure.read_text())["error"] if failure.is_file() else ""
        if every and every[-1] not in evaluated:
            error = error or "its last evaluation is not finite"
        runs.append(RunResult(seed, tuple(int(step) for step in steps), returns, error, minutes))
        clocks.append(minutes_of(rows))
        rates += [row["time/steps_per_second"] for row in rows if "time/steps_per_second" in row]
    rate = float(np.median(rates)) * len(runs) if rates else math.nan
    state = "finished" if finished and runs else "begun"
    return Result(program, state, tuple(runs), recorded, max(clocks, default=0.0), rate)


def clock_of(rows: Iterable[Mapping[str, float]]) -> list[float]:
    """Minutes of training up to each row of a run, whose own clock starts anew where it was resumed, as does what it
    says of compiling."""
    found = []
    total = last = 0.0
    for row in rows:
        now = row.get("time/elapsed", 0.0)
        if "time/compiling" in row or now < last:
            total, last = total + last, 0.0
        last = max(last, now)
        found.append((total + last) / 60)
    return found


def minutes_of(rows: Iterable[Mapping[str, float]]) -> float:
    """Minutes of training of a run."""
    return max(clock_of(rows), default=0.0)


def statistics(result: Result) -> Summary:
    """Mean, sd and IQM of a program's scores, with the interval of the last."""
    scores = result.scores[:, None]
    if not scores.size:
        return Summary(*[math.nan] * 5)
    if len(scores) == 1:
        return Summary(float(scores.mean()), math.nan, float(scores.mean()), math.nan, math.nan)
    middle = iqm_band(scores)
    ends = (float(value[0]) for value in middle)
    return Summary(float(scores.mean()), float(scores.std(ddof=1)), *ends)


def reference_interval(reference: Reference, task: Task, tolerance: float) -> tuple[float, float]:
    """value -+ sd; value -+ `tolerance` times |value|, or a fifth of the task's range, where the sd is not known or 0.

    The sd over runs, not the standard error of their mean: how many runs there were is rarely known, and the question
    is whether our mean could be one more run of theirs.
    """
    half = reference.sd or tolerance * max(abs(reference.value), (task.high - task.low) / 5)
    return reference.value - half, reference.value + half


def verdict(result: Result, scores: Summary, study: Study) -> Verdict:
    """How a program's mean stands to the interval of its reference (`reference_interval`), and the reason.

      better, within, worse   our mean lies above, inside (ends included), below the interval
      not comparable          there is no reference; a run failed; or our runs are within or better with more steps
                              than the reference's. Fewer steps are no excuse and no obstacle: the reason names them.

    Budgets that differ by 1 % are the same. The reason also says where better or worse is not clear, because the 95 %
    interval of our IQM overlaps the reference's interval, or within, because it reaches below; where the verdict says
    little, because that interval reaches the task's lowest score; and where a tolerance stood for the sd.
    """
    reference = study.references.get((result.program.variant, result.program.env))
    if result.state != "finished":
        return Verdict("", "not finished")
    if result.failed:
        return Verdict("not comparable", f"{len(result.failed)} of {len(result.runs)} runs met a NaN or an infinity")
    if reference is None:
        return Verdict("not comparable", "no reference")
    if not result.scores.size:
        return Verdict("not comparable", "no evaluation")
    task = study.environments[result.program.env]
    low, high = reference_interval(reference, task, study.tolerance)
    word = "worse" if scores.mean < low else "better" if scores.mean > high else "within"
    budget = reference.steps or 0
    fewer, more = result.steps < (1 - CLOSE) * budget, budget and result.steps > (1 + CLOSE) * budget
    if more and word != "worse":
        return Verdict(
            "not comparable", f"{word}, but with {short(result.steps)} steps; the reference took {short(budget)}"
        )
    reasons = []
    if fewer:
        missing = ": budget missing" if word == "worse" else ""
        reasons.append(f"at {short(result.steps)} of {short(budget)} steps{missing}")
    elif word == "worse" and budget:
        reasons.append("with the reference's budget")
    if word != "within" and scores.low <= high and scores.high >= low:
        reasons.append("not clear: the intervals overlap")
    if word == "within" and scores.low < low:
        reasons.append("not clear: our interval reaches below")
    if low <= task.low:
        reasons.append(FLOOR)
    if not reference.sd:
        reasons.append(f"sd {'not known' if reference.sd is None else '0'}, {(high - low) / 2:.3g} taken")
    return Verdict(word, "; ".join(reasons if budget else [*reasons, "the reference's budget is not known"]))


def short(steps: int) -> str:
    """Steps as people say them: 60M, 4.99M, 32k."""
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        rounded = float(f"{steps / size:.3g}")
        if rounded >= 1:
            return f"{rounded:g}{unit}"
    return str(steps)


def complete(results: Sequence[Result], study: Study) -> list[str]:
    """The environments on which every algorithm of the study has finished, in the study's order."""
    done = {(result.program.variant, result.program.env) for result in results if result.state == "finished"}
    return [env for env in study.environments if all((name, env) in done for name in study.algorithms)]


def score_matrix(results: Sequence[Result], study: Study, variant: str, environments: Sequence[str]) -> np.ndarray:
    """Normalised scores [runs, tasks] of an algorithm. A run that failed counts as the lowest score, 0: to leave it
    out would reward what fails."""
    columns = []
    for env in environments:
        (result,) = (r for r in results if (r.program.variant, r.program.env) == (variant, env))
        task = study.environments[env]
        scores = [task.low if not math.isfinite(run.score) else run.score for run in result.runs]
        columns.append([(score - task.low) / (task.high - task.low) for score in scores])
    return np.array(columns, np.float64).T
