"""A study as data: algorithms times environments times seeds, budgets, settings, and the figures to stand beside.

`experiments/<name>/study.py` holds one as `STUDY`; `rlx reproduce NAME` runs what is missing of it and writes its
report. One algorithm on one environment is one program: all seeds train in it. Free of jax.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlx import external
from rlx.errors import UserError, require, unknown

TRUST = ("high", "medium", "low")


def nothing() -> Any:
    """A field that is an empty mapping where it is not given."""
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Somebody else's figure for one algorithm on one environment, to be judged against (`rlx.results.verdict`)."""

    value: float  # mean return of their runs
    sd: float | None  # over their runs; None: not published
    runs: str  # how many, as far as is known
    steps: int | None  # environment steps each of them took; None: not published
    source: str  # where it is from
    trust: str  # high, medium or low


@dataclasses.dataclass(frozen=True)
class Variant:
    """An algorithm with settings of its own."""

    algorithm: str  # as on the command line; a file that is not absolute lies beside study.py
    settings: Mapping[str, Any] = nothing()  # flat, as on the command line: {"algo.gamma": 0.9}
    data: Mapping[str, tuple[str, ...]] = nothing()  # environment -> data sets; a relative path lies beside study.py
    start: str = ""  # an algorithm before it, with whose policy (of the first seed) on an environment it begins
    instead: Mapping[str, str] = nothing()  # environment -> one to learn on in its place: a team's body as one agent's


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment. Scores of several are averaged after (return - low) / (high - low)."""

    low: float  # the return that counts as 0, of runs that failed too
    high: float  # the return that counts as 1
    settings: Mapping[str, Any] = nothing()  # for every algorithm on it
    env: str = ""  # what `rlx train` takes, where the study calls it otherwise: a game under each of its penalties


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of a study is run."""

    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = nothing()
    environments: Mapping[str, Mapping[str, Any]] = nothing()  # which of them, with settings; empty: all


@dataclasses.dataclass(frozen=True)
class Study:
    """Settings apply over the preset of each pair: the study's, the task's, the variant's, the size's, the size's for
    an environment, the last above the others. Raises UserError for what contradicts itself."""

    name: str  # of its folder in runs/
    title: str
    about: str  # what it asks, in a few sentences
    algorithms: Mapping[str, Variant]  # by a name of one's choice
    environments: Mapping[str, Task]  # by the name that `rlx train` takes, or one of its own (Task.env)
    sizes: Mapping[str, Size]  # the first is run where none is named
    references: Mapping[tuple[str, str], Reference] = nothing()  # (algorithm's name here, environment)
    settings: Mapping[str, Any] = nothing()
    tuning_seeds: tuple[int, ...] = ()  # on which settings were picked: none of them may be reported
    tolerance: float = 0.05  # share of a reference's value that stands for its sd where that is not known

    def __post_init__(self) -> None:
        check(self)


class Program(NamedTuple):
    """One algorithm on one environment, all its seeds."""

    variant: str
    env: str  # as the study names it
    algorithm: str  # references that mean the same in any working directory
    env_reference: str
    layers: tuple[tuple[str, Mapping[str, Any]], ...]  # (where from, flat settings) above the preset
    seeds: tuple[int, ...]
    data: tuple[str, ...] = ()  # files
    start: Path | None = None  # the run in the folder of the study's size that the policy to start from is of

    @property
    def title(self) -> str:
        return f"{self.variant} on {self.env}"

    @property
    def folder(self) -> Path:
        """Where its runs lie in the folder of the study's size."""
        return Path(self.variant) / folder_name(self.env)


def run_name(seed: int) -> str:
    return f"seed-{seed}"


def folder_name(env: str) -> str:
    return re.sub(r"[^\w.-]+", "-", env).strip("-.")


def check(study: Study) -> None:
    """Raises UserError where a study contradicts itself. Names of algorithms and environments are not looked up."""
    _check_parts(study)
    for name, size in study.sizes.items():
        seeds = size.seeds
        whole = isinstance(seeds, tuple) and all(type(s) is int and 0 <= s < 2**32 for s in seeds)
        distinct = whole and bool(seeds) and len(set(seeds)) == len(seeds)
        require(distinct, f"sizes[{name!r}].seeds", seeds, "a tuple of at least one whole number below 2^32, each once")
        reported = sorted(set(seeds) & set(study.tuning_seeds))
        require(not reported, f"sizes[{name!r}].seeds", reported, "settings were tuned on these: report others")
        for env in size.environments:
            if env not in study.environments:
                raise unknown(f"sizes[{name!r}]: environment of the study", env, study.environments)
    for index, (name, variant) in enumerate(study.algorithms.items()):
        earlier = list(study.algorithms)[:index]
        if variant.start and variant.start not in earlier:
            raise unknown(f"algorithms[{name!r}].start: an algorithm before it", variant.start, earlier)
        for field in ("data", "instead"):
            for env in getattr(variant, field):
                if env not in study.environments:
                    raise unknown(f"algorithms[{name!r}].{field}: environment of the study", env, study.environments)
    for (algorithm, env), reference in study.references.items():
        if algorithm not in study.algorithms:
            raise unknown("references: algorithm of the study", algorithm, study.algorithms)
        if env not in study.environments:
            raise unknown("references: environment of the study", env, study.environments)
        where = f"references[{(algorithm, env)!r}]"
        require(math.isfinite(reference.value), f"{where}.value", reference.value, "a number")
        sd_is_one = reference.sd is None or (math.isfinite(reference.sd) and reference.sd >= 0)
        require(sd_is_one, f"{where}.sd", reference.sd, "at least 0, or None where it is not known")
        require(
            reference.steps is None or reference.steps > 0, f"{where}.steps", reference.steps, "at least 1, or None"
        )
        require(reference.trust in TRUST, f"{where}.trust", reference.trust, ", ".join(TRUST))
        require(bool(reference.source), f"{where}.source", reference.source, "where the figure is from")


