"""README and documentation: figures, links and commands are those of the code."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import vmla_convert
from evals import tables
from vmla_convert.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "README.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_figures_are_those_of_the_rows() -> None:
    assert not tables.stale(), "run: python -m evals.tables"


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1600


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_and_headings_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"]+)", text):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            assert heading in headings(target.read_text()), link


def headings(text: str) -> list[str]:
    """Anchors of a page, as GitHub and MyST make them."""
    lines = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines]


def commands() -> list[str]:
    """Every line of a code block that starts `vmla`, in all pages and recipes."""
    blocks = [body for page in PAGES for _, body in FENCE.findall(page.read_text())]
    recipes = [path.read_text() for path in (ROOT / "recipes").glob("*.toml")]
    lines = "\n".join([*blocks, *recipes]).replace("\\\n", " ")
    found = re.findall(r"^(?:# +)?(?:torchrun .* -m )?(vmla(?:_convert)? .*)", lines, re.MULTILINE)
    return sorted({shlex.join(shlex.split(line, comments=True)) for line in found})


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    _, *arguments = shlex.split(line)
    command = typer.main.get_command(app)
    context = command.make_context("vmla", arguments, resilient_parsing=True)
    while arguments and (subcommands := getattr(command, "commands", None)):
        name, *arguments = arguments
        assert name in subcommands, f"no command {name}"
        command = subcommands[name]
        context = command.make_context(name, arguments, parent=context)


def test_python_lines_use_public_names() -> None:
    blocks = [
        body for page in PAGES for kind, body in FENCE.findall(page.read_text()) if kind == "python"
    ]
    assert blocks
    for body in blocks:
        compile(body, "block", "exec")
        used = re.findall(r"\bvmla\.(\w+)", body) + re.findall(r"vmla_convert import (\w+)", body)
        assert set(used) <= set(vmla_convert.__all__)


def test_troubleshooting_quotes_real_messages() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"`([^`]+)`", "".join(re.findall(r"^### .*$", text, re.MULTILINE)))
    assert quoted
    known = "\n".join(texts_in_package())
    assert [quote for quote in quoted if quote not in known] == []


def texts_in_package() -> list[str]:
    """Every text in the package's code, with `…` for each value in an f-string."""
    texts: list[str] = []
    for path in (ROOT / "vmla_convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts
