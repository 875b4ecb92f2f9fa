"""Rows, and a cache of prepared data that a test has for itself; children that die in it."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    return [chat(f"How many are {n} and {n}?", f"{2 * n} of them") for n in range(start, num_rows)]


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


# Children come from a server that has imported the package and has done nothing else: a process
# that has used the tokenizers' threads cannot be forked safely.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["data_cache", "finetune.data"])


@dataclass(frozen=True)
class Job:
    """A preparation in a process of its own.

    Attributes:
        config_file: the config.
        cache: FINETUNE_CACHE.
        said: takes what it prints to stderr.
        start: the second, by `time.monotonic`, at which it begins.
        kill: (module, function, number): it kills itself at this call, counted from 0.
        max_bytes: of a file it may write.
        user: becomes this user first.
        reads: False forbids to open a file of rows.
    """

    config_file: Path
    cache: Path
    said: Path | None = None
    start: float = 0.0
    kill: tuple[str, str, int] | None = None
    max_bytes: int | None = None
    user: int | None = None
    reads: bool = True


def start(job: Job) -> Any:
    """Starts a job; `join` it, its exit code is that of a command."""
    process = _SERVER.Process(target=_do, args=(job,), daemon=True)
    process.start()
    return process


def exit_code(process: Any) -> int:
    """Waits for a job: its exit code, or minus the signal that ended it."""
    process.join(60)
    assert not process.is_alive(), "it hangs"
    return process.exitcode


def _do(job: Job) -> None:
    from finetune import preparation
    from finetune.config.loader import load
    from finetune.data import load_data
    from finetune.llama.chat import FORMATS
    from finetune.llama.tokenizer import load_tokenizer

    sys.stderr = job.said.open("w", buffering=1) if job.said else io.StringIO()
    os.environ["FINETUNE_CACHE"] = str(job.cache)
    config = load(job.config_file, ()).config
    tokenizer = load_tokenizer(Path(config.base.tokenizer))
    if job.kill:
        _kill_at(*job.kill)
    if job.max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.max_bytes, job.max_bytes))
        sys.stderr = said = io.StringIO()  # shown below, where the limit does not count
    if not job.reads:
        preparation.read_examples = None
    if job.user is not None and os.geteuid() == 0:  # permissions do not bind root
        os.setuid(job.user)
    time.sleep(max(0.0, job.start - time.monotonic()))
    code = run_command(lambda _: load_data(config, tokenizer, FORMATS["nano"]) and None, [])
    if job.max_bytes is not None:
        lines = said.getvalue().splitlines()
        one_sentence = len(lines) == 1 and lines[0].startswith("error: ")
        said_it = "could not be written" in lines[0] and "nothing published" in lines[0]
        code = code if one_sentence and said_it else 98
    os._exit(code)


def _kill_at(module: str, name: str, number: int) -> None:
    """Makes this process kill itself at a call of `module.name`, counted from 0."""
    owner = importlib.import_module(module)
    real, calls = getattr(owner, name), itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, call)
