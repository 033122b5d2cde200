"""Sphinx: `make docs` builds these pages into build/docs, with every warning an error."""

import re
from importlib import metadata

project = "fastadv"
author = "The fastadv authors"
copyright = "The fastadv authors"
version = release = metadata.version("fastadv")

extensions = ["myst_parser", "sphinx.ext.autodoc"]

myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fastadv {version}"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
smartquotes = False


def escaped(match):
    """Code as Sphinx writes it, with an escaped space, which takes no room, where it touches text;
    a backslash before any other character."""
    before, code, after, character = match.groups()
    if character:
        return f"\\{character}"
    return before + r"\ " * bool(before) + f"``{code}``" + r"\ " * bool(after)


def as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: paragraphs, indented formulas and code in single backticks. Makes
    of them, in place, what Sphinx reads so: literal blocks, and no character with another meaning.
    """
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines.clear()
    for paragraph in paragraphs:
        if paragraph.startswith("    "):
            lines += ["::", "", *paragraph.splitlines(), ""]
        else:
            text = re.sub(r"([(\w]?)`([^`]+)`(?=(\w?))|([\\*|_:<>])", escaped, paragraph)
            lines += [line.strip() for line in text.splitlines()]
        lines.append("")


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
