"""Rows, and a cache of prepared data that a test has for itself; children that die in it."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import run_command


def chat(user: str, *answers: str, **columns: Any) -> dict[str, Any]:
    """A row of format messages: a question, and again "More" before each further answer."""
    asked = [user, *["More"] * (len(answers) - 1)]
    pairs = zip(asked, answers, strict=True) if answers else [(user, None)]
    turns = [(("user", q), ("assistant", a)) for q, a in pairs]
    messages = [{"role": r, "content": c} for pair in turns for r, c in pair if c is not None]
    return {"messages": messages, **columns}


def chats(num_rows: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows that are all different."""
    return [
        chat(f"How many are {n} and {n}?", f"{2 * n} of them") for n in range(start, num_rows)
    ]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """A jsonl file; a row that is a text already stands as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def published(cache: Path) -> list[Path]:
    """The folders of prepared data that have their names."""
    found = (cache / "data").iterdir() if (cache / "data").is_dir() else []
    return sorted(path for path in found if not path.name.startswith("."))


def left_over(cache: Path) -> list[Path]:
    """What preparations that did not end well left behind."""
    return sorted((cache / "data").glob(".*"))


def in_child(work: Callable[[], Any], *, say: Path | None = None) -> int:
    """Runs work in a forked process; returns its id. Exit codes are those of a command.

    Args:
        say: takes what it prints to stderr.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        sys.stderr = say.open("w") if say else io.StringIO()
        code = run_command(lambda _: work() and None, [])
        sys.stderr.flush()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Waits for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, module: Any, name: str) -> None:
    """Makes this process kill itself at a call of `module.name`, counted from 0."""
    real, calls = getattr(module, name), iter(range(number + 1))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, call)
