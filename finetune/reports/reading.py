"""Files that may be missing, damaged, or of another version: what is readable, and what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.artifact import read_json
from finetune.errors import InputError
from finetune.sharing import shared_text

Problems = list[str]


def read_object(path: Path, problems: Problems) -> dict[str, Any]:
    """A JSON object; empty where there is none, with a problem where it cannot be read."""
    if not path.exists():
        return {}
    try:
        found = read_json(path)
    except (InputError, OSError) as error:
        problems.append(shared_text(str(error)))
        return {}
    if not isinstance(found, dict):
        problems.append(f"{shared_text(str(path))}: holds no JSON object")
        return {}
    return found


def read_lines(path: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; lines that are none are counted as one problem.

    A last line without its end was left half-written by a process that died; it is no problem.
    """
    if not path.exists():
        return
    broken: list[int] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                found = _parsed(line)
                if found is not None:
                    yield found
                elif line.endswith("\n") and line.strip():
                    broken.append(number)
    except OSError as error:
        problems.append(shared_text(f"{path}: {(error.strerror or str(error)).lower()}"))
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (" …" if len(broken) > 5 else "")
        what = f"{len(broken):,} lines are no JSON objects and left out (line {lines})"
        problems.append(f"{shared_text(str(path))}: {what}")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def number(value: Any) -> float | None:
    """A finite number, else None; truth values are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer larger than any float
        return None


def count(value: Any) -> int | None:
    """A whole number that counts something, else None."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def text(value: Any) -> str | None:
    """A text, else None."""
    return value if isinstance(value, str) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    """A JSON array; empty for anything else."""
    return value if isinstance(value, list) else []
