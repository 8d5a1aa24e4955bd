"""Sections of a report as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

EMBED_LIMIT_BYTES = 1_000_000

STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1c1c1a; --soft: #5f5f5a;
  --line: #dcdcd6; --lead: #eef4f9; --mark: #dcebf6; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e8e8e4; --soft: #a3a39d;
  --line: #3a3d42; --lead: #1e2a35; --mark: #22394d; } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 44rem; } a { color: inherit; }
.lead { background: var(--lead); border-left: 4px solid #0072b2; padding: .8rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.mark { background: var(--mark); font-weight: 600; }
figure { margin: 1rem 0; padding: .75rem; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 34rem; height: auto; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the report, the same for both formats.

    Attributes:
        title: Heading.
        lead: A sentence that must not be missed.
        paragraphs: Plain text.
        table: Lines of cells, the first of which is the header.
        marked: Index into `table` of the line that stands out.
        image: Path of a PNG, relative to the report's folder.
        alt: What the image shows.
        data: Path of the CSV that holds what the image draws, likewise.
        images: What further images show, by path.
        code: Commands to copy.
        link: Path of another file, relative to the report's folder.
        anchor: Name to link to the section by.
    """

    title: str
    lead: str = ""
    paragraphs: list[str] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    marked: int | None = None
    image: str = ""
    alt: str = ""
    data: str = ""
    images: dict[str, str] = field(default_factory=dict)
    code: str = ""
    link: str = ""
    anchor: str = ""


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown, which refers to its images by relative paths."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.title}")
        if section.lead:
            blocks.append(f"**{section.lead}**")
        if section.table:
            blocks.append(_markdown_table(section.table, section.marked))
        if section.image:
            blocks.append(f"![{section.alt}]({section.image})")
        blocks += [f"![{alt}]({image})\n\n{alt}" for image, alt in section.images.items()]
        if section.data:
            blocks.append(f"Data: [{section.data}]({section.data})")
        blocks += section.paragraphs
        if section.code:
            blocks.append(f"```sh\n{section.code}\n```")
        if section.link:
            blocks.append(f"[{section.link}]({section.link})")
    return "\n\n".join(blocks) + "\n"


def to_html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The report as one HTML page with its images inside.

    Args:
        title: Of the page.
        sections: In order.
        folder: Where the sections' images lie. One over `EMBED_LIMIT_BYTES` is referred to by its
            relative path, so that the page stays small.
    """
    body = "\n".join(_html_section(section, folder) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _markdown_table(table: list[list[str]], marked: int | None) -> str:
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in table]
    if marked is not None:
        lines[marked] = [f"**{cell}**" for cell in lines[marked]]
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]])


def _html_section(section: Section, folder: Path) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.lead:
        parts.append(f'<p class="lead">{escape(section.lead)}</p>')
    if section.table:
        parts.append(_html_table(section.table, section.marked))
    if section.image:
        source = _image_source(folder, section.image)
        parts.append(f'<figure><img src="{source}" alt="{escape(section.alt)}"></figure>')
    for image, alt in section.images.items():
        source, alt = _image_source(folder, image), escape(alt)
        parts.append(
            f'<figure><img src="{source}" alt="{alt}"><figcaption>{alt}</figcaption></figure>'
        )
    if section.data:
        data = escape(section.data)
        parts.append(f'<p>Data: <a href="{data}">{data}</a></p>')
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
    if section.code:
        parts.append(f"<pre><code>{escape(section.code)}</code></pre>")
    if section.link:
        link = escape(section.link)
        parts.append(f'<p><a href="{link}">{link}</a></p>')
    anchor = f' id="{escape(section.anchor)}"' if section.anchor else ""
    return f"<section{anchor}>\n" + "\n".join(parts) + "\n</section>"


def _html_table(table: list[list[str]], marked: int | None) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table[0])
    lines = [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for number, cells in enumerate(table[1:], start=1):
        inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        start = '<tr class="mark">' if number == marked else "<tr>"
        lines.append(f"{start}{inner}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def _image_source(folder: Path, image: str) -> str:
    data = (folder / image).read_bytes()
    if len(data) > EMBED_LIMIT_BYTES:
        return escape(image)
    return "data:image/png;base64," + base64.b64encode(data).decode()
