"""HTML pages: one file each, readable without a network, a server or a script.

The templates lie beside this file. All that a page shows is escaped; the policy in its head lets a
browser neither run a script nor fetch anything, whatever a row holds.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.errors import InputError

SUFFIXES = (".html", ".htm")

# Characters that no reader sees, or that turn the order of those around them: C0, C1, line
# separators, direction marks, zero width space, BOM. Joiners stay: some scripts need them.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
# White space that is easily overlooked: at an edge or beside a line break, or more than one.
_WHITE = re.compile(r"\n|\t+|\A +| +\Z|(?<=\n) +| +(?=\n)| {2,}")
_KINDS = {"\n": "line", "\t": "tab", " ": "space"}


def seen(text: str) -> str:
    """The text with every unseen character as its number, <U+001B>.

    Nothing that is left can move a terminal's cursor or turn text around.
    """
    return _UNSEEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def kinds_of(text: str) -> list[str]:
    """For each character what a page marks it as: line, tab, space, unseen, or nothing."""
    kinds = [""] * len(text)
    for found in _WHITE.finditer(text):
        kinds[slice(*found.span())] = [_KINDS[found[0][0]]] * len(found[0])
    for found in _UNSEEN.finditer(text):
        kinds[found.start()] = "unseen"
    return kinds


def parts_of(pieces: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The parts of each piece of a text, for a template: (kind, characters as they are shown).

    What is an edge is decided by the text as a whole. A line break is a part of its own, so that
    each has its mark.
    """
    kinds = iter(kinds_of("".join(pieces)))
    return [list(_parts(zip(piece, kinds, strict=False))) for piece in pieces]


def _parts(marked: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for kind, run in groupby(marked, key=lambda pair: pair[1]):
        characters = [character for character, _ in run]
        for part in characters if kind == "line" else ["".join(characters)]:
            yield kind, seen(part)


def render(template: str, **values: Any) -> str:
    """A page from the template of that name."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"parts_of": parts_of, "seen": seen, "count": "{:,}".format}
    return environment.get_template(template).render(**values)


def target_of(name: str, flag: str = "--html") -> Path:
    """Where a page may be written.

    Args:
        flag: the argument that named it, for messages.

    Raises:
        InputError: it is no .html file, or its folder is not there.
    """
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise InputError(f"{flag} {name}: allowed: the name of a file that ends in .html")
    if not path.parent.is_dir():
        raise InputError(f"{flag} {name}: there is no folder {path.parent}; make it first")
    return path


def write(path: Path, page: str) -> None:
    """Replaces a file in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
