"""HTML and SVG as a tree: text is escaped and every element is closed by construction."""

from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element, tostring

Node = Element | str | None


def el(name: str, attributes: Mapping[str, str] | None = None, *children: Node) -> Element:
    """An element with `children` in order; None is left out.

    >>> tostring(el("p", {"class": "a"}, "1 < 2, ", el("b", {}, "yes"), None, "."), method="html")
    b'<p class="a">1 &lt; 2, <b>yes</b>.</p>'
    """
    element = Element(name, dict(attributes or {}))
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child:
            element.text = (element.text or "") + child
    return element


def serialise(html: Element) -> str:
    """The document as text."""
    return "<!DOCTYPE html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def section(identity: str, title: str, *children: Node) -> Element:
    """A part of the page with a heading that a link can point to."""
    heading = f"{identity}-title"
    attributes = {"id": identity, "aria-labelledby": heading}
    return el("section", attributes, el("h2", {"id": heading}, title), *children)


def facts(pairs: Iterable[tuple[str, Node]]) -> Element:
    """Names and values, one pair a line; a pair without a value is left out."""
    kept = [(name, value) for name, value in pairs if value is not None]
    lines = [el("div", {}, el("dt", {}, name), el("dd", {}, value)) for name, value in kept]
    return el("dl", {"class": "facts"}, *lines)


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Node]]) -> Element:
    """A table that scrolls inside its own frame; the first cell of each row names the row."""
    head = el("tr", {}, *(el("th", {"scope": "col"}, column) for column in columns))
    body = [
        el("tr", {}, el("th", {"scope": "row"}, first), *(el("td", {}, cell) for cell in rest)) for first, *rest in rows
    ]
    # A frame that scrolls must be reachable by keyboard, and then it needs a role and a name.
    return el(
        "div",
        {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": caption},
        el("table", {}, el("caption", {}, el("span", {}, caption)), el("thead", {}, head), el("tbody", {}, *body)),
    )
