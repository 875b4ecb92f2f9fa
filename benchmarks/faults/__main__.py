"""Faults at every file operation of a run, at random times, in every file of a checkpoint.

    python -m benchmarks.faults --folder FOLDER --json RESULT.json

A small real run (6 steps, packs, dropout, accumulation, three checkpoints of which two are kept) is
made in copies of this process, disturbed, and started again: it must end bit for bit where the
undisturbed one ends. The exit code is 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import errno
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults import disks, signals, sweeps
from benchmarks.faults.corruption import corrupted
from benchmarks.faults.runs import Runs, import_all
from benchmarks.faults.soak import Soak
from benchmarks.records import today
from finetune import artifact

LONG = {"max_steps": 60, "save_steps": 7, "eval_steps": None}


SWEEPS = [
    *("kills", "refused-space", "refused-io", "read-only", "full-at-byte", "power"),
    *("signals", "signals-twice", "random-kills", "damage", "soak"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """The sweeps asked for; those of another call stay in the result's file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work; it is emptied")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--step", type=int, default=1, help="only every so many points")
    parser.add_argument("--kills", type=int, default=50, help="random kills")
    parser.add_argument("--pairs", type=int, default=200, help="random faults of every kind")
    parser.add_argument("--seed", type=int, default=0, help="of the random faults")
    parser.add_argument("--only", nargs="*", choices=SWEEPS, default=SWEEPS)
    args = parser.parse_args(argv)
    shutil.rmtree(args.folder, ignore_errors=True)
    import_all()
    kept = artifact.read_json(args.json) if args.json and args.json.exists() else {"sweeps": []}
    outcomes = {outcome["name"]: outcome for outcome in kept["sweeps"]}
    failed = False
    for outcome in run_all(args):
        print(f"{outcome['held']:5} of {outcome['tried']:5} {outcome['name']}", file=sys.stderr)
        for failure in outcome["failures"][:10]:
            print(f"      {failure}", file=sys.stderr)
        failed = failed or bool(outcome["failures"])
        outcomes[outcome["name"]] = outcome
        if args.json:  # after each: a sweep that is cut short keeps what it found
            artifact.write_json(args.json, {"sweeps": list(outcomes.values())})
    return int(failed)


def run_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Sweeps in turn, each with its date, its step and its time."""
    folder, step = args.folder, args.step
    runs = _place(folder / "short")
    expected = sweeps.straight(runs)
    shutil.copytree(runs.run.checkpoints, folder / "sound")
    points = range(0, sweeps.num_operations(runs), step)
    between = range(step // 2, points.stop, step)
    limits = disks.bytes_to_try(runs, max(20 // step, 4))
    quiet = _place(folder / "quiet", train={"eval_steps": None})
    # In the last step a signal comes too late to stop the run.
    micro_batches = range(0, quiet.num_micro_batches_before_the_last_step, -(-step // 8))
    undisturbed = functools.cache(lambda: sweeps.straight(quiet))
    long = _place(folder / "long", train=LONG)
    parts: list[Callable[[], sweeps.Outcome]] = [
        lambda: sweeps.killed(runs, expected, points),
        lambda: disks.refused(runs, expected, points, errno.ENOSPC),
        lambda: disks.refused(runs, expected, between, errno.EIO),
        lambda: disks.read_only(runs, expected, points),
        lambda: disks.full_at_byte(runs, expected, limits),
        lambda: sweeps.powerless(runs, expected, points),
        lambda: signals.signalled(quiet, undisturbed(), micro_batches),
        lambda: signals.signalled_twice(quiet, undisturbed(), step),
        lambda: sweeps.killed_at_random(long, sweeps.straight(long), args.kills),
        lambda: corrupted(folder / "sound", folder / "damaged"),
        lambda: Soak(quiet, undisturbed(), args.seed).run(args.pairs),
    ]
    date = today()
    for name, part in zip(SWEEPS, parts, strict=True):
        if name in args.only:
            began, found = time.monotonic(), part().as_json()
            seconds = round(time.monotonic() - began, 1)
            yield found | {"date": date, "step": step, "seconds": seconds}


def _place(folder: Path, **settings: dict[str, Any]) -> Runs:
    folder.mkdir(parents=True)
    return Runs(folder, **settings)


if __name__ == "__main__":
    sys.exit(main())
