"""HTML and SVG as text that is escaped by itself."""

from html import escape


class Markup(str):
    """Text that is markup already; any other is escaped when it becomes part of an element."""


def element(tag, *children, **attributes):
    """<tag ...>children</tag>. children: Markup, lists of it, None for nothing, or anything else,
    which is escaped as text. attributes: a trailing _ is left out of their names, any other _ is a
    hyphen."""
    named = "".join(
        f' {name.removesuffix("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{named}>{join(children)}</{tag}>")


def join(children):
    """Children of an element, one after the other, as Markup."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Markup) else escape(str(child)))
    return Markup("".join(parts))


def table(caption, head, rows):
    """A table. head: of the columns; rows: lists whose first item heads the row; an item may be a
    whole cell, an `element("td", ...)`."""
    top = element("tr", [element("th", name, scope="col") for name in head])
    body = [
        element("tr", element("th", first, scope="row"), [_cell(item) for item in rest])
        for first, *rest in rows
    ]
    parts = element("caption", caption), element("thead", top), element("tbody", body)
    return element("div", element("table", parts), class_="wide")


def _cell(item):
    whole = isinstance(item, Markup) and item.startswith("<td")
    return item if whole else element("td", item)


def svg(width, height, label, *children):
    """A drawing that screen readers read as `label`."""
    return element(
        "svg",
        element("title", label),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        role="img",
        aria_label=label,
    )
