"""Disks that refuse: once, at a byte, from a moment on."""

from __future__ import annotations

import errno
import itertools
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.faults.runs import Runs
from benchmarks.faults.sweeps import Expected, Outcome, at_operation, sweep
from finetune import checkpoint


def refused(runs: Runs, expected: Expected, points: Iterable[int], number: int) -> Outcome:
    """The disk says `number` (ENOSPC, EIO) once, at each of these; the run ends with 4, or well."""
    outcome = Outcome(f"{errno.errorcode[number]} at every file operation")
    at = refusing(runs, number, and_after=False)
    sweep(runs, expected, outcome, points, at, {0, 4})
    return outcome


def read_only(runs: Runs, expected: Expected, points: Iterable[int]) -> Outcome:
    """From each of these on, the disk takes nothing any more, as one that was mounted anew does.

    The run ends with 4; or well, where only the removal of a temporary name that is gone is left.
    """
    outcome = Outcome("read-only from every file operation on")
    sweep(runs, expected, outcome, points, refusing(runs, errno.EROFS, and_after=True), {0, 4})
    return outcome


def refusing(runs: Runs, number: int, and_after: bool) -> Callable[[int], Callable[[], None]]:
    """Point -> what prepares a copy for a disk that says `number` there."""

    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return lambda point: at_operation(runs, point, fail, and_after)


def full_at_byte(runs: Runs, expected: Expected, limits: Iterable[int]) -> Outcome:
    """From the second save on no file grows past so many bytes (EFBIG): what fits is written."""

    def at(limit: int) -> Callable[[], None]:
        def prepare() -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is said goes to a file, too
            right, calls = checkpoint.save_weights, itertools.count(1)

            def limited(*args: Any) -> None:
                if next(calls) == 2:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                right(*args)

            checkpoint.save_weights = limited

        return prepare

    outcome = Outcome("full at a byte of a file")
    sweep(runs, expected, outcome, limits, at, {4})
    return outcome


def bytes_to_try(runs: Runs, count: int) -> list[int]:
    """So many sizes between 1 and that of a checkpoint's largest file, most of them small."""
    sizes = [p.stat().st_size for p in runs.run.checkpoints.rglob("*") if p.is_file()]
    return sorted({round((max(sizes) - 1) ** (n / (count - 1))) for n in range(count)})
