"""Learning curves of runs, as a picture. matplotlib and scipy are imported when used; pyplot is never touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlx.errors import UserError, require, unknown
from rlx.run_directory import FAILED, RunDirectory, read_metrics

SUFFIXES = (".png", ".svg", ".pdf")
LABELS = {"eval/return": "mean return of an evaluation episode", "train/return": "mean return of a training episode"}
AXES = {"steps": "environment steps", "minutes": "minutes of training"}
SIZES = ("total_steps", "num_envs", "unroll_length")  # of a run, which set runs of one algorithm apart
MANY = 4  # lines whose legend still finds a place among them
LINES = ("-", "--", ":", "-.")  # where there are more of them than colours
PALETTE = "petroff10"  # colours that those who see few can tell apart (Petroff 2021, arXiv 2107.02270)


class Curve(NamedTuple):
    """One metric of one run."""

    env: str
    algorithm: str  # and settings, where runs of it differ in them
    steps: np.ndarray  # [n] environment steps, or minutes, ascending
    values: np.ndarray  # [n] finite


def plot(
    runs: Sequence[RunDirectory | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    metric: str = "eval/return",
    x: str = "steps",
) -> Path:
    """Draws `metric` over environment steps: a panel an environment, a line (mean over its runs) an algorithm.

    `x`: "steps", or "minutes" of training, without compiling and what a kill lost; of a run among many in one program
    those of the program.

    Runs of an algorithm with other settings (`--algo.*`, `--env.*`, sizes) are a line of their own; it ends where the
    first of its runs does. The band is the 95 % bootstrap interval of the mean from three runs on, the range for two.
    Where some run has no evaluation, the returns of training are drawn for all. Runs that met a NaN or an infinity are
    left out, and counted in the legend, unless all have. Returns the path written.

    Raises UserError for no runs, a run without rows, a metric that no row has, a suffix other than png, svg, pdf.
    """
    require(x in AXES, "x", x, f"one of {', '.join(AXES)}")
    target = Path(out)
    if target.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot draw to {str(out)!r}: the name must end in {', '.join(SUFFIXES)}.")
    if not runs:
        raise UserError("there is nothing to plot: name at least one run directory.")
    opened = [run if isinstance(run, RunDirectory) else RunDirectory.open(run) for run in runs]
    whole = [run for run in opened if not (run.path / FAILED).exists()] or opened
    rows = [_rows(run) for run in whole]
    metric = _available(metric, whole, rows)
    curves = [
        _curve(run, of_run, metric, x, label) for run, of_run, label in zip(whole, rows, _labels(whole), strict=True)
    ]
    lost = len(opened) - len(whole)
    label = LABELS.get(metric, metric)
    label += f" ({lost} stopped {'run' if lost == 1 else 'runs'} left out)" if lost else ""
    _draw(curves, AXES[x], label, target)
    return target


def _rows(run: RunDirectory) -> list[dict[str, float]]:
    rows = read_metrics(run.metrics_path)
    if not rows:
        raise UserError(f"run {str(run.path)!r} has no metrics yet: {str(run.metrics_path)!r} is empty.")
    return rows


def _has(rows: list[dict[str, float]], metric: str) -> bool:
    return any(np.isfinite(row.get(metric, np.nan)) for row in rows)


def _available(metric: str, runs: list[RunDirectory], rows: list[list[dict[str, float]]]) -> str:
    """`metric`, or the return of training where not every run was evaluated."""
    for candidate in (metric, "train/return") if metric == "eval/return" else (metric,):
        if all(_has(of_run, candidate) for of_run in rows):
            return candidate
    run, of_run = next((r, x) for r, x in zip(runs, rows, strict=True) if not _has(x, metric))
    names = {name for row in of_run for name in row if _has(of_run, name)} - {"step"}
    raise unknown(f"in run {str(run.path)!r} the metric", metric, names)


def _labels(runs: list[RunDirectory]) -> list[str]:
    """The algorithm of each run, and the settings in which those of it on the same environment differ."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    keys = []
    for run in runs:
        algorithm = str(run.config.get("algorithm", "algorithm")).removeprefix("rlx.algorithms.")
        algorithm = Path(algorithm).stem if algorithm.endswith(".py") else algorithm
        sizes = {name: value for name, value in run.config.get("train", {}).items() if name in SIZES}
        own = {**sizes, **run.config.get("algo", {})}
        own |= {f"env.{k}": v for k, v in run.config.get("env_overrides", {}).items()}
        keys.append((algorithm, str(run.config.get("env", "environment"))))
        kinds.setdefault(keys[-1], []).append(own)
    labels = []
    taken = {key: iter(found) for key, found in kinds.items()}
    for key in keys:
        own, others = next(taken[key]), kinds[key]
        differing = [name for name in own if any(other.get(name) != own[name] for other in others)]
        labels.append(" ".join([key[0], *(f"{name}={_short(own[name])}" for name in differing)]))
    return labels


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curve(run: RunDirectory, rows: list[dict[str, float]], metric: str, x: str, label: str) -> Curve:
    from rlx.results import clock_of

    at = [row["step"] for row in rows] if x == "steps" else clock_of(rows)
    found = zip(at, (row.get(metric, np.nan) for row in rows), strict=True)
    points = {place: value for place, value in found if np.isfinite(value)}
    steps = np.array(sorted(points), np.float64)
    env = str(run.config.get("env", "environment"))
    return Curve(env, label, steps, np.array([points[step] for step in steps]))


