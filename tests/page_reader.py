"""A page as a browser would take it apart: elements, texts, and whatever is not well-formed."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "hr", "input", "link"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "section", "article", "div", "span"),
    *("h1", "h2", "h3", "p", "table", "tr", "th", "td", "details", "summary"),
    *("b", "i", "u", "mark"),
}
IN_REPORTS = {
    *("a", "code", "pre", "figure", "figcaption", "svg", "g", "path", "text", "use", "defs"),
    "clippath",  # as the parser writes it
    "rect",
}


@dataclass
class Element:
    """One element; its text is that of all inside it."""

    tag: str
    attributes: dict[str, str | None]
    inside: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(x if isinstance(x, str) else x.text for x in self.inside)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    def all(self, tag: str = "", with_class: str = "") -> list[Element]:
        found = []
        for child in self.inside:
            if isinstance(child, Element):
                is_it = tag in ("", child.tag) and (not with_class or with_class in child.classes)
                found += [child] * is_it + child.all(tag, with_class)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inside.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def read_page(page: str, more: Collection[str] = ()) -> Element:
    """The page, which must be well-formed, do nothing and name nothing outside itself.

    Args:
        more: elements that are allowed beside the usual ones.
    """
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root], f"not closed: {reader.open[-1].tag}"
    elements = reader.root.all()
    ids = [element.attributes["id"] for element in elements if "id" in element.attributes]
    assert len(ids) == len(set(ids)), "an id twice"
    for element in elements:
        assert element.tag in ALLOWED | set(more), f"<{element.tag}>"
        names = set(element.attributes)
        assert not {name for name in names if name.startswith("on")} | names & {"src"}
        _refuse_outside(element, ids)
    assert page.startswith("<!DOCTYPE html>")
    css = reader.root.all("style")[0].text
    assert not re.search(r"url\(|@import|https?:", css + page.split("<body>")[0])
    return reader.root


def _refuse_outside(element: Element, ids: Collection[str | None]) -> None:
    """What an element points at is an element of the same page."""
    for name, value in element.attributes.items():
        if name in ("href", "xlink:href"):
            assert value is not None and value[:1] == "#" and value[1:] in ids, value
        for target in re.findall(r"url\(([^)]*)\)", value or "") if name != "title" else ():
            assert target[:1] == "#" and target[1:] in ids, target