def _check_parts(study: Study) -> None:
    require(_is_folder(study.name), "name", study.name, "letters, digits, _ . and -")
    for field in ("algorithms", "environments", "sizes"):
        require(bool(getattr(study, field)), field, getattr(study, field), "at least one")
    for name in (*study.algorithms, *study.sizes):
        require(_is_folder(name), "algorithms and sizes", name, "letters, digits, _ . and -")
    folders = [folder_name(env) for env in study.environments]
    require(len(set(folders)) == len(folders), "environments", list(study.environments), "names that differ as folders")
    for env, task in study.environments.items():
        require(task.low < task.high, f"environments[{env!r}]", (task.low, task.high), "low below high")
    require(study.tolerance > 0, "tolerance", study.tolerance, "above 0")
    parts: list[Variant | Task | Size | Study] = [study, *study.algorithms.values(), *study.environments.values()]
    layers = [part.settings for part in (*parts, *study.sizes.values())]
    layers += [own for size in study.sizes.values() for own in size.environments.values()]
    for layer in layers:
        require("seed" not in layer, "settings", "seed", "seeds are those of the sizes")


def _is_folder(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+", name)) and name.strip(".-") == name


def programs(study: Study, size: str, folder: str | Path) -> list[Program]:
    """What a size consists of, environment by environment. `folder`: of study.py, beside which own files lie.

    Raises UserError for a size that there is not.
    """
    if size not in study.sizes:
        raise unknown("size of the study", size, study.sizes)
    chosen = study.sizes[size]
    found = []
    for env in chosen.environments or study.environments:
        for name, variant in study.algorithms.items():
            layers = (
                ("study", study.settings),
                ("study, this environment", study.environments[env].settings),
                ("study, this algorithm", variant.settings),
                (f"study, size {size}", chosen.settings),
                (f"study, size {size}, this environment", chosen.environments.get(env, {})),
            )
            wanted = variant.instead.get(env) or study.environments[env].env or env
            own, of_env = (beside(reference, folder) for reference in (variant.algorithm, wanted))
            data = tuple(str(Path(folder).absolute() / file) for file in variant.data.get(env, ()))
            start = Path(variant.start) / folder_name(env) / run_name(chosen.seeds[0]) if variant.start else None
            found.append(Program(name, env, own, of_env, layers, chosen.seeds, data, start))
    return found


def beside(reference: str, folder: str | Path) -> str:
    """`reference`; where it is a file without an absolute path, the one in `folder`."""
    target, colon, function = reference.partition(":")
    return str(Path(folder).absolute() / target) + colon + function if target.endswith(".py") else reference


def select(programs: Iterable[Program], names: Iterable[str]) -> list[Program]:
    """Those of these algorithms, on these environments: named in full, or environments by what follows the last slash.

    Where no algorithm is named all of them count, and so with environments. Raises UserError for other names.
    """
    programs, algorithms, envs = list(programs), set(), set()
    for given in names:
        named = {program.variant for program in programs if program.variant == given}
        on = {program.env for program in programs if given in (program.env, program.env.rpartition("/")[2])}
        if not named | on:
            known = {name for program in programs for name in (program.variant, program.env)}
            raise unknown("algorithm or environment of the study", given, known)
        algorithms |= named
        envs |= on
    return [
        program
        for program in programs
        if (not algorithms or program.variant in algorithms) and (not envs or program.env in envs)
    ]


def load(reference: str) -> tuple[Study, Path]:
    """The study that `reference` names and the folder of its file: a name in experiments/, a folder, or a file.

    Raises UserError where there is none, with close names, or where the file cannot be read.
    """
    found = {path.parent.name: path for path in sorted(Path("experiments").glob("*/study.py"))}
    path = Path(reference)
    file = path if path.is_file() else path / "study.py" if (path / "study.py").is_file() else found.get(reference)
    if file is None:
        if found and "/" not in reference:
            raise unknown("study", reference, found)
        raise UserError(f"there is no study {reference!r}: neither a study.py or its folder, nor in experiments/ here.")
    try:
        module = external.load_file(file.absolute())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{str(file)!r} cannot be read: {error!r}.") from error
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(f"{str(file)!r} defines no STUDY = rlx.study.Study(...).")
    return study, file.absolute().parent