def band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean, low and high [n] of several runs, over the steps that all of them cover.

    Runs that were measured at different steps are interpolated linearly.
    """
    first, last = max(c.steps[0] for c in curves), min(c.steps[-1] for c in curves)
    steps = np.unique(np.concatenate([c.steps for c in curves]))
    inside = steps[(steps >= first) & (steps <= last)]
    steps = inside if inside.size else steps
    values = np.stack([np.interp(steps, c.steps, c.values) for c in curves])
    mean = values.mean(axis=0)
    if len(curves) < 3:
        return steps, mean, values.min(axis=0), values.max(axis=0)
    from rlx.statistics import stratified_bootstrap_interval  # imports scipy.stats, which is slow

    bounds = [stratified_bootstrap_interval(x[:, None], np.mean, num_resamples=500) for x in values.T]
    low, high = np.array(bounds).T
    return steps, mean, low, high


def _draw(curves: Sequence[Curve], axis: str, label: str, target: Path) -> None:
    from matplotlib import color_sequences
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    envs = sorted({curve.env for curve in curves})
    num_columns = min(len(envs), 3)
    num_rows = -(-len(envs) // num_columns)
    figure = Figure(figsize=(5.6 * num_columns, 3.8 * num_rows), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for panel in panels[len(envs) :]:
        panel.remove()
    looks = [{"linestyle": line, "color": color} for line in LINES for color in color_sequences[PALETTE]]
    names = sorted({curve.algorithm for curve in curves})
    styles = {name: looks[i % len(looks)] for i, name in enumerate(names)}
    for env, panel in zip(envs, panels, strict=False):
        _draw_panel(panel, env, [curve for curve in curves if curve.env == env], styles)
        panel.set_xlabel(axis)
        panel.set_ylabel(label)
        if axis == AXES["steps"]:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1M
    if len(names) > MANY:  # beside the panels, once
        lines = {line.get_label(): line for panel in panels[: len(envs)] for line in panel.get_lines()}
        figure.legend(handles=list(lines.values()), loc="outside right upper", fontsize="small")
        figure.set_figwidth(figure.get_figwidth() + 3.5)
    else:
        for panel in panels[: len(envs)]:
            panel.legend(fontsize="small")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _draw_panel(panel: Any, env: str, curves: Sequence[Curve], styles: Mapping[str, Mapping[str, Any]]) -> None:
    for algorithm in sorted({curve.algorithm for curve in curves}):
        group = [curve for curve in curves if curve.algorithm == algorithm]
        steps, mean, low, high = band(group)
        about = {1: "1 run", 2: "mean and range of 2 runs"}
        ends = [curve.steps[-1] for curve in group]
        cut = ", as far as all went" if min(ends) < 0.95 * max(ends) else ""
        name = f"{algorithm} ({about.get(len(group), f'mean of {len(group)} runs, 95 % interval')}{cut})"
        style = styles[algorithm]
        panel.plot(steps, mean, label=name, marker="." if steps.size < 30 else None, **style)
        if len(group) > 1:
            panel.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
    panel.set_title(env)
    panel.grid(alpha=0.3)
