"""What a study found, in numbers: statistics of every row, verdicts, all environments together, comparisons.

Free of jax. `numbers` is what results.json holds; `rlx.report` says the same in words and pictures.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlx.comparison import MIN_RUNS, Comparison, Improvement, compare, probability_of_improvement
from rlx.results import Result, Verdict, complete, score_matrix, statistics, verdict
from rlx.statistics import Summary, summary
from rlx.study import Study


class Findings(NamedTuple):
    """Everything that a report says, in numbers."""

    study: Study
    size: str
    command: str
    results: Sequence[Result]
    scores: Sequence[Summary]  # of each result
    verdicts: Sequence[Verdict]
    environments: Sequence[str]  # on which every algorithm has finished
    together: Mapping[str, Summary]  # algorithm -> normalised, over those environments
    comparisons: Mapping[tuple[str, str], tuple[Comparison, Improvement]]  # what is claimed; beside it the bootstrap's

    @property
    def exploratory(self) -> bool:
        return len(self.study.sizes[self.size].seeds) < MIN_RUNS

    @property
    def any_scores(self) -> bool:
        return any(result.state == "finished" and result.scores.size for result in self.results)


def findings(study: Study, size: str, command: str, results: Sequence[Result]) -> Findings:
    """Statistics, verdicts and comparisons of the results of a size."""
    scores = [statistics(result) for result in results]
    verdicts = [verdict(result, found, study) for result, found in zip(results, scores, strict=True)]
    environments = complete(results, study)
    matrices = {}
    if environments and len(study.sizes[size].seeds) > 1:
        matrices = {name: score_matrix(results, study, name, environments) for name in study.algorithms}
    together = {name: summary(matrix) for name, matrix in matrices.items()}
    comparisons = {}
    for pair in itertools.combinations(matrices, 2):
        first, second = (matrices[name] for name in pair)
        comparisons[pair] = compare(first, second), probability_of_improvement(first, second)
    return Findings(study, size, command, results, scores, verdicts, environments, together, comparisons)


def machine_of(recorded: Mapping[str, Any]) -> str:
    """Kind of device, cores, engine of the physics; no names."""
    machine = recorded.get("machine", {})
    kinds = Counter(machine.get("devices", []))
    devices = ", ".join(kind if kind == "cpu" else f"{count} x {kind}" for kind, count in kinds.items())
    engine = f", physics {recorded['physics']}" if recorded.get("physics") not in (None, "", "auto") else ""
    return f"{devices}, {machine.get('cores', '?')} cores{engine}"


def changed_settings(result: Result) -> dict[str, Any]:
    """What a program was run with that is not a default. Places of files are left out of their names."""
    settings = {k: s for k, s in result.recorded.get("settings", {}).items() if s["from"] != "default" and k != "seed"}
    return {k: Path(v).name if isinstance(v := s["value"], str) and v[:1] == "/" else v for k, s in settings.items()}


def numbers(found: Findings) -> dict[str, Any]:
    """results.json: everything in numbers, null where there is none."""
    programs = []
    for result, scores, judged in zip(found.results, found.scores, found.verdicts, strict=True):
        program, recorded = result.program, result.recorded
        reference = found.study.references.get((program.variant, program.env))
        entry = {"algorithm": program.variant, "env": program.env, "state": result.state, "steps": result.steps}
        entry |= scores._asdict() | {"verdict": judged.word, "reason": judged.reason}
        entry |= {"reference": vars(reference) if reference else None}
        entry |= {"minutes": result.minutes, "steps_per_second": result.steps_per_second}
        entry |= {key: recorded.get(key) for key in ("machine", "physics", "versions", "commit", "resumed")}
        entry |= {"settings": changed_settings(result), "runs": []}
        entry["runs"] = [
            {"seed": r.seed, "score": r.score, "error": r.error, "steps": r.steps, "returns": r.returns}
            for r in result.runs
        ]
        programs.append(entry)
    comparisons = [
        {"first": first, "second": second, **how._asdict(), "bootstrap_interval": [by.low, by.high]}
        for (first, second), (how, by) in found.comparisons.items()
    ]
    content = {"format": 1, "study": found.study.name, "size": found.size, "command": found.command}
    content |= {"seeds": found.study.sizes[found.size].seeds, "tuning_seeds": found.study.tuning_seeds}
    content |= {"exploratory": found.exploratory, "environments_together": list(found.environments)}
    content |= {"together": {name: scores._asdict() for name, scores in found.together.items()}}
    return _plain({**content, "comparisons": comparisons, "programs": programs})


def _plain(value: Any) -> Any:
    """For JSON: six digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
