"""JSON as its standard has it: what Python's parser lets pass or mends silently is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 100
_MAX_DIGITS = 4000  # Python refuses to convert more than 4,300
_BLANKS = " \t\r\n"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Decoder:
    """Decodes one value at a time and notes what is wrong with it apart from its syntax.

    Noting instead of raising keeps the place where the value ends, so that the rest of an array is
    still read.

    Attributes:
        complaints: about the value decoded last.
    """

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends.

        Raises:
            json.JSONDecodeError: the syntax is wrong, or the text ends too early.
            RecursionError: nested beyond what Python parses.
        """
        self.complaints.clear()
        value, end = self._decoder.raw_decode(text, start)
        brackets = text.count("[", start, end) + text.count("{", start, end)
        if brackets > MAX_DEPTH and _is_deep(value):
            self.complaints.append(too_deep())
        elif _SURROGATE.search(text, start, end) and _has_lone_surrogate(value):
            self.complaints.append("holds a lone surrogate, which no text encoding has")
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.complaints.append(f"has the key {twice!r} twice in one object")
        return value

    def _constant(self, name: str) -> None:
        self.complaints.append(f"{name} is not JSON")

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self.complaints.append(f"the number {digits[:20]} is too large for a float")
        return value

    def _int(self, digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            self.complaints.append(f"holds a number of {len(digits)} digits")
            return 0
        return int(digits)


def too_deep() -> str:
    """What is said of a value that is nested too deeply."""
    return f"is nested too deeply to be a row (more than {MAX_DEPTH} levels)"


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for part in inner for child in part if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def parse(text: str, decoder: Decoder | None = None) -> Any:
    """The one JSON value of a text.

    Raises:
        ValueError: it is not strict JSON, or not one value; the message says why.
    """
    decoder = decoder or Decoder()
    start = len(text) - len(text.lstrip(_BLANKS))
    try:
        value, end = decoder.decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(syntax_reason(error, f"column {error.colno}")) from None
    except RecursionError:
        raise ValueError(too_deep()) from None
    rest = text[end:].strip(_BLANKS)
    if rest:
        raise ValueError(_rest_reason(rest))
    if decoder.complaints:
        raise ValueError(decoder.complaints[0])
    return value


def syntax_reason(error: json.JSONDecodeError, place: str) -> str:
    """What a syntax error means, and at which place it was seen."""
    text, message = error.doc, error.msg.removesuffix(" starting at")
    if text.startswith("\ufeff"):
        return "begins with a byte order mark, as where files were joined"
    if error.pos >= len(text.rstrip(_BLANKS)) or message.startswith("Unterminated"):
        return f"is cut off: no whole JSON value ({message}, {place})"
    return f"is not JSON: {message} ({place})"


def _rest_reason(rest: str) -> str:
    if rest == ",":
        return "has a comma after the value; one object a line, with nothing between the lines"
    if rest[0] in "{[":
        return "holds several values on one line; one object a line"
    return f"has more after the value: {rest[:20]!r}"


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words, with its article."""
    if value is None:
        return "null"
    names = {str: "text", dict: "an object", list: "a list", bool: "a bool"}
    numbers = {int: "a number", float: "a number"}
    return {**names, **numbers}.get(type(value), f"a {type(value).__name__}")
