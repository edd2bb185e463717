"""Sweeps: settings times seeds, how they share compiled programs, what is picked and on which seeds it is judged.

    rlx sweep ppo ENV --grid algo.learning_rate=1e-3,3e-4 --random algo.gamma=0.9:0.999 --samples 4 --num-seeds 6

Settings are a grid's product times random samples. Those that differ in floats of the algorithm's Config alone share
one program with all their seeds (`rlx.group`); the others get programs of their own, one after another. Free of jax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlx import settings
from rlx.arguments import literal
from rlx.errors import UserError, require

Combination = dict[str, Any]  # flat settings


class Random(NamedTuple):
    """Draws a number between two bounds: uniformly, or uniformly in its logarithm; whole where both bounds are."""

    low: int | float
    high: int | float
    log: bool = False

    def draw(self, generator: np.random.Generator) -> int | float:
        low, high = self.low, self.high
        if self.log:
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
            return round(value) if isinstance(low, int) and isinstance(high, int) else value
        if isinstance(low, int) and isinstance(high, int):
            return int(generator.integers(low, high, endpoint=True))
        return float(generator.uniform(low, high))


class Space(NamedTuple):
    """What is swept."""

    grid: Mapping[str, Sequence[Any]]
    random: Mapping[str, Random]
    samples: int  # random draws for each point of the grid
    seed: int = 0  # of the draws


def read_grid(text: str) -> tuple[str, list[Any]]:
    """`algo.learning_rate=1e-3,3e-4`. Raises UserError for another form."""
    key, equals, values = text.partition("=")
    require(bool(equals and values), "--grid", text, "KEY=VALUE,VALUE,...")
    found = literal(f"[{values}]")
    found = found if isinstance(found, list) else [literal(value) for value in values.split(",")]
    return key_of(key), [math.inf if value == "inf" else value for value in found]


def read_random(text: str) -> tuple[str, Random]:
    """`algo.gamma=0.9:0.999` or `algo.learning_rate=log:1e-5:1e-2`. Raises UserError for another form."""
    key, _, bounds = text.partition("=")
    log, parts = bounds.startswith("log:"), bounds.removeprefix("log:").split(":")
    numbers = [literal(part) for part in parts]
    is_pair = len(numbers) == 2 and all(type(number) in (int, float) for number in numbers)
    require(is_pair, "--random", text, "KEY=LOW:HIGH or KEY=log:LOW:HIGH")
    low, high = numbers
    require(low < high and (low > 0 or not log), "--random", text, "LOW below HIGH, and above 0 with log")
    return key_of(key), Random(low, high, log)


def read_space(file: str | Path) -> tuple[dict[str, list[Any]], dict[str, Random]]:
    """Tables `grid` (lists) and `random` ("LOW:HIGH") of a TOML or JSON file. Raises UserError for other content."""
    grid: dict[str, list[Any]] = {}
    random: dict[str, Random] = {}
    for key, value in settings.read_file(file).items():
        kind, _, name = key.partition(".")
        if kind == "grid" and isinstance(value, list):
            grid[key_of(name)] = value
        elif kind == "random" and isinstance(value, str):
            random |= [read_random(f"{name}={value}")]
        else:
            raise UserError(f"{str(file)!r}: {key} = {value!r}; there may be [grid] KEY = [...], [random] KEY = 'L:H'.")
    return grid, random


def key_of(text: str) -> str:
    return text.strip().removeprefix("--").replace("-", "_")


def combinations(space: Space) -> list[Combination]:
    """Every point of the grid with each of `samples` random draws, which are the same at every point.

    Raises UserError for a space without points, and for a key that is both in the grid and random.
    """
    require(bool(space.grid or space.random), "sweep", "nothing", "--grid KEY=V,V or --random KEY=LOW:HIGH")
    for key, values in space.grid.items():
        require(len(values) > 0 and key not in space.random, f"--grid {key}", values, "values, and no --random of it")
    require(space.samples >= 1, "--samples", space.samples, "at least 1")
    generator = np.random.default_rng(space.seed)
    count = space.samples if space.random else 1
    drawn = [{key: kind.draw(generator) for key, kind in space.random.items()} for _ in range(count)]
    points = [dict(zip(space.grid, point, strict=True)) for point in itertools.product(*space.grid.values())]
    found = [{**point, **sample} for point in points for sample in drawn]
    return [c for index, c in enumerate(found) if c not in found[:index]]  # whole numbers are drawn again


def names_of(combinations: Sequence[Combination]) -> list[str]:
    """Names of folders, one a combination: `learning_rate=0.001,gamma=0.99`, numbered where that is not unique.

    Raises UserError for names that are too long for a file system.
    """
    names = []
    for combination in combinations:
        text = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in combination.items()}
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in text.items())
        names.append("".join(char if char.isalnum() or char in "=,._+-" else "_" for char in name))
        require(len(names[-1]) <= 200, "sweep", names[-1], "settings of 200 characters at most together")
    again = {name for name in names if names.count(name) > 1}
    return [f"{name},{index}" if name in again else name for index, name in enumerate(names)]


def programs(combinations: Iterable[Combination], varying: Iterable[str]) -> list[list[Combination]]:
    """Combinations that differ in the settings `varying` alone share a program."""
    varying = set(varying)
    found: dict[str, list[Combination]] = {}
    for combination in combinations:
        fixed = repr({key: value for key, value in combination.items() if key not in varying})
        found.setdefault(fixed, []).append(combination)
    return list(found.values())


class Judged(NamedTuple):
    """One combination. Scores are means of a run's last evaluation; NaN where one of those seeds failed."""

    name: str
    picking: float  # mean over the seeds that pick
    judging: float  # IQM over those that do not
    low: float  # of its 95 % interval, NaN for fewer than three seeds
    high: float
    failed: int  # runs without a score: they met a NaN or an infinity, or are not finished
    best: float  # the highest of all its seeds; NaN without any


