"""A small document of headings, paragraphs, tables, code and pictures, as Markdown and as one page of HTML.

Text may hold `code` and **bold**, nothing else. The page needs nothing from elsewhere: pictures are inside it.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; }
code, pre { background: #f4f4f4; border-radius: 3px; padding: 0 0.2rem; }
pre { padding: 0.6rem; overflow-x: auto; }
img { max-width: 100%; }
"""


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    text: str


class Code(NamedTuple):
    text: str


class Picture(NamedTuple):
    file: str  # beside the document
    about: str


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Heading | Paragraph | Code | Picture | Table


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(file, about):
            return f"![{about}]({file})"
        case Table(header, rows):
            lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
            lines.insert(1, ["---"] * len(header))
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Paragraph(text):
            return text


def page(title: str, blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """One page of HTML; `pictures`: file name -> PNG."""
    body = "\n".join(_html(block, pictures) for block in blocks)
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html(block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(file, about):
            data = base64.b64encode(pictures[file]).decode()
            return f'<p><img alt="{html.escape(about)}" src="data:image/png;base64,{data}"></p>'
        case Table(header, rows):
            lines = [f"<tr>{''.join(f'<th>{_inline(cell)}</th>' for cell in header)}</tr>"]
            lines += [f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows]
            return "<table>\n" + "\n".join(lines) + "\n</table>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
