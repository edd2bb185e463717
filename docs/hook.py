"""What the pages take out of the code when the site is built: docstrings, settings, names, and the studies' reports.

A line that is a link to a source with a title, `[...](../rlx/schedule.py "settings TrainConfig")`, is replaced: so who
reads the page in the repository is led there. Sources are read, not imported, but for tables of names. Links out of
docs/ lead to the studies' pages, which become part of the site; other files of the repository are named instead. A dead
one stops the build.
"""

from __future__ import annotations

import ast
import html
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from envs.names import NAMES  # noqa: E402
from rlx.algorithms import ALGORITHMS  # noqa: E402

PICTURES = (".png", ".gif", ".svg")
FIELD = re.compile(r"    (\w+): (.+?) = (.+?)  # (.+)")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def docstring(path: Path) -> str:
    """What stands above an algorithm's code: the paper, the equations, and what differs."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    if text is None:
        raise ValueError(f"{path} has no docstring")
    return text


def settings(path: Path, dataclass: str) -> str:
    """A table of the fields of a dataclass, with the comments behind them. Raises ValueError where one has none."""
    source = path.read_text()
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == dataclass)
    lines = source.splitlines()
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            found = FIELD.fullmatch(lines[field.lineno - 1])
            if found is None:
                raise ValueError(f"{path}: a field of {dataclass} has no comment: {ast.unparse(field)}")
            name, kind, default, comment = (part.replace("|", "\\|") for part in found.groups())
            kind = re.sub(r"(Annotated|tyro[\w.]*)\[(\w+).*", r"\2", kind)
            rows.append(f"| `{name}` | `{kind}` | `{default}` | {html.escape(comment, quote=False)} |")
    return "\n".join(rows)


def algorithms(path: Path) -> str:
    """A table of all algorithms, whose files lie beside `path`."""
    titles = {name: docstring(path.with_name(f"{name}.py")).partition("\n")[0] for name in ALGORITHMS}
    rows = [f"| [`{name}`]({name}.md) | {title} |" for name, title in titles.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def environments(_: Path) -> str:
    """A list of every environment's name, by suite."""
    return "\n".join(f"- `{suite}/`: {', '.join(f'`{name}`' for name in names)}" for suite, names in NAMES.items())


TABLES = {"docstring": docstring, "settings": settings, "algorithms": algorithms, "environments": environments}


def expand(text: str, page: str) -> str:
    """`text` of a page, by its path in the repository, with what its titled links stand for."""

    def table(line: re.Match[str]) -> str:
        word, *arguments = line[2].split()
        return TABLES[word]((ROOT / page).parent / line[1], *arguments)

    return re.sub(r'^\[.+\]\((\S+) "(.+)"\)$', table, text, flags=re.M)


def published() -> list[str]:
    """Paths of the studies' pages and pictures, as they lie in the repository."""
    found = [*ROOT.glob("experiments/*/README.md"), *ROOT.glob("experiments/*/report/*/*")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.suffix in (".md", *PICTURES))


def relink(text: str, page: str, pages: set[str]) -> str:
    """Links of a page, by paths in the repository, as the site needs them. Raises ValueError for a dead one."""

    def link(found: re.Match[str]) -> str:
        picture, words, target, anchor = found.groups(default="")
        path = os.path.normpath(os.path.join(os.path.dirname(page), target))
        if not (ROOT / path).exists():
            raise ValueError(f"{page}: {target} does not exist")
        if path.startswith("docs/") or path in pages:
            here, there = (re.sub("^docs/", "", name) for name in (page, path))
            return f"{picture}[{words}]({os.path.relpath(there, os.path.dirname(here) or '.')}{anchor})"
        return words if path in words else f"{words} (`{path}`)"

    return LINK.sub(link, text)


def on_files(files: Any, config: Any) -> Any:
    """Adds the studies. Raises ValueError for an algorithm without a page, or a page without an algorithm."""
    from mkdocs.structure.files import File

    written = {path.stem for path in (ROOT / "docs/algorithms").glob("*.md")} - {"index"}
    if written != set(ALGORITHMS):
        raise ValueError(f"docs/algorithms/ and ALGORITHMS differ in {sorted(written ^ set(ALGORITHMS))}")
    for path in published():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A page as it is rendered."""
    name = page.file.src_uri if page.file.src_uri.startswith("experiments/") else f"docs/{page.file.src_uri}"
    return relink(expand(markdown, name), name, set(published()))
