"""Writes the results in README and docs/results.md, between two markers, out of the studies' checked-in reports.

    python experiments/results_table.py    # or `make results`

Run it in the root of the repository. Free of jax.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlx.documents import Block, Heading, Paragraph, Table, markdown
from rlx.errors import UserError, require
from rlx.files import write_atomically
from rlx.results import FLOOR, short

BEGIN = "<!-- Written by `make results` out of experiments/*/report/small/results.json. -->"
END = "<!-- The end of what `make results` writes. -->"
FIRST = ("ppo_dm_control", "sac_dm_control", "ppo_basics")  # the others follow by name
FEW = 5  # so many seeds are shown each by itself


def documents() -> dict[str, Callable[[Path], list[Block]]]:
    """What stands between the markers of each document."""
    return {"README.md": summary, "docs/results.md": sections}


def reports(root: Path) -> list[Path]:
    """Folders of the small reports, in README's order. Raises UserError where there is none."""
    found = [path.parent for path in root.glob("experiments/*/report/small/results.json")]
    require(bool(found), "experiments/*/report/small/results.json", "none", "run this in the root of the repository")
    order = {name: index for index, name in enumerate(FIRST)}
    return sorted(found, key=lambda folder: (order.get(folder.parts[-3], len(order)), folder.parts[-3]))


def with_results(name: str, root: Path) -> str:
    """A document with the part between the markers written anew. Raises UserError where it does not hold each once."""
    require((root / name).is_file(), name, "none", "run this in the root of the repository")
    text = (root / name).read_text()
    for marker in (BEGIN, END):
        require(text.count(marker) == 1, name, f"{text.count(marker)} times {marker!r}", "each marker once")
    before, rest = text.split(BEGIN)
    require(END in rest, name, "the second marker is first", f"{BEGIN!r} before {END!r}")
    return f"{before}{BEGIN}\n\n{markdown(documents()[name](root))}\n{END}{rest.split(END)[1]}"


def summary(root: Path) -> list[Block]:
    """One table of all studies, a row an environment."""
    rows = []
    for folder in reports(root):
        programs = json.loads((folder / "results.json").read_text())["programs"]
        study = f"[{folder.parts[-3]}]({folder.relative_to(root).parents[1]}/README.md)"
        for env in dict.fromkeys(program["env"] for program in programs):
            here = [program for program in programs if program["env"] == env]
            means = ", ".join(f"{program['algorithm']} {brief(program)}" for program in here)
            judged = [reference(program, of=len(here) > 1) for program in here if program["reference"]]
            rows.append([study, f"`{env}`", means, "; ".join(judged)])
            study = ""
    return [Table(["study", "environment", "mean return ± sd over seeds", "reference: verdict"], rows)]


def sections(root: Path) -> list[Block]:
    """Every study by itself, for a document in docs/."""
    return [block for folder in reports(root) for block in section(folder, root)]


def section(folder: Path, root: Path) -> list[Block]:
    """One study: what was run and where more stands, a row a program, the sources of its references."""
    found = json.loads((folder / "results.json").read_text())
    rows = found["programs"]
    title = (folder / "report.md").read_text().splitlines()[0].removeprefix("# ")
    minutes = sum(program["minutes"] for program in rows)
    commits = ", ".join(f"`{commit[:7]}`" for commit in commits_of(rows))
    here = f"../{folder.relative_to(root)}"
    about = (
        f"`{found['command']}`, {len(found['seeds'])} seeds, {minutes:.0f} minutes, commit {commits} "
        f"([report]({here}/report.md), [README](../{folder.relative_to(root).parents[1]}/README.md))."
    )
    sources = "; ".join(dict.fromkeys(p["reference"]["source"] for p in rows if p["reference"]))
    blocks: list[Block] = [Heading(2, title), Paragraph(wrapped(about)), Table(*table(rows, bool(sources)))]
    return [*blocks, Paragraph(wrapped(f"References: {sources}."))] if sources else blocks


def table(entries: Sequence[Mapping[str, Any]], referenced: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows; an environment is named in the first of its rows."""
    header = ["environment", "algorithm", "steps", "minutes", "mean return", *["reference, verdict"] * referenced]
    rows, shown = [], ""
    for program in entries:
        env = "" if program["env"] == shown else f"`{program['env']}`"
        shown = program["env"]
        row = [env, program["algorithm"], short(program["steps"]), f"{program['minutes']:.1f}", score(program)]
        rows.append([*row, *[reference(program)] * referenced])
    return header, rows


def brief(program: Mapping[str, Any]) -> str:
    """The mean and the standard deviation over runs."""
    if program["state"] != "finished":
        return f"not finished ({program['state']})"
    sd = program["sd"]
    return number(program["mean"]) + ("" if sd is None else f" ± {sd:.0f}" if sd >= 9.95 else f" ± {sd:.2g}")


def score(program: Mapping[str, Any]) -> str:
    """The mean; of few runs each, of many the interquartile mean and its 95 % interval."""
    if program["state"] != "finished":
        return f"not finished ({program['state']})"
    mean, runs = number(program["mean"]), program["runs"]
    if len(runs) <= FEW:
        return f"{mean} ({', '.join(number(run['score']) for run in runs)})"
    failed = sum(run["score"] is None for run in runs)
    spread = f"IQM {number(program['iqm'])}, {number(program['low'])} to {number(program['high'])}"
    return f"{mean} ({spread}{f'; {failed} runs stopped' if failed else ''})"


def reference(program: Mapping[str, Any], of: bool = False) -> str:
    """The figure (`of`: of which algorithm), its spread and budget, and the verdict with what takes its weight away."""
    found = program["reference"]
    if not found:
        return ""
    spread = "" if found["sd"] is None else f" ± {number(found['sd'])}"
    budget = f" after {short(found['steps'])}" if found["steps"] else ""
    doubts = ["not clear"] * ("not clear" in program["reason"])
    doubts += ["its interval reaches the lowest score"] * (FLOOR in program["reason"])
    doubt = f" ({'; '.join(doubts)})" if doubts else ""
    whose = f"{program['algorithm']} " if of else ""
    return f"{whose}{number(found['value'])}{spread}{budget}: {program['verdict']}{doubt}"


def number(value: float | None) -> str:
    """Three digits, and never less than whole numbers; a run that was stopped has none."""
    if value is None:
        return "stopped"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)


def commits_of(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Each that a program was begun at, once."""
    return list(dict.fromkeys(program["commit"] or "not known" for program in entries))


def main() -> int:
    root = Path.cwd()
    try:
        for name, text in {name: with_results(name, root) for name in documents()}.items():  # all or none
            write_atomically(root / name, text)
    except UserError as error:
        print(f"results_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
