"""Sphinx settings: Markdown pages, the command reference and the API reference."""

from __future__ import annotations

import os
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from vmla_convert import __version__

# Help pages are printed as on a terminal of 80 columns without colours.
os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}

project = "vmla-convert"
author = "the vmla-convert contributors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinxcontrib.typer",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_default_options = {"members": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Single backticks in docstrings are code.
default_role = "code"
nitpicky = True
# Types of other packages have no pages here. Links between pages and glossary terms are checked.
nitpick_ignore_regex = [("py:.*", ".*")]
# The public names are documented twice: as `vmla_convert.load` and in the module that defines them.
suppress_warnings = ["ref.python"]

# Formulas as MathML, which browsers draw themselves: MathJax would come from the network.
html_math_renderer = "mathml"

html_theme = "furo"
html_title = "vmla-convert"
templates_path = ["_templates"]


def escape_docstring(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Take `|x|` and `x*` in a docstring as mathematics, not as reStructuredText."""
    for index, line in enumerate(lines):
        outside_code = re.compile(r"(`[^`]*`)|([|*])(?! )")
        lines[index] = outside_code.sub(lambda m: m[1] or f"\\{m[2]}", line)


def inline_formula(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def formula(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    writer.body.append(f"<p>{convert(node.astext(), display='block')}</p>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the hook ahead of napoleon, which has priority 500, and the formulas."""
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
