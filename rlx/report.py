"""The report of a study: report.md with pictures beside it, one self-contained report.html, results.json. Free of jax.

It is written anew from the run directories after each program, says what is missing, and holds no time, host or path:
the same runs give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.comparison import MIN_RUNS, sentence
from rlx.documents import Block, Code, Heading, Paragraph, Picture, Table, markdown, page
from rlx.files import write_atomically
from rlx.findings import Findings, changed_settings, machine_of, numbers
from rlx.pictures import draw_curves, draw_profile, draw_scores, png
from rlx.results import FLOOR, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT = 300_000  # bytes of the largest file, the page with all pictures inside
RESOLUTIONS = (110, 90, 75, 60, 50, 40)  # dots an inch; the first that keeps the limit is taken
RULE = (
    "The verdict compares our mean with the reference's mean ± its standard deviation over runs; where that is not "
    "known, with ± {tolerance:.0%} of the mean, at least {least:.0%} of the task's range. Fewer steps than the "
    "reference's are named. The interval is the 95 % stratified bootstrap interval of the interquartile mean (IQM). A "
    "score is the mean return of the last evaluation, after the last step, with {actions} actions."
)
EXPLORATORY = (
    "**Exploratory.** {seeds} seeds a row are fewer than {needed}: intervals of so few runs are too narrow, and this "
    "report names no winner between algorithms."
)


def write(found: Findings, folder: Path) -> None:
    """Writes the report into `folder`, each file as a whole. Raises OSError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = document(found)
    figures = drawings(found)
    for resolution in RESOLUTIONS:
        pictures = {name: png(figure, resolution) for name, figure in figures.items()}
        text = page(found.study.title, blocks, pictures)
        if len(text.encode()) <= LIMIT:
            break
    for name, content in pictures.items():
        write_atomically(folder / name, content)
    write_atomically(folder / "report.html", text)
    write_atomically(folder / "report.md", markdown(blocks))
    write_atomically(folder / "results.json", json.dumps(numbers(found), indent=1) + "\n")


def drawings(found: Findings) -> dict[str, Figure]:
    """The pictures that there are, by the names of their files."""
    figures = {}
    if found.any_scores:
        figures["curves.png"] = draw_curves(found.results, found.study)
        if len(found.study.algorithms) > 1:
            figures["minutes.png"] = draw_curves(found.results, found.study, "minutes")
        figures["scores.png"] = draw_scores(found.results, found.scores, found.study)
    if found.together:
        figures["profile.png"] = draw_profile(found.results, found.study, found.environments)
    return figures


def document(found: Findings) -> list[Block]:
    study = found.study
    seeds = len(study.sizes[found.size].seeds)
    blocks: list[Block] = [Heading(1, study.title), Paragraph(study.about)]
    if found.exploratory:
        blocks.append(Paragraph(EXPLORATORY.format(seeds=seeds, needed=MIN_RUNS)))
    blocks += [Heading(2, "What was run"), Code(found.command), _facts(found)]
    modes = {changed_settings(result).get("eval_mode", "greedy") for result in found.results}
    words = {"greedy": "deterministic", "sample": "drawn"}
    actions = " or (see the settings) ".join(words[mode] for mode in sorted(modes))
    blocks += [
        Heading(2, "Results"),
        *_table(found),
        Paragraph(RULE.format(tolerance=study.tolerance, least=study.tolerance / 5, actions=actions)),
    ]
    for result in found.results:
        for run in result.failed:
            blocks.append(Paragraph(f"{result.program.title}, seed {run.seed}, stopped: {run.error}"))
    if found.any_scores:
        several = [Picture("minutes.png", "The same against minutes of training")] if len(study.algorithms) > 1 else []
        blocks += [
            Picture("curves.png", "Learning curves of each environment beside the reference"),
            *several,
            Picture("scores.png", "Final scores of each environment beside the reference"),
        ]
    blocks += _together(found)
    return [*blocks, *_settings(found), *_sources(found)]


def _facts(found: Findings) -> Table:
    study, size = found.study, found.study.sizes[found.size]
    done = [result for result in found.results if result.state == "finished"]
    begun = [result for result in found.results if result.state != "missing"]
    open_ones = [f"{r.program.title} ({r.state})" for r in found.results if r.state != "finished"]
    seeds = ", ".join(map(str, size.seeds))
    if study.tuning_seeds:
        seeds += f" (settings were tuned on {', '.join(map(str, study.tuning_seeds))})"
    envs = len({result.program.env for result in found.results})
    about = f"{', '.join(study.algorithms)} on {envs} of {len(study.environments)} environments"
    rows = [
        ["size", f"{found.size}: {about}"],
        ["seeds", seeds],
        ["programs finished", f"{len(done)} of {len(found.results)}"],
        ["not finished", ", ".join(open_ones) or "none"],
        ["machine", _distinct(machine_of(result.recorded) for result in begun)],
        ["versions", _distinct(_versions(result.recorded) for result in begun)],
        ["commit", _distinct(_commits(result.recorded) for result in begun)],
        ["minutes of training", f"{sum(result.minutes for result in begun):.0f}"],
    ]
    return Table(["", ""], rows)


