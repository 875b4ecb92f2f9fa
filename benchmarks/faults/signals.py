"""Signals in the middle of a step, and a second one in the middle of the save that follows."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.faults.operations import Operations
from benchmarks.faults.runs import Runs
from benchmarks.faults.sweeps import Count, Expected, Outcome, sweep


def signalled(runs: Runs, expected: Expected, points: Iterable[int]) -> Outcome:
    """SIGTERM in each of these micro-batches: a checkpoint at the step's end, exit code 75."""
    outcome = Outcome("SIGTERM in every micro-batch")
    sweep(runs, expected, outcome, points, lambda n: lambda: signal_in(n), {75})
    return outcome


def signalled_twice(runs: Runs, expected: Expected, step: int) -> Outcome:
    """A second SIGTERM at every file operation after the first: it ends the process at once."""
    outcome = Outcome("SIGTERM again at every file operation after the first")
    count = Count(runs.folder / "after the signal")

    def at(point: int | None) -> Callable[[], None]:
        def reached(number: int, kind: str, path: Path) -> None:
            count.note(number + 1)
            if number == point:
                os.kill(os.getpid(), signal.SIGTERM)

        def prepare() -> None:
            from finetune import monitor

            monitor.SAME_REQUEST_SECONDS = 0.0  # a person waits longer, this sweep does not
            signal_in(0, Operations(runs.run.path.parent, reached).install)

        return prepare

    shutil.rmtree(runs.run.path, ignore_errors=True)
    assert runs.attempt(at(None)) == 75
    sweep(runs, expected, outcome, range(0, count.read(), step), at, {-signal.SIGTERM})
    return outcome


def signal_in(micro_batch: int, then: Callable[[], None] = lambda: None) -> None:
    """This process gets SIGTERM in a micro-batch, and `then` is called."""
    from finetune.trainer import OurSeams

    right, calls = OurSeams.compute_loss, itertools.count()

    def signals(self: Any, *args: Any, **settings: Any) -> Any:
        if next(calls) == micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
            then()
        return right(self, *args, **settings)

    OurSeams.compute_loss = signals  # type: ignore[method-assign]
