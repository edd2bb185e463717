"""Which studies' checked-in reports are older than the code that they show.

    python experiments/stale.py

For every small report it lists the commits since its runs that touched what decides their numbers: candidates, of which
the diffs say whether numbers can have changed. Run it in the root of the repository. Free of jax.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs import SUITES
from rlx.algorithms import ALGORITHMS
from rlx.errors import UserError, require
from rlx.study import Program, load, programs

LOOP = "rollout epoch training learners evaluation group schedule compilation sharding agents".split()
ALWAYS = (*(f"rlx/{name}.py" for name in LOOP), "envs/physics", "rlx/presets/default.toml")  # of every run
SILENT = {"rlx.errors", "rlx.machine", "envs.viewer"}  # no number depends on them


def stale(folder: Path, root: Path) -> list[str]:
    """A study's algorithms that something changed for since their runs, and the commits with the files they touched.

    `folder`: of its report. Raises UserError for commits that git does not know, and rows that the study lacks.
    """
    found = json.loads((folder / "results.json").read_text())
    study, place = load(str(folder.parents[1]))
    known = {(program.variant, program.env): program for program in programs(study, found["size"], place)}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in found["programs"]:
        pair = (each["algorithm"], each["env"])
        require(pair in known, f"{place.name}: {pair[0]} on {pair[1]}", "not in the study", "what study.py still holds")
        groups.setdefault((known[pair].algorithm, each["commit"] or "not known"), []).append(each)
    lines, changes = [], {}
    for (algorithm, commit), own in groups.items():
        files = sources([known[each["algorithm"], each["env"]] for each in own], root)
        since = changed(root, commit, files)
        changes |= {change: since.get(change, set()) | changes.get(change, set()) for change in since}
        if since:
            golden = "differ" if golden_at(root, commit, algorithm) != golden_at(root, "HEAD", algorithm) else "agree"
            names = ", ".join(dict.fromkeys(each["algorithm"] for each in own))
            minutes = sum(each["minutes"] for each in own)
            lines.append(f"  {names} at {commit[:7]}, {minutes:.1f} minutes; golden numbers {golden}")
    return [*lines, *(f"    {change} [{', '.join(sorted(files))}]" for change, files in changes.items())]


def changed(root: Path, commit: str, files: Sequence[str]) -> dict[str, set[str]]:
    """Commits since then, the newest first: name and subject -> those of the files that it touched."""
    log = git(root, "log", "--no-merges", "--name-only", "--format=%x00%h %s", f"{commit}..HEAD", "--", *files)
    entries = [entry.splitlines() for entry in log.split("\0")[1:]]
    return {subject: {name for name in names if name} for subject, *names in entries}


def sources(own: Iterable[Program], root: Path) -> list[str]:
    """What decides the programs' numbers: their algorithm, their suite, what these import, the loop, presets."""
    found, waiting = set(ALWAYS), set()
    for program in own:
        suite = program.env_reference.partition("/")[0]
        env = SUITES.get(suite, program.env_reference.partition(":")[0])
        both = (ALGORITHMS.get(program.algorithm, program.algorithm), env)
        waiting |= {name for name in (file_of(module, root) for module in both) if (root / name).exists()}
        found.add(f"rlx/presets/{suite}.toml")
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= {name for name in imported(root / file) if (root / name).exists()} - found
    return sorted(name for name in found if (root / name).exists())


def file_of(module: str, root: Path) -> str:
    """A module's file below the root; files of a study's own are named already."""
    own = module.endswith(".py")
    return str(Path(module).relative_to(root.absolute())) if own else f"{module.replace('.', '/')}.py"


def imported(file: Path) -> set[str]:
    """Modules of rlx and envs that a file imports by name; what is none does not exist as a file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("rlx", "envs"):
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f"{name.replace('.', '/')}.py" for name in found - SILENT}


def golden_at(root: Path, commit: str, algorithm: str) -> str:
    """The golden numbers of one update as they stood in the tests then; empty where there were none."""
    test = f"tests/test_{algorithm}.py"
    if not git(root, "ls-tree", "--name-only", commit, test):
        return ""
    return git(root, "show", f"{commit}:{test}").partition("\nGOLDEN = ")[2].partition("}")[0]


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`git {' '.join(arguments[:4])}` failed: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    root = Path.cwd()
    try:
        found = sorted(path.parent for path in root.glob("experiments/*/report/small/results.json"))
        require(
            bool(found), "experiments/*/report/small/results.json", "none", "run this in the root of the repository"
        )
        for folder in found:
            print(f"{folder.parts[-3]}:", *(stale(folder, root) or ["  nothing changed"]), sep="\n")
    except UserError as error:
        print(f"stale: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
