"""What may leave this machine: names instead of places, and no secret.

A page or a model card is shown to others. A path of this machine says who works on it, so only its
last part is shown; a relative path below the folder one works in says nothing and stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LEFT_OUT = "[a secret, left out]"

_SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opsru]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AKIA[A-Z0-9]{16})"
    r"|(?<=://)[^/\s@:]+:[^/\s@]+(?=@)"  # https://name:password@host
)
_QUOTED = re.compile(r"""(['"])((?:~|[A-Za-z]:\\|/|\.\./)[^'"\n]*)\1""")
_PATH = re.compile(
    r"""(?<![\w.:/~<…-])(?:~[\w.-]*/|/|(?:\.\./)+|[A-Za-z]:\\)[^\s'",;:()\[\]{}<>|]+"""
)


def shared_name(name: str) -> str:
    """A hub id as it is; of a local path only its last part."""
    path = Path(name)
    is_local = path.is_absolute() or os.path.exists(name) or name.count("/") != 1 or name[0] in ".~"
    return path.name if is_local else name


def without_secrets(text: str) -> str:
    """A text whose access tokens and passwords of addresses are named, not shown."""
    return _SECRETS.sub(LEFT_OUT, text)


def shared_text(text: str) -> str:
    """A text whose paths have lost what lies above the working folder: `…/train.jsonl:12`."""
    text = without_secrets(text)
    folder = os.getcwd()
    if folder != "/":
        text = text.replace(f"{folder}/", "")
    head, colon, rest = text.partition(": ")
    if _is_place(head):
        return _last_part(head) + colon + (shared_text(rest) if rest else "")
    text = _QUOTED.sub(lambda found: f"{found[1]}{_last_part(found[2])}{found[1]}", text)
    return _PATH.sub(lambda found: _last_part(found[0]), text)


def _is_place(text: str) -> bool:
    """Whether the whole text is a path, were there spaces in it."""
    is_one = not any(mark in text for mark in ("\n", ", ", "; "))
    return len(text) > 1 and text.startswith(("/", "~", "../")) and is_one


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", "..")]
    return f"…/{parts[-1]}" if parts and not parts[-1].startswith("~") else "…"


def shared(value: Any) -> Any:
    """The same for every text of a JSON value, keys too; a key that is taken gets a number."""
    if isinstance(value, str):
        return shared_text(value)
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            name = free = shared_text(str(key))
            number = 1
            while free in found:
                number += 1
                free = f"{name} ({number})"
            found[free] = shared(item)
        return found
    if isinstance(value, (list, tuple)):
        return [shared(item) for item in value]
    return value
