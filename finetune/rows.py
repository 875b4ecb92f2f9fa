"""Files to examples: rows read with their place, their shape detected and said.

A row that cannot become an example is never dropped here: it is refused, with file and row, or
handed on as a `Skipped` for the ledger to count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import InputError

MAX_FINDINGS = 20


@dataclass(frozen=True)
class Example:
    """One row, ready to be rendered.

    Attributes:
        where: `file:row`, rows counted from 1 (lines for jsonl).
        messages: the conversation; empty for plain text.
        text: plain text; empty for a conversation.
        extra: the row's other columns (family, answer …).
    """

    where: str
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


SHAPES: dict[str, tuple[tuple[str, ...], str]] = {
    "messages": (("messages",), "messages: [{role, content}, …]"),
    "alpaca": (("instruction", "output"), "instruction, input (optional), output"),
    "prompt_completion": (("prompt", "completion"), "prompt, completion"),
    "text": (("text",), "text"),
}


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """All rows of a `.json` (an array of objects) or `.jsonl` file, each with its place.

    Raises:
        InputError: missing, empty or unreadable file; every bad line is named (up to 20).
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file (relative paths start at the current folder)")
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(
            f"{path}: files of type {path.suffix or 'none'} are not read; use .json or .jsonl"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; expected at least one row")
    return _read_lines(path, text) if path.suffix == ".jsonl" else _read_array(path, text)


def _read_lines(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    rows, findings = [], []
    # split("\n"), not splitlines(): U+2028 inside a JSON string is text, not a line's end.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append((where, _as_object(_parsed(line))))
        except ValueError as error:
            findings.append(f"{where}: {error}")
    refuse(findings)
    return rows


def _read_array(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        array = _parsed(text)
    except ValueError as error:
        raise InputError(
            f"{path}: not readable as JSON ({error}); one object a line is .jsonl"
        ) from None
    if not isinstance(array, list) or not array:
        found = "an empty array" if array == [] else f"a single {type(array).__name__}"
        raise InputError(
            f"{path}: found {found}; expected an array of objects; one object a line is .jsonl"
        )
    rows, findings = [], []
    for number, row in enumerate(array, start=1):
        where = f"{path}:{number}"
        try:
            rows.append((where, _as_object(row)))
        except ValueError as error:
            findings.append(f"{where}: {error}")
    refuse(findings)
    return rows


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply to be a row") from None


def _as_object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"found a {type(row).__name__}; expected an object with columns")
    return row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def detect_shape(path: Path, row: Mapping[str, Any]) -> str:
    """Which documented shape a row has.

    Raises:
        InputError: none, or more than one.
    """
    fitting = [name for name, (keys, _) in SHAPES.items() if all(key in row for key in keys)]
    if len(fitting) == 1:
        return fitting[0]
    allowed = "; ".join(f"{name} ({shape})" for name, (_, shape) in SHAPES.items())
    found = f"fits {' and '.join(fitting)}" if fitting else "fits no format that is read"
    raise InputError(
        f"{path}: a row with columns {', '.join(map(str, row))} {found}; "
        f"give data.train[].format or columns. Formats: {allowed}"
    )


def read_examples(
    path: Path, shape: str = "auto", columns: Mapping[str, str] | None = None
) -> tuple[str, list[Example]]:
    """Every row of a file as an example.

    Args:
        shape: one of `SHAPES`, or auto: detected from the first row.
        columns: our column name -> the file's, for files with other names.

    Returns:
        the shape, and the examples in file order.

    Raises:
        InputError: rows that are not of the shape (all of them, up to 20).
    """
    rows = read_rows(path)
    if columns:
        _check_columns(path, rows, columns)
        rows = [(where, _renamed(row, columns)) for where, row in rows]
    if shape == "auto":
        shape = detect_shape(path, rows[0][1])
    examples, findings = [], []
    for where, row in rows:
        try:
            examples.append(_example(where, row, shape))
        except ValueError as error:
            findings.append(f"{where}: {error}")
    refuse(findings)
    return shape, examples


def _check_columns(
    path: Path, rows: Sequence[tuple[str, dict[str, Any]]], columns: Mapping[str, str]
) -> None:
    names = {name for _, row in rows for name in row}
    refuse(
        [
            f"{path}: no row has the column {theirs} that columns.{ours} names; "
            f"there are {', '.join(sorted(names))}"
            for ours, theirs in columns.items()
            if theirs not in names
        ]
    )


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The columns under our names; one of the file's own that has such a name gives way."""
    named = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    taken = {*columns, *columns.values()}
    return named | {key: value for key, value in row.items() if key not in taken}


def _example(where: str, row: dict[str, Any], shape: str) -> Example:
    keys, description = SHAPES[shape]
    missing = [key for key in keys if key not in row]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}; a row of format {shape} has {description}")
    used = {*keys, "input", "system"} if shape == "alpaca" else set(keys)
    extra = {key: value for key, value in row.items() if key not in used}
    if shape == "text":
        return Example(where, text=_text(row, "text"), extra=extra)
    return Example(where, messages=tuple(_MESSAGES_OF[shape](row)), extra=extra)


def _from_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of {role, content}")
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is not an object with role and content")
        unknown = {k for k, v in message.items() if v is not None} - {"role", "content"}
        if unknown:
            raise ValueError(f"messages[{index}] has {', '.join(sorted(unknown))}, not read yet")
        try:
            result.append({"role": _text(message, "role"), "content": _text(message, "content")})
        except ValueError as error:
            raise ValueError(f"messages[{index}].{error}") from None
    return result


def _from_alpaca(row: Mapping[str, Any]) -> list[dict[str, str]]:
    instruction = _text(row, "instruction")
    extra, system = _optional_text(row, "input"), _optional_text(row, "system")
    user = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    opening = [{"role": "system", "content": system}] if system.strip() else []
    return [*opening, *_turn(user, _text(row, "output"))]


def _from_prompt_completion(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return _turn(_text(row, "prompt"), _text(row, "completion"))


def _turn(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


_MESSAGES_OF = {
    "messages": _from_messages,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _optional_text(row: Mapping[str, Any], key: str) -> str:
    return "" if row.get(key) is None else _text(row, key)


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = f"a {type(value).__name__}"
        if value is None:
            found = "null" if key in row else "missing"
        raise ValueError(f"{key} is {found}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds a lone surrogate, which no text encoding has") from None
    return value


def refuse(findings: Sequence[str]) -> None:
    """Raises the findings, one a row, if there are any: the first 20, and how many more.

    Raises:
        InputError: there are findings.
    """
    if not findings:
        return
    rest = len(findings) - MAX_FINDINGS
    more = [f"and {rest} more rows"] if rest > 0 else []
    raise InputError([*findings[:MAX_FINDINGS], *more])


def iter_answers(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The assistant's texts of a conversation."""
    return (m["content"] for m in messages if m["role"] == "assistant")