def _versions(recorded: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in recorded.get("versions", {}).items())


def _distinct(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts)) or "nothing was run yet"


def _commits(recorded: Mapping[str, Any]) -> str:
    """The one that a program was begun at, and those that it was gone on with."""
    later = [entry.get("commit") for entry in recorded.get("resumed", ())]
    return ", then ".join(str(each or "not known") for each in (recorded.get("commit"), *later))


def _number(value: float) -> str:
    """Four digits: tasks differ in their scale by orders of magnitude."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _table(found: Findings) -> list[Block]:
    header = "algorithm, environment, steps, seeds, mean, sd, IQM, 95 % interval, reference, its steps, its trust"
    header += ", verdict, minutes, steps/s"
    rows = []
    for result, scores, judged in zip(found.results, found.scores, found.verdicts, strict=True):
        program = result.program
        interval = f"{_number(scores.low)} to {_number(scores.high)}" if math.isfinite(scores.low) else "-"
        reference = found.study.references.get((program.variant, program.env))
        theirs = ["-"] * 3
        if reference:
            spread = "" if reference.sd is None else f" ± {reference.sd:g}"
            budget = short(reference.steps) if reference.steps else "not known"
            theirs = [f"{reference.value:g}{spread}", budget, reference.trust]
        count = f"{len(result.scores)} of {len(program.seeds)}" if result.failed else str(len(program.seeds))
        ours = [_number(value) for value in (scores.mean, scores.sd, scores.iqm)]
        word = f"**{judged.word}**" if judged.word else ""
        text = f"{word}{', ' if word and judged.reason else ''}{judged.reason}"
        if result.state != "finished":
            ours, interval = ["-"] * 3, "-"
        speed = f"{result.steps_per_second:,.0f}" if math.isfinite(result.steps_per_second) else "-"
        names = [program.variant, f"`{program.env}`", f"{result.steps:,}", count]
        rows.append([*names, *ours, interval, *theirs, text, f"{result.minutes:.1f}", speed])
    counts = Counter(judged.word for judged in found.verdicts if judged.word)
    order = ("better", "within", "worse", "not comparable")
    counted = ", ".join(f"{counts[word]} {word}" for word in order if counts[word]) or "none"
    reached = [judged for judged in found.verdicts if judged.word in ("better", "within")]
    floor = sum(FLOOR in judged.reason for judged in reached)
    about = (
        f"Verdicts of the {sum(counts.values())} rows that are finished: {counted}. {len(reached)} are inside or above "
        f"the reference's interval, {floor} of them where it reaches the lowest score. Minutes and steps/s are of all "
        "seeds together, in one program."
    )
    return [Paragraph(about), Table(header.split(", "), rows)]


def _together(found: Findings) -> list[Block]:
    if not found.together:
        return []
    rows = [
        [name, f"{s.iqm:.3f}", f"{s.low:.3f} to {s.high:.3f}", f"{s.mean:.3f}"] for name, s in found.together.items()
    ]
    envs = found.environments
    about = (
        f"Scores of {len(envs)} environments, normalised to their ranges (0: the lowest score), runs that failed "
        "counted as 0. The picture shows the share of runs, over seeds and environments, that score above a threshold."
    )
    blocks: list[Block] = [Heading(2, "All environments together"), Paragraph(about)]
    blocks += [
        Table(["algorithm", "IQM", "95 % interval", "mean"], rows),
        Picture("profile.png", "Performance profile"),
    ]
    if found.comparisons:
        blocks.append(Heading(2, "Algorithms beside each other"))
        blocks += [Paragraph(sentence(how, *pair)) for pair, (how, _) in found.comparisons.items()]
        blocks.append(Paragraph("Each pair is tested at 5 % by itself; several pairs are not corrected for."))
    return blocks


def _settings(found: Findings) -> list[Block]:
    each = {r.program.title: changed_settings(r) for r in found.results if r.state != "missing"}
    if not each:
        return []
    first, *others = each.values()
    shared = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
    rows = [[title, _listed({k: v for k, v in own.items() if k not in shared})] for title, own in each.items()]
    rows = [row for row in rows if row[1]]
    blocks: list[Block] = [Heading(2, "Settings")]
    blocks.append(Paragraph(f"Not at their defaults, in every program: {_listed(shared) or 'none'}."))
    return [*blocks, Table(["program", "its own settings"], rows)] if rows else blocks


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key} = {value}`" for key, value in settings.items())


def _sources(found: Findings) -> list[Block]:
    shown = {(result.program.variant, result.program.env) for result in found.results}
    references = [reference for key, reference in found.study.references.items() if key in shown]
    sources = list(dict.fromkeys(f"{r.source} ({r.runs} runs)." for r in references))
    return [Heading(2, "References"), *map(Paragraph, sources)] if sources else []
