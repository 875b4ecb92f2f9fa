"""Rows of .jsonl and .json files, read without holding more than one row and a window of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from finetune.files.encoding import (
    BOM,
    NotText,
    encoding_reason,
    open_bytes,
    open_text,
    refuse_zero,
)
from finetune.files.findings import Findings
from finetune.files.row import MAX_ROW_MIB, Row, max_row_size
from finetune.files.strict_json import Decoder, kind_of, parse, syntax_reason, too_deep

_BLANKS = b" \t\r\n"
_WANTED = "expected an object with columns"
_ROWS_UNDER = ("data", "rows", "examples", "train", "test")
_CHUNK = 2**18  # characters
_NEXT = re.compile(r"[ \t\r\n]*")
# A number, a literal or an escape that the window cuts in two is wrong at most this far before
# the window's end (-Infinity, and the two escapes of a surrogate pair, are the longest). Longer
# numbers are no exception: their digits so far are a number, and the error stands right behind.
_CUT = 32


def read_lines(path: Path, findings: Findings) -> Iterator[Row]:
    """Rows of a .jsonl file: one object a line, blank lines skipped."""
    decoder = Decoder()
    with open_bytes(path) as stream:
        for number, line in _numbered_lines(stream):
            where = f"{path}:{number}"
            try:
                yield Row(where, _object_of(line, decoder))
            except ValueError as error:
                findings.add(f"{where}: {error}")


def _numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank. One over the limit is cut: its reader refuses it."""
    # readline splits at \n alone: U+2028 inside a JSON string is text, not a line's end.
    number, limit = 0, max_row_size() + 1
    while line := stream.readline(limit):
        number += 1
        rest = line
        while len(rest) == limit and not rest.endswith(b"\n"):
            rest = stream.readline(limit)
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip(_BLANKS):
            yield number, line


def _object_of(line: bytes, decoder: Decoder) -> dict[str, Any]:
    if len(line) > max_row_size():
        raise ValueError(f"is longer than {MAX_ROW_MIB} MiB; one object a line")
    if b"\0" in line:
        raise ValueError("holds a NUL byte, which no text file has; was the file cut off?")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(encoding_reason(line)) from None
    value = parse(text.rstrip("\r\n"), decoder)
    if isinstance(value, list):
        raise ValueError("holds an array; one object a line (an array of objects is .json)")
    if not isinstance(value, dict):
        raise ValueError(f"is {kind_of(value)}; {_WANTED}")
    return value


class _Window:
    """A window on a text that slides over the JSON values in it."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._at_end = False
        self._lines_before = self._column_before = 0
        self.buffer = ""
        self.position = 0
        self.decoder = Decoder()

    def next_character(self) -> str:
        """The next character that is not blank, without passing it; empty at the end."""
        while True:
            match = _NEXT.match(self.buffer, self.position)
            assert match, "the pattern matches nothing as well"
            self.position = match.end()
            if self.position < len(self.buffer) or self._at_end:
                return self.buffer[self.position : self.position + 1]
            self._grow()

    def next_value(self) -> Any:
        """Decodes and passes the value at the position.

        Raises:
            NotText: the text there is no JSON value.
        """
        while True:
            try:
                value, end = self.decoder.decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                if self._at_end or not self._may_be_cut(error):
                    raise NotText(self._complaint(error)) from None
            except RecursionError:
                raise NotText(too_deep()) from None
            else:
                # What touches the window's end may go on behind it: 12 of 123.
                if self._at_end or end < len(self.buffer) - _CUT:
                    self.position = end
                    return value
            self._grow()

    def _grow(self) -> None:
        """Lets go of what was passed and doubles the rest, so that a long row costs linear time."""
        kept = self.buffer[self.position :]
        if len(kept) > max_row_size():
            raise NotText(f"is longer than {MAX_ROW_MIB} MiB")
        passed = self.buffer[: self.position]
        self._lines_before += passed.count("\n")
        start = passed.rfind("\n") + 1
        self._column_before = len(passed) - start + (0 if start else self._column_before)
        line = self._lines_before + kept.count("\n") + 1
        chunk = self._text.read(max(_CHUNK, len(kept)))
        refuse_zero(chunk, line)
        self._at_end = not chunk
        self.buffer, self.position = kept + chunk, 0

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - _CUT

    def _complaint(self, error: json.JSONDecodeError) -> str:
        line = self._lines_before + error.lineno
        column = error.colno + (self._column_before if error.lineno == 1 else 0)
        return syntax_reason(error, f"line {line}, column {column}")


def read_array(path: Path, findings: Findings) -> Iterator[Row]:
    """Rows of a .json file: one array of objects, or one object, which is a row by itself. The
    first syntax error ends the file."""
    with open_text(path) as text:
        window = _Window(text)
        first = window.next_character()
        if first == "[":
            window.position += 1
            yield from _elements(path, window, findings)
        elif first:
            yield from _alone(path, window, first, findings)


def _elements(path: Path, window: _Window, findings: Findings) -> Iterator[Row]:
    if window.next_character() == "]":
        findings.add(f"{path}: is an empty array; expected at least one row")
        return
    number, separator = 0, ","
    while separator == ",":
        number += 1
        window.next_character()
        try:
            value = window.next_value()
        except NotText as error:
            findings.add(f"{path}:{number}: {error}")
            return
        wrong = _element_reason(value, window.decoder)
        if wrong:
            findings.add(f"{path}:{number}: {wrong}")
        else:
            yield Row(f"{path}:{number}", value)
        separator = window.next_character()
        window.position += len(separator)
    _check_end(path, window, separator, number, findings)


def _element_reason(value: Any, decoder: Decoder) -> str | None:
    if decoder.complaints:
        return decoder.complaints[0]
    return None if isinstance(value, dict) else f"is {kind_of(value)}; {_WANTED}"


def _check_end(
    path: Path, window: _Window, separator: str, number: int, findings: Findings
) -> None:
    if not separator:
        findings.add(f"{path}: is cut off after element {number}: the array has no end")
    elif separator != "]":
        findings.add(f"{path}:{number}: is followed by {separator!r}; expected a comma or ]")
    elif window.next_character():
        findings.add(f"{path}: has more after the array's end; expected one array of objects")


def _alone(path: Path, window: _Window, first: str, findings: Findings) -> Iterator[Row]:
    """The row of a file that holds one object and no array."""
    try:
        value = window.next_value()
    except NotText as error:
        findings.add(f"{path}: {error}; expected an array of objects")
        return
    wrong = _alone_reason(value, window, first)
    if wrong:
        findings.add(f"{path}: {wrong}")
    else:
        yield Row(f"{path}:1", value)


def _alone_reason(value: Any, window: _Window, first: str) -> str | None:
    if first != "{":
        return f"is {kind_of(value)}; expected an array of objects"
    if window.decoder.complaints:
        return window.decoder.complaints[0]
    if window.next_character():
        return "holds one object after another, not an array; that is .jsonl: rename it"
    named = next((name for name in _ROWS_UNDER if isinstance(value.get(name), list)), None)
    if named:
        return f"is one object whose rows seem to be the list under {named!r}: save that list"
    return None