def halves(seeds: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The seeds that pick and those that judge; a single one does both."""
    half = -(-len(seeds) // 2)
    return (seeds[:half], seeds[half:]) if len(seeds) > 1 else (seeds, seeds)


def judge(scores: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> list[Judged]:
    """Combinations by their mean over the first half of the seeds, the best first, and their IQM over the others.

    The first is picked; its figure is of seeds that had no part in picking it. One whose picking seeds did not all
    finish comes last.
    """
    from rlx.statistics import iqm, stratified_bootstrap_interval

    pickers, judges = halves(seeds)
    rows = []
    for name, of_seed in scores.items():
        picking = float(np.mean([of_seed.get(seed, math.nan) for seed in pickers]))
        judging = np.array([[of_seed.get(seed, math.nan)] for seed in judges])
        failed = sum(not math.isfinite(of_seed.get(seed, math.nan)) for seed in seeds)
        best = max(filter(math.isfinite, of_seed.values()), default=math.nan)
        low = high = middle = math.nan
        if np.isfinite(judging).all():
            middle = iqm(judging)
            if len(judges) >= 3:
                low, high = stratified_bootstrap_interval(judging)
        rows.append(Judged(name, picking, middle, low, high, failed, best))
    return sorted(rows, key=lambda row: (not math.isfinite(row.picking), -row.picking))


def table(rows: Sequence[Judged], seeds: Sequence[int], combinations: Mapping[str, Combination]) -> str:
    """Markdown, the picked combination first, and its settings as flags."""
    pickers, judges = halves(seeds)
    about = f"Picked by the mean of seeds {_listed(pickers)}, judged on {_listed(judges)}"
    about += " (one seed: the judge is the picker)." if len(seeds) == 1 else "."
    about += " Exploratory: fewer than ten judging seeds." if len(judges) < 10 else ""
    lines = [about, "", "| settings | mean, picking seeds | IQM, judging seeds | 95 % interval | best run | failed |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        interval = f"{row.low:.4g} to {row.high:.4g}" if math.isfinite(row.low) else ""
        figures = [f"{row.picking:.4g}", f"{row.judging:.4g}", interval, f"{row.best:.4g}", str(row.failed or "")]
        lines.append(f"| {' | '.join([row.name, *figures])} |")
    if rows and math.isfinite(rows[0].picking):
        flags = " ".join(f"--{key} {value}" for key, value in combinations[rows[0].name].items())
        lines += ["", f"Picked: `{flags}`"]
    return "\n".join(lines)


def _listed(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
