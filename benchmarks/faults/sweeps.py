"""Sweeps of faults over one small run; each counts what it tried and names what did not hold."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.operations import Operations
from benchmarks.faults.power import KINDS, Disk
from benchmarks.faults.runs import Runs
from finetune import artifact, checkpoint

Expected = dict[str, Any]  # the result of the undisturbed run
CUT = 99  # the exit code of a copy whose power went


@dataclass
class Outcome:
    """What a sweep found.

    Attributes:
        name: of the sweep.
        tried: faults.
        failures: a sentence for each that did not hold.
        notes: what else is worth a line.
    """

    name: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """With the number that held."""
        return {**asdict(self), "held": self.tried - len(self.failures)}


def straight(runs: Runs) -> dict[str, Any]:
    """The result of the run that nothing disturbs, made twice: it must repeat."""
    results = []
    for _ in range(2):
        shutil.rmtree(runs.run.path, ignore_errors=True)
        code = runs.attempt()
        assert code == 0, f"the undisturbed run ends with {code}"
        results.append(runs.result())
    assert results[0] == results[1], "the undisturbed run does not repeat"
    return results[0]


def killed(runs: Runs, expected: Expected, points: Iterable[int]) -> Outcome:
    """SIGKILL before each of these file operations."""
    outcome = Outcome("killed at every file operation")
    sweep(runs, expected, outcome, points, lambda n: at_operation(runs, n, die), {-signal.SIGKILL})
    return outcome


def die(path: Path) -> None:
    """SIGKILL, wherever it is."""
    os.kill(os.getpid(), signal.SIGKILL)


def powerless(runs: Runs, expected: Expected, points: Iterable[int]) -> Outcome:
    """The power goes at each of these; what was not fsynced is lost in three ways."""
    outcome = Outcome("power lost at every file operation")
    for point in points:
        shutil.rmtree(runs.run.path.parent, ignore_errors=True)
        code, promised = power_cut(runs, point)
        for image in KINDS:
            outcome.tried += 1
            if code != CUT:
                outcome.failures.append(f"operation {point}: exit code {code}")
                continue
            wrong = power_back(runs, image, promised)
            go_on(runs, expected, f"operation {point}, {image}", outcome, wrong)
    return outcome


def power_cut(runs: Runs, point: int) -> tuple[int, int]:
    """A start whose power goes at a file operation; images of the disk are left.

    Returns:
        Its exit code, and the newest step that `latest.json` was about to name.
    """
    root, images = runs.run.path.parent, runs.folder / "images"
    acknowledged = runs.folder / "acknowledged"

    def prepare() -> None:
        root.mkdir(exist_ok=True)
        disk = Disk(root)
        published = checkpoint.write_latest

        def noted(folder: Path, number: int) -> None:
            with open(acknowledged, "w", encoding="utf-8") as file:
                file.write(str(number))
            published(folder, number)

        checkpoint.write_latest = noted

        def cut(number: int, kind: str, path: Path) -> None:
            if number == point:
                for image in KINDS:
                    disk.write_image(images / image, image, point)
                os._exit(CUT)

        Operations(root, cut, disk.after).install()

    shutil.rmtree(images, ignore_errors=True)
    acknowledged.write_text("0", encoding="utf-8")
    code = runs.attempt(prepare)
    return code, int(acknowledged.read_text(encoding="utf-8"))


def power_back(runs: Runs, image: str, promised: int) -> list[str]:
    """The disk is as one of the images; what was published and is no longer there."""
    root = runs.run.path.parent
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(runs.folder / "images" / image, root)
    left = sound(runs)
    newest = int(left[-1].name.removeprefix("step-")) if left else 0
    lost = [f"step {promised} was published, step {newest} is left"]
    return lost if newest < promised else []


def killed_at_random(runs: Runs, expected: Expected, kills: int) -> Outcome:
    """SIGKILL at random times, each on the run that goes on from the last, in as many chains as it
    takes; a chain ends with a run that is left alone."""
    outcome = Outcome("killed at random times, chained")
    usual, chance, lengths = seconds_of(runs), random.Random(0), []
    while outcome.tried < kills:
        shutil.rmtree(runs.run.path, ignore_errors=True)
        landed = 0
        while outcome.tried + landed < kills and not runs.run.is_finished:
            code = runs.attempt(killed_after=chance.uniform(0.2, 0.6) * usual)
            landed += code == -signal.SIGKILL
        outcome.tried += landed
        lengths.append(landed)
        go_on(runs, expected, f"chain {len(lengths)} of {landed}", outcome, [])
    outcome.notes["kills in a chain"] = lengths
    return outcome


def sweep(
    runs: Runs,
    expected: Expected,
    outcome: Outcome,
    points: Iterable[int],
    at: Callable[[int], Callable[[], None]],
    ends_with: set[int],
) -> None:
    """A fresh run disturbed at each point; it ends with one of these codes, and is gone on with."""
    codes: Counter[str] = Counter()
    for point in points:
        shutil.rmtree(runs.run.path, ignore_errors=True)
        code = runs.attempt(at(point))
        codes[str(code)] += 1
        outcome.tried += 1
        wrong = [] if code in ends_with else [f"exit code {code}"]
        go_on(runs, expected, f"point {point}", outcome, wrong)
    outcome.notes["exit codes"] = dict(codes)


def at_operation(
    runs: Runs, point: int, fault: Callable[[Path], None], and_after: bool = False
) -> Callable[[], None]:
    """Prepares a copy for a fault at one file operation, or at all from that one on."""

    def reached(number: int, kind: str, path: Path) -> None:
        if number == point or (and_after and number > point):
            fault(path)

    return lambda: Operations(runs.run.path.parent, reached).install()


def listed(runs: Runs) -> list[Path]:
    """Published checkpoints, oldest first."""
    return checkpoint.list_checkpoints(runs.run.checkpoints)


def sound(runs: Runs) -> list[Path]:
    """Those of them that verify."""
    return [path for path in listed(runs) if not artifact.findings_of(path)]


def seconds_of(runs: Runs) -> float:
    """How long the undisturbed run takes."""
    shutil.rmtree(runs.run.path, ignore_errors=True)
    began = time.monotonic()
    assert runs.attempt() == 0
    return time.monotonic() - began


def go_on(runs: Runs, expected: Expected, where: str, outcome: Outcome, wrong: list[str]) -> None:
    """Nothing half is listed; started again, the run ends where the undisturbed one does."""
    wrong += [finding for path in listed(runs) for finding in artifact.findings_of(path)]
    code = runs.attempt()
    if code != 0:
        wrong.append(f"started again: exit code {code}")
    else:
        found = runs.result()
        wrong += [f"{key} differ" for key in expected if found[key] != expected[key]]
    if wrong:
        outcome.failures.append(f"{where}: {'; '.join(wrong)}")


def num_operations(runs: Runs) -> int:
    """File operations of a whole run."""
    count = Count(runs.folder / "count")

    def prepare() -> None:
        Operations(
            runs.run.path.parent, lambda number, kind, path: count.note(number + 1)
        ).install()

    shutil.rmtree(runs.run.path, ignore_errors=True)
    assert runs.attempt(prepare) == 0
    return count.read()


class Count:
    """A number that a copy of this process leaves for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("0", encoding="utf-8")

    def note(self, number: int) -> None:
        """Written past Python's files, which may be wrapped."""
        descriptor = os.open(self._path, os.O_WRONLY)
        os.pwrite(descriptor, str(number).encode(), 0)
        os.close(descriptor)

    def read(self) -> int:
        """What was noted last."""
        return int(self._path.read_text(encoding="utf-8"))
