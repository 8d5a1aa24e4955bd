"""Sections of a report as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from vmla_convert.pipelines.report.cells import html_table, markdown_table

EMBED_LIMIT_BYTES = 1_000_000
# All embedded images together, as base64, so that the page stays under 3 MB.
EMBED_BUDGET_BYTES = 2_800_000

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
<nav aria-labelledby="contents">
<details open>
<summary id="contents">Contents</summary>
<ol>
{contents}
</ol>
</details>
</nav>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A part of the report, the same for both formats.

    Attributes:
        title: Heading.
        lead: What must not be missed; the page shows its first sentence large.
        paragraphs: Plain text.
        table: Lines of cells, the first of which is the header.
        marked: Index into `table` of the line that stands out.
        image: Path of a PNG, relative to the report's folder.
        alt: What the image shows.
        data: Path of the CSV with what the image draws, relative to the report's folder.
        images: What further images show, by path.
        code: Commands to copy.
        link: Path of another file, relative to the report's folder.
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


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report as Markdown, which refers to its images by relative paths."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.title}")
        if section.lead:
            blocks.append(f"**{section.lead}**")
        if section.table:
            blocks.append(markdown_table(section.table, section.marked))
        if section.image:
            blocks.append(f"![{section.alt}]({section.image})")
        blocks += [f"![{alt}]({image})\n\n{alt}" for image, alt in section.images.items()]
        if section.data:
            blocks.append(f"[{section.data}]({section.data})")
        blocks += section.paragraphs
        if section.code:
            blocks.append(f"```sh\n{section.code}\n```")
        if section.link:
            blocks.append(f"[{section.link}]({section.link})")
    return "\n\n".join(blocks) + "\n"


def to_html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The report as one HTML page with its images inside, which needs nothing from elsewhere.

    Args:
        title: Of the page.
        sections: In order.
        folder: Where the sections' images lie. Images that would make the page too large
            (`EMBED_LIMIT_BYTES`, `EMBED_BUDGET_BYTES`) are referred to by their relative paths.
    """
    style, script = _asset("page.css"), _asset("page.js")
    names = _section_ids([section.title for section in sections])
    images = [path for section in sections for path in (section.image, *section.images) if path]
    sources = _image_sources(folder, images)
    return PAGE.format(
        policy=_content_policy(style, script),
        title=escape(title),
        style=style,
        contents="\n".join(
            f'<li><a href="#{name}">{escape(section.title)}</a></li>'
            for name, section in zip(names, sections, strict=True)
        ),
        body="\n".join(
            _html_section(name, section, sources)
            for name, section in zip(names, sections, strict=True)
        ),
        script=script,
    )


def _asset(name: str) -> str:
    return files("vmla_convert.pipelines.report").joinpath(name).read_text(encoding="utf-8")


def _content_policy(style: str, script: str) -> str:
    """What the page may do: run its own style and script, show its images, fetch nothing."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    # 'self' is empty for a page opened from a disk, where an image beside it is of scheme file.
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )


def _section_ids(titles: Iterable[str]) -> list[str]:
    """A name for each heading that links can point to, unique on the page."""
    ids: list[str] = []
    for title in titles:
        stem = "section-" + (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "untitled")
        name, count = stem, 1
        while name in ids:
            count += 1
            name = f"{stem}-{count}"
        ids.append(name)
    return ids


def _image_sources(folder: Path, images: Iterable[str]) -> dict[str, str]:
    """What each image's `src` says: its bytes, or its path once the page would grow too large."""
    room = EMBED_BUDGET_BYTES
    sources: dict[str, str] = {}
    for image in dict.fromkeys(images):
        data = (folder / image).read_bytes()
        encoded = base64.b64encode(data).decode()
        if len(data) > EMBED_LIMIT_BYTES or len(encoded) > room:
            sources[image] = quote(image)
        else:
            sources[image] = f"data:image/png;base64,{encoded}"
            room -= len(encoded)
    return sources


def _html_section(name: str, section: Section, sources: dict[str, str]) -> str:
    parts = [f'<h2 id="{name}">{escape(section.title)}</h2>']
    if section.lead:
        parts.append(_html_lead(section.lead))
    if section.table:
        parts.append(html_table(section.table, section.marked, section.title))
    if section.image:
        source = sources[section.image]
        parts.append(_html_figure(section.image, section.alt, section.data, source))
    for image, alt in section.images.items():
        parts.append(_html_figure(image, alt, "", sources[image]))
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
    if section.code:
        parts.append(f'<pre tabindex="0"><code>{escape(section.code)}</code></pre>')
    if section.link:
        parts.append(f"<p>{_html_link(section.link, section.link)}</p>")
    kind = ' class="answer"' if section.lead else ""
    return f'<section{kind} aria-labelledby="{name}">\n' + "\n".join(parts) + "\n</section>"


def _html_lead(lead: str) -> str:
    first, stop, rest = lead.partition(". ")
    parts = [f'<p class="lead">{escape(first + stop.rstrip())}</p>']
    if rest:
        parts.append(f"<p>{escape(rest)}</p>")
    return "\n".join(parts)


def _html_figure(image: str, alt: str, data: str, source: str) -> str:
    links = [_html_link(image, "PNG")]
    if data:
        links.append(_html_link(data, "CSV"))
    return (
        f'<figure>\n<div class="card"><img src="{source}" alt="{escape(alt)}"></div>\n'
        f'<figcaption><span>{escape(alt)}</span> <span class="files">{" ".join(links)}'
        "</span></figcaption>\n</figure>"
    )


def _html_link(path: str, text: str) -> str:
    return f'<a href="{quote(path)}">{escape(text)}</a>'
