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
            parts = re.split(r"`([^`]+)`", paragraph)
            parts[::2] = [re.sub(r"([\\*|_:<>])", r"\\\1", text) for text in parts[::2]]
            parts[1::2] = [f"``{code}``" for code in parts[1::2]]
            # Code that touches a letter, as in `x`s, is told from it by an escaped space.
            text = "".join(parts)
            text = re.sub(r"(``[^`]+``)(?=\w)", r"\1\\ ", text)
            text = re.sub(r"(?<=\w)(``[^`]+``)", r"\\ \1", text)
            lines += [line.strip() for line in text.splitlines()]
        lines.append("")


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
