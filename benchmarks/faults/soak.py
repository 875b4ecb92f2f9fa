"""Faults of every kind at places drawn from one seed, one after the other on the same run.

A chain is a run that is disturbed one to four times, each time where the last fault left it, and
then left alone: it must end where the undisturbed run ends. Between two starts the newest
checkpoint may be damaged, and the clock may have gone back: every file is then from the future, the
older the later.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections import Counter

from benchmarks.faults.disks import refusing
from benchmarks.faults.power import KINDS
from benchmarks.faults.runs import Runs
from benchmarks.faults.signals import signal_in
from benchmarks.faults.sweeps import (
    CUT,
    Expected,
    Outcome,
    at_operation,
    die,
    go_on,
    num_operations,
    power_back,
    power_cut,
    seconds_of,
    sound,
)

_STARTS = ("killed", "ENOSPC", "EDQUOT", "EIO", "EROFS", "power lost", "signalled", "killed later")
_BETWEEN = ("damaged", "clock back")
_DAY = 86_400


class Soak:
    """Chains of faults on one run.

    Args:
        runs: the run.
        expected: the result of the undisturbed one.
        seed: of all draws; a chain draws from `seed` and its number alone.
    """

    def __init__(self, runs: Runs, expected: Expected, seed: int = 0) -> None:
        self._runs, self._expected, self._seed = runs, expected, seed
        self._operations, self._seconds = num_operations(runs), seconds_of(runs)

    def run(self, pairs: int) -> Outcome:
        """Chains until so many faults have struck."""
        outcome, kinds, number = Outcome("faults at random, chained"), Counter[str](), 0
        while outcome.tried < pairs:
            struck = self._chain(number, outcome)
            outcome.tried += len(struck)
            kinds.update(fault.split(" at ")[0] for fault in struck)
            number += 1
        outcome.notes = {"seed": self._seed, "chains": number, "faults": dict(kinds)}
        return outcome

    def _chain(self, number: int, outcome: Outcome) -> list[str]:
        """One chain; the faults that struck."""
        chance = random.Random(f"{self._seed} {number}")
        shutil.rmtree(self._runs.run.path.parent, ignore_errors=True)
        struck: list[str] = []
        wrong: list[str] = []
        for _ in range(chance.randint(1, 4)):
            if struck and chance.random() < 0.3:
                struck += self._between(chance.choice(_BETWEEN), chance)
            struck += self._start(chance.choice(_STARTS), chance, wrong)
            if self._runs.run.is_finished:
                break
        go_on(self._runs, self._expected, f"chain {number} ({'; '.join(struck)})", outcome, wrong)
        return struck

    def _start(self, fault: str, chance: random.Random, wrong: list[str]) -> list[str]:
        """A start with a fault; how it is called, with its place. Empty where the run ended first
        or did not mind."""
        runs, point = self._runs, chance.randrange(self._operations)
        if fault == "killed":
            code, right = runs.attempt(at_operation(runs, point, die)), {0, -signal.SIGKILL}
        elif fault == "power lost":
            image = chance.choice(KINDS)
            (code, promised), right = power_cut(runs, point), {0, CUT}
            if code == CUT:
                wrong += power_back(runs, image, promised)
        elif fault == "signalled":
            point = chance.randrange(runs.num_micro_batches_before_the_last_step)
            code, right = runs.attempt(lambda: signal_in(point)), {0, 75}
        elif fault == "killed later":
            seconds = chance.uniform(0.2, 0.9) * self._seconds
            code, right = runs.attempt(killed_after=seconds), {0, -signal.SIGKILL}
            point = round(1000 * seconds)
        else:
            refuse = refusing(runs, getattr(errno, fault), and_after=fault == "EROFS")
            code, right = runs.attempt(refuse(point)), {0, 4}
        if code not in right:
            wrong.append(f"{fault} at {point}: exit code {code}")
        if code == 0 and not runs.run.is_finished:
            wrong.append(f"{fault} at {point}: exit code 0, and not finished")
        return [f"{fault} at {point}"] if code else []

    def _between(self, fault: str, chance: random.Random) -> list[str]:
        """Done to the run folder while nobody runs; empty where there is nothing to do it to."""
        if fault == "damaged":
            checkpoints = sound(self._runs)
            if len(checkpoints) < 2:  # the last sound one: an error, and rightly so
                return []
            path = chance.choice(sorted(checkpoints[-1].iterdir()))
            content = bytearray(path.read_bytes())
            place = chance.randrange(len(content))
            content[place] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
            return [f"damaged at {path.name}:{place}"]
        now = time.time()
        for age, path in enumerate(sorted(self._runs.run.path.rglob("*"))):
            later = now + 10 * _DAY - 60 * age
            os.utime(path, (later, later), follow_symlinks=False)
        return ["clock back at a start"]
