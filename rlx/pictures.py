"""Pictures of a study's report: curves beside references, scores, performance profile. pyplot is never touched.

They are drawn as figures; `png` gives the bytes, the same ones each time for the same numbers and matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlx.results import Result, reference_interval, score_matrix
from rlx.statistics import Summary, iqm_band, performance_profile
from rlx.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MILLION = 1e6


def png(figure: Figure, dpi: int) -> bytes:
    """16 levels a colour: half the bytes of 256, and lines and bands look the same."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.image import imsave

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.uint16)
    coarse = ((pixels + 8) // 17 * 17).astype(np.uint8)
    buffer = io.BytesIO()
    imsave(buffer, coarse, format="png", metadata={"Software": "rlx"}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def color_of(study: Study, variant: str) -> str:
    return f"C{list(study.algorithms).index(variant) % 10}"


def draw_curves(results: Sequence[Result], study: Study, against: Literal["steps", "minutes"] = "steps") -> Figure:
    """A panel an environment: IQM over seeds with its 95 % interval, and the reference as a horizontal band."""
    finished = [result for result in results if result.state == "finished"]
    envs = list(dict.fromkeys(result.program.env for result in finished))
    num_columns = 5 if len(envs) > 12 else min(len(envs), 4)
    num_rows = -(-len(envs) // num_columns)
    figure = new_figure(2.7 * num_columns + 0.6, 2.0 * num_rows + 0.9)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for panel in panels[len(envs) :]:
        panel.remove()
    lines: dict[str, Any] = {}
    for env, panel in zip(envs, panels, strict=False):
        for result in finished:
            if result.program.env == env:
                lines |= _draw_curve(panel, result, study, against)
        panel.set_title(env.partition("/")[2] or env, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    label = {"steps": "environment steps, millions", "minutes": "minutes of training, all seeds at once"}[against]
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("mean return of an episode", fontsize=9)
    entry = 0.5 + 0.07 * max(map(len, lines), default=1)  # inches: its line and its letters
    ncols = int(np.clip(figure.get_figwidth() / entry, 1, 4))
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=ncols, fontsize=9, frameon=False)
    return figure


def _draw_curve(panel: Any, result: Result, study: Study, against: str) -> dict[str, Any]:
    """Returns what the legend shows: name -> line."""
    name, env = result.program.variant, result.program.env
    color, shown = color_of(study, name), {}
    runs = [run for run in result.runs if not run.error and run.steps]
    points = [dict(zip(run.steps, run.returns, strict=True)) for run in runs]
    common = sorted(set.intersection(*map(set, points))) if runs else []  # evaluations of one may not be finite
    if common:
        minutes = dict(zip(runs[0].steps, runs[0].minutes, strict=True)) if against == "minutes" else {}
        at = np.array([minutes[step] for step in common]) if minutes else np.array(common) / MILLION
        values = np.array([[of_run[step] for step in common] for of_run in points])
        middle = values[0]
        if len(values) > 1:
            middle, low, high = iqm_band(values)
            panel.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        (shown[f"{name}: IQM, 95 % interval"],) = panel.plot(at, middle, color=color, linewidth=1.3)
    reference = study.references.get((name, env))
    if reference:
        task = study.environments[env]
        low, high = np.clip(reference_interval(reference, task, study.tolerance), task.low, task.high)
        grey = "0.4" if len(study.algorithms) == 1 else color
        panel.axhspan(low, high, color=grey, alpha=0.15, linewidth=0)
        label = f"reference of {name}, ± {'sd' if reference.sd else f'{100 * study.tolerance:g} %'}"
        shown[label] = panel.axhline(reference.value, color=grey, linewidth=1, linestyle="--")
    return shown


def draw_scores(results: Sequence[Result], statistics: Sequence[Summary], study: Study) -> Figure:
    """A line an environment: IQM of the final scores with its interval, above the reference's interval, normalised."""
    rows = [(r, s) for r, s in zip(results, statistics, strict=True) if r.state == "finished" and r.scores.size]
    envs = list(dict.fromkeys(result.program.env for result, _ in rows))
    names = list(study.algorithms)
    figure = new_figure(7.2, 0.26 * len(envs) * max(1, 0.6 * len(names)) + 1.2)
    panel = figure.subplots()
    lines: dict[str, Any] = {}
    for result, found in rows:
        name, env = result.program.variant, result.program.env
        task = study.environments[env]
        y = envs.index(env) + 0.7 * ((names.index(name) + 0.5) / len(names) - 0.5)

        def place(value: float, low: float = task.low, span: float = task.high - task.low) -> float:
            return (value - low) / span

        reference = study.references.get((name, env))
        if reference:
            ends = np.clip([place(end) for end in reference_interval(reference, task, study.tolerance)], 0.0, 1.0)
            lines["reference, ± sd"] = panel.plot(ends, [y, y], color="0.75", linewidth=7, solid_capstyle="butt")[0]
            panel.plot([place(reference.value)], [y], "|", color="0.3", markersize=9)
        color = color_of(study, name)
        if math.isfinite(found.low):
            panel.plot([place(found.low), place(found.high)], [y, y], color=color, linewidth=1.5)
        lines[f"{name}: IQM, 95 % interval"] = panel.plot([place(found.iqm)], [y], "o", color=color, markersize=4)[0]
    panel.set_yticks(range(len(envs)), [env.partition("/")[2] or env for env in envs], fontsize=8)
    panel.set_ylim(len(envs) - 0.5, -0.5)
    panel.set_xlabel("normalised score at the end of training", fontsize=9)
    panel.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_profile(results: Sequence[Result], study: Study, environments: Sequence[str]) -> Figure:
    """The share of runs, over seeds and environments, that score above each threshold."""
    figure = new_figure(5.6, 3.4)
    panel = figure.subplots()
    matrices = {name: score_matrix(results, study, name, environments) for name in study.algorithms}
    low, high = min(m.min() for m in matrices.values()), max(m.max() for m in matrices.values())
    thresholds = np.linspace(min(0.0, low), max(1.0, high), 201)
    for name, matrix in matrices.items():
        band = performance_profile(matrix, thresholds)
        panel.plot(thresholds, band.value, color=color_of(study, name), label=name)
        panel.fill_between(thresholds, band.low, band.high, color=color_of(study, name), alpha=0.2, linewidth=0)
    panel.set_xlabel("threshold: normalised score", fontsize=9)
    panel.set_ylabel("share of runs above it", fontsize=9)
    panel.set_ylim(0, 1.02)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9)
    return figure
