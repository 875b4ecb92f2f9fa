"""Rows for people: looked up by their place, and two of them with their differences marked."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from finetune.config import RunConfig
from finetune.overlap import Overlap
from finetune.preparation import source_files
from finetune.shapes import Example, Message, read_examples

MAX_CHARACTERS = 2000  # of one turn; what is left out is said
_WORD = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


@dataclass(frozen=True)
class Turn:
    """What one role says.

    Attributes:
        role: user, assistant …; text for plain text.
        parts: (whether the other row has it, text), in order.
        num_left_out: characters after them.
    """

    role: str
    parts: tuple[tuple[bool, str], ...]
    num_left_out: int


@dataclass(frozen=True)
class Excerpt:
    """A row.

    Attributes:
        where: its place.
        turns: what it says, clipped.
    """

    where: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Pair:
    """A held-out row beside the training row that it is found in.

    Attributes:
        finding: what they have in common.
        heldout: the row that is scored.
        train: the row that is trained on.
    """

    finding: Overlap
    heldout: Excerpt
    train: Excerpt


def find_rows(config: RunConfig, places: Collection[str]) -> dict[str, Example]:
    """The rows at some places, read from the files again: also those that became no document.

    Raises:
        InputError: a file that cannot be read any more.
    """
    wanted, found = set(places), dict[str, Example]()
    for file in source_files(config)[0]:
        here = {place for place in wanted if place.startswith(f"{file.path}:")} - found.keys()
        if not here:
            continue
        _, examples = read_examples(file.path, file.source.format, file.source.columns)
        for example in examples:
            if example.where in here:
                found[example.where] = example
                here.discard(example.where)
            if not here:
                break
    return found


def excerpt(example: Example) -> Excerpt:
    """One row by itself."""
    turns = (_turn(role, text, [(True, text[:MAX_CHARACTERS])]) for role, text in _said_by(example))
    return Excerpt(example.where, tuple(turns))


def pair(finding: Overlap, heldout: Example, train: Example) -> Pair:
    """Two rows, turn by turn, the words that only one of them has marked."""
    sides: tuple[list[Turn], list[Turn]] = ([], [])
    for said in itertools.zip_longest(_said_by(heldout), _said_by(train), fillvalue=None):
        one, other = (turn[1][:MAX_CHARACTERS] if turn else "" for turn in said)
        for side, turn, parts in zip(sides, said, _compare(one, other), strict=True):
            if turn:
                side.append(_turn(*turn, parts))
    return Pair(
        finding,
        Excerpt(heldout.where, tuple(sides[0])),
        Excerpt(train.where, tuple(sides[1])),
    )


def _turn(role: str, text: str, parts: Iterable[tuple[bool, str]]) -> Turn:
    return Turn(role, tuple(parts), max(0, len(text) - MAX_CHARACTERS))


def _compare(one: str, other: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Both texts in parts: (whether the other has it in the same order, text)."""
    words = _WORD.findall(one), _WORD.findall(other)
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    parts: tuple[list[tuple[bool, str]], list[tuple[bool, str]]] = ([], [])
    for kind, a, b, c, d in matcher.get_opcodes():
        for side, text in zip(parts, ("".join(words[0][a:b]), "".join(words[1][c:d])), strict=True):
            if text:
                side.append((kind == "equal", text))
    return parts


def _said_by(example: Example) -> list[tuple[str, str]]:
    if not example.messages:
        return [("text", example.text)]
    return [(message["role"], _said(message)) for message in example.messages]


def _said(message: Message) -> str:
    parts: list[Any] = [message.get("content"), message.get("tool_calls")]
    texts = (p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in parts if p)
    return "\n".join(texts)
