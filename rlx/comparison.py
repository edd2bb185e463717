"""Whether one algorithm is better than another, from the scores of their runs. Host side, numpy.

Scores are [runs, tasks], one number a run (the mean of its evaluation episodes); the number of runs may differ. The
figure is the probability of improvement (Agarwal et al. 2021, arXiv 2108.13264): that a run of the first scores above a
run of the second, ties counting half, averaged over tasks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from rlx.errors import UserError
from rlx.statistics import as_scores, check_resampling

MIN_RUNS = 10  # of each, before a comparison may name a winner


class Improvement(NamedTuple):
    probability: float
    low: float  # ends of its interval
    high: float


class Comparison(NamedTuple):
    """What may be said of two algorithms. `claim`: better, worse (the first), no difference shown, exploratory."""

    probability: float
    low: float
    high: float
    p_value: float  # of equal distributions
    num_runs: tuple[int, int]
    claim: str


def probability_of_improvement(
    x: Any, y: Any, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Improvement:
    """The probability of improvement of `x` over `y`, with its stratified percentile bootstrap interval.

    Whole runs are resampled, separately within each task and each algorithm. The interval describes; it does not
    decide: of an algorithm against itself it excludes 1/2 too often where runs are few (`compare` has the figures).

    Raises UserError for scores that are not finite or not of the same tasks, or fewer than two runs.
    """
    first, second = _pair(x, y)
    check_resampling(confidence, num_resamples)
    won = _wins(first, second)
    num_x, num_y, num_tasks = first.shape[0], second.shape[0], first.shape[1]
    rng = np.random.default_rng(seed)
    times_x, times_y = (
        rng.multinomial(num, np.full(num, 1 / num), size=(num_resamples, num_tasks)) for num in (num_x, num_y)
    )
    resampled = np.einsum("rti,tij,rtj->rt", times_x, won, times_y, optimize=True).mean(axis=1) / (num_x * num_y)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Improvement(float(won.mean()), float(low), float(high))


def compare(x: Any, y: Any, confidence: float = 0.95, num_permutations: int = 4000, seed: int = 0) -> Comparison:
    """States whether `x` is better than `y`: by a studentised permutation interval, from ten runs each on.

    The statistic is T = (probability - 1/2) / se, with the standard error of Brunner and Munzel (2000) in each task;
    for one task T is that of `scipy.stats.brunnermunzel`. Its null distribution comes from exchanging runs between
    the two algorithms within each task (Neubert and Brunner 2007), and the interval is probability -+ c se with c the
    `confidence` quantile of |T| there. It excludes 1/2 exactly where the permutation test rejects.

    Why not the percentile bootstrap: of an algorithm against itself (4000 simulated pairs, one task, normal scores and
    scores in two humps with ties) its interval excludes 1/2 in 5.6 and 5.7 % of cases at ten runs each, in 21 and 16 %
    at three. This one: 4.9 and 4.7 % at ten, never at three. The permutation test holds 1 - confidence at any number
    of runs and tasks, and with ties, whenever the two distributions are equal. Studentised, it nearly does where only
    their spreads differ (spreads 1 and 4, 20 and 10 runs: 6 %; a rank sum: 11 %).

    The variance within a task is at least that of a share 1 / (2 k) of k runs, k the smaller number of runs: without,
    ten runs that all beat ten others would know the probability to be 1 without error.

    Raises UserError as `probability_of_improvement` does.
    """
    first, second = _pair(x, y)
    check_resampling(confidence, num_permutations)
    num_x, num_y = first.shape[0], second.shape[0]
    pooled = np.concatenate([first, second])
    above = _wins(pooled, pooled)  # [tasks, runs, runs]
    own = np.arange(num_x + num_y) < num_x
    rng = np.random.default_rng(seed)
    labels = np.broadcast_to(own, (num_permutations, above.shape[0], own.size))
    labels = np.concatenate([labels[:1], rng.permuted(labels, axis=-1)])  # the first is the data as they are
    probability, error = _studentised(above, labels, num_x, num_y)
    statistic = np.round(np.abs(probability - 0.5) / error, 9)  # equal ones stay equal
    critical = np.sort(statistic)[math.ceil(confidence * statistic.size) - 1]
    low = max(0.0, round(float(probability[0] - critical * error[0]), 8))  # an end at 1/2 is at 1/2
    high = min(1.0, round(float(probability[0] + critical * error[0]), 8))
    excludes = statistic[0] > critical
    claim = ("better" if probability[0] > 0.5 else "worse") if excludes else "no difference shown"
    claim = claim if min(num_x, num_y) >= MIN_RUNS else "exploratory"
    p_value = float((statistic >= statistic[0]).mean())
    return Comparison(float(probability[0]), low, high, p_value, (num_x, num_y), claim)


def sentence(comparison: Comparison, first: str, second: str) -> str:
    """A comparison in words; it names a winner only where `claim` does."""
    found = comparison
    about = (
        f"A run of {first} scores above one of {second} with probability {found.probability:.2f} "
        f"(95 % interval {found.low:.2f} to {found.high:.2f}; {found.num_runs[0]} and {found.num_runs[1]} runs a task)"
    )
    ends = {
        "better": f": {first} is better.",
        "worse": f": {second} is better.",
        "no difference shown": "; the interval holds 0.5: no difference shown.",
        "exploratory": f". Exploratory: fewer than {MIN_RUNS} runs each name no winner.",
    }
    return about + ends[found.claim]


def _pair(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = as_scores(x, min_runs=2), as_scores(y, min_runs=2)
    if first.shape[1] != second.shape[1]:
        raise UserError(f"two algorithms compare on the same tasks, got {first.shape[1]} and {second.shape[1]}.")
    return first, second


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[tasks, runs of x, runs of y]: 1 where x scores above y, 1/2 where equal."""
    x, y = x.T[:, :, None], y.T[:, None, :]
    return (x > y) + 0.5 * (x == y)


def _studentised(above: np.ndarray, labels: np.ndarray, num_x: int, num_y: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability and standard error for each labelling [P, tasks, runs] of the pooled runs (True: of the first)."""
    of_x = labels.astype(np.float64)
    of_y = 1.0 - of_x
    # [P, tasks, runs]: the share of the other algorithm's runs that a run of x beats, that beat a run of y
    beats = np.einsum("tij,ptj->pti", above, of_y, optimize=True) / num_y
    beaten = np.einsum("tij,pti->ptj", above, of_x, optimize=True) / num_x
    probability = (beats * of_x).sum(axis=-1) / num_x  # [P, tasks]
    centre = probability[..., None]
    variance = ((beats - centre) ** 2 * of_x).sum(axis=-1) / (num_x - 1) / num_x
    variance += ((beaten - centre) ** 2 * of_y).sum(axis=-1) / (num_y - 1) / num_y
    smallest = min(num_x, num_y)
    share = 1 / (2 * smallest)
    variance = np.maximum(variance, share * (1 - share) / smallest)
    num_tasks = above.shape[0]
    return probability.mean(axis=1), np.sqrt(variance.sum(axis=1)) / num_tasks
