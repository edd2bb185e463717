"""Statistics of evaluation scores over runs and tasks (Agarwal et al. 2021, arXiv 2108.13264). Host side, numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from rlx.errors import UserError

Statistic = Callable[[np.ndarray], Any]


class Summary(NamedTuple):
    """Of runs; NaN where there are too few of them."""

    mean: float
    sd: float  # over runs, unbiased, averaged over tasks
    iqm: float
    low: float  # ends of the 95 % bootstrap interval of the IQM
    high: float


class Band(NamedTuple):
    """A statistic at many points, [points] each, and the ends of its interval at each of them."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def as_scores(x: Any, min_runs: int = 1) -> np.ndarray:
    """`x` as float64 [runs, tasks]; UserError if it is none."""
    try:
        scores = np.asarray(x)
    except ValueError as error:
        raise UserError(f"scores must be of shape [runs, tasks], with the same runs for every task: {error}") from None
    if scores.ndim != 2 or scores.size == 0 or not np.issubdtype(scores.dtype, np.number):
        raise UserError(f"scores must be numbers of shape [runs, tasks], got {scores.dtype} {list(scores.shape)}.")
    if not np.isfinite(scores).all():
        run, task = np.argwhere(~np.isfinite(scores))[0]
        raise UserError(f"scores must be finite, got {scores[run, task]} in run {run} of task {task}.")
    if scores.shape[0] < min_runs:
        raise UserError(f"scores of at least {min_runs} runs are needed here, got {scores.shape[0]}.")
    return scores.astype(np.float64)


def check_resampling(confidence: float, num_resamples: int) -> None:
    """Raises UserError for settings of an interval that cannot be."""
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence must lie between 0 and 1, got {confidence}.")
    if num_resamples < 1:
        raise UserError(f"num_resamples must be at least 1, got {num_resamples}.")


def iqm(x: Any) -> float:
    """Interquartile mean: the mean of the middle half of all scores [runs, tasks].

    A quarter of the scores, rounded down, is dropped at either end (fewer than four scores: none, the mean).
    """
    return float(scipy.stats.trim_mean(as_scores(x), 0.25, axis=None))


def stratified_bootstrap_interval(
    x: Any, statistic: Statistic = iqm, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic`, stratified by task.

    What is resampled is a whole run (all that one seed gave on one task), with replacement and separately within each
    task: episodes of one run are not independent, and runs of different tasks are not exchangeable.

    Args:
      x: scores [runs, tasks], at least two runs; one number a run (the mean of its evaluation episodes).
      statistic: [runs, tasks] -> a number.

    Returns:
      low and high. Raises UserError for other shapes, values that are not finite, or settings out of range.
    """
    scores = as_scores(x, min_runs=2)
    check_resampling(confidence, num_resamples)
    interval = scipy.stats.bootstrap(
        tuple(scores.T),
        lambda *tasks: statistic(np.stack(tasks, axis=-1)),
        n_resamples=num_resamples,
        confidence_level=confidence,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def summary(x: Any, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> Summary:
    """Mean, standard deviation over runs, IQM and its interval, of scores [runs, tasks] of at least two runs."""
    scores = as_scores(x, min_runs=2)
    interval = stratified_bootstrap_interval(scores, iqm, confidence, num_resamples, seed)
    return Summary(float(scores.mean()), float(scores.std(axis=0, ddof=1).mean()), iqm(scores), *interval)


def performance_profile(
    x: Any, thresholds: Any, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Band:
    """The fraction of runs, over runs and tasks, that score above each of `thresholds`, with its bootstrap band.

    The band is a percentile interval at each threshold by itself, stratified by task as
    `stratified_bootstrap_interval` is. Raises UserError as that does, and for thresholds that are not [points].
    """
    scores = as_scores(x, min_runs=2)
    check_resampling(confidence, num_resamples)
    points = np.asarray(thresholds, np.float64)
    if points.ndim != 1 or not points.size:
        raise UserError(f"thresholds must be of shape [points], got {list(points.shape)}.")
    num_runs, num_tasks = scores.shape
    above = (scores.T[:, :, None] > points).reshape(num_tasks * num_runs, points.size).astype(np.float64)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=(num_resamples, num_tasks))
    resampled = times.reshape(num_resamples, -1) @ above / scores.size
    return Band(above.mean(axis=0), *_ends(resampled, confidence))


def iqm_band(x: Any, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0) -> Band:
    """IQM over runs at each point of a curve [runs, points], and its percentile bootstrap interval.

    A resampled run brings its whole curve. Raises UserError as `stratified_bootstrap_interval` does.
    """
    curves = as_scores(x, min_runs=2)
    check_resampling(confidence, num_resamples)
    num_runs = curves.shape[0]
    drawn = np.random.default_rng(seed).integers(0, num_runs, size=(num_resamples, num_runs))
    return Band(_middle(curves), *_ends(_middle(curves[drawn]), confidence))


def _middle(x: np.ndarray) -> np.ndarray:
    """IQM over the axis before the last, as `iqm` trims."""
    cut = x.shape[-2] // 4
    return np.sort(x, axis=-2)[..., cut : x.shape[-2] - cut, :].mean(axis=-2)


def _ends(resampled: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return low, high
