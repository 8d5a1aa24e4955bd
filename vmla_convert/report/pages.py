"""Sections of a report as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

EMBED_LIMIT_BYTES = 600_000

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<nav aria-label="Contents">
<ol>
{contents}
</ol>
</nav>
<main>
{body}
</main>
</body>
</html>
"""
# For a page opened from disk 'self' matches nothing; images then have the scheme file.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:"
# Characters that Markdown, or HTML within Markdown, would interpret.
MARKUP = re.compile(r"([\\<*|\[\]`])")
NUMBER = re.compile(r"[+-]?\d[^,;]*|–|diverged|")


@dataclass(frozen=True)
class Text:
    """A paragraph. A lead is drawn large: the answer."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Table:
    """Lines of cells; the first line is the header.

    Attributes:
        lines: Lines of equal length.
        label: Name of the table for screen readers.
        marked: Index of the emphasised line; None for none.
    """

    lines: Sequence[Sequence[str]]
    label: str
    marked: int | None = None


@dataclass(frozen=True)
class Picture:
    """An image beside the report.

    Attributes:
        path: Path of a PNG, relative to the report's folder.
        alt: Description of the image.
        data: Path of the data behind the image; empty for none.
    """

    path: str
    alt: str
    data: str = ""


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str
    language: str = "sh"


Block = Text | Table | Picture | Code


@dataclass(frozen=True)
class Section:
    """A part of the report, the same for both formats. Titles are unique."""

    title: str
    blocks: Sequence[Block]


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown, with relative paths of images."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += map(_markdown, section.blocks)
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The report as one self-contained HTML page with embedded images.

    Images lie in `folder`; images above `EMBED_LIMIT_BYTES` are linked by relative path instead.
    """
    style = files("vmla_convert.report").joinpath("page.css").read_text("utf-8")
    return PAGE.format(
        policy=POLICY,
        title=escape(title),
        style=style,
        contents="\n".join(
            f'<li><a href="#{_anchor(each)}">{escape(each.title)}</a></li>' for each in sections
        ),
        body="\n".join(_html_section(section, folder) for section in sections),
    )


def _markdown(block: Block) -> str:
    match block:
        case Text(text, lead):
            return f"**{_plain(text)}**" if lead else _plain(text)
        case Table():
            return _markdown_table(block)
        case Picture(path, alt, data):
            image = f"![{_plain(alt)}]({quote(path)})"
            return f"{image}\n\n[{_plain(data)}]({quote(data)})" if data else image
        case Code(text, language):
            return f"```{language}\n{text}\n```"


def _html(block: Block, folder: Path) -> str:
    match block:
        case Text(text, lead):
            kind = ' class="lead"' if lead else ""
            return f"<p{kind}>{escape(text)}</p>"
        case Table():
            return _html_table(block)
        case Picture():
            return _html_figure(block, _source(folder / block.path, block.path))
        case Code(text):
            # A box that scrolls must be reachable by keyboard.
            return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def _markdown_table(table: Table) -> str:
    lines = [[_plain(cell) for cell in cells] for cells in table.lines]
    if table.marked is not None:
        lines[table.marked] = [f"**{cell}**" for cell in lines[table.marked]]
    rule = ["---:" if is_number else "---" for is_number in _numeric(table)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])


def _html_table(table: Table) -> str:
    kinds = [' data-kind="number"' if is_number else "" for is_number in _numeric(table)]
    head = "".join(
        f'<th scope="col"{kind}>{escape(cell)}</th>'
        for cell, kind in zip(table.lines[0], kinds, strict=True)
    )
    body: list[str] = []
    for number, (first, *cells) in enumerate(table.lines[1:], start=1):
        current = ' aria-current="true"' if number == table.marked else ""
        parts = [f'<th scope="row"{kinds[0]}>{escape(first)}</th>']
        parts += [f"<td{k}>{escape(cell)}</td>" for cell, k in zip(cells, kinds[1:], strict=True)]
        body.append(f"<tr{current}>{''.join(parts)}</tr>")
    # A box that scrolls must be reachable by keyboard.
    return (
        f'<div class="wide" role="region" aria-label="{escape(table.label)}" tabindex="0">\n'
        f"<table>\n<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n" + "\n".join(body) + "\n"
        "</tbody>\n</table>\n</div>"
    )


def _html_figure(picture: Picture, source: str) -> str:
    paths = filter(None, [picture.path, picture.data])
    links = [f'<a href="{quote(path)}">{Path(path).suffix[1:].upper()}</a>' for path in paths]
    alt = escape(picture.alt)
    return (
        f'<figure>\n<div class="card"><img src="{source}" alt="{alt}"></div>\n'
        f'<figcaption><span>{alt}</span> <span class="files">{" ".join(links)}'
        "</span></figcaption>\n</figure>"
    )


def _numeric(table: Table) -> list[bool]:
    """For each column, whether all cells below the header are numbers or absent."""
    columns = zip(*table.lines[1:], strict=True)
    return [all(NUMBER.fullmatch(cell) for cell in column) for column in columns]


def _plain(text: str) -> str:
    """Text as one line of Markdown, with markup escaped."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def _anchor(section: Section) -> str:
    return "section-" + re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")


def _source(path: Path, image: str) -> str:
    """The `src` of an image: the bytes, or the path of a large image."""
    data = path.read_bytes()
    if len(data) > EMBED_LIMIT_BYTES:
        return quote(image)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _html_section(section: Section, folder: Path) -> str:
    leads = any(isinstance(block, Text) and block.lead for block in section.blocks)
    parts = [f'<h2 id="{_anchor(section)}">{escape(section.title)}</h2>']
    parts += [_html(block, folder) for block in section.blocks]
    kind = ' class="answer"' if leads else ""
    return (
        f'<section{kind} aria-labelledby="{_anchor(section)}">\n'
        + "\n".join(parts)
        + "\n</section>"
    )
