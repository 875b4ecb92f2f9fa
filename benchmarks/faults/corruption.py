"""Damage to every file of a published checkpoint: it is found, and the one before is taken."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.sweeps import Outcome
from finetune import artifact, checkpoint


def corrupted(checkpoints: Path, folder: Path, places: int = 20) -> Outcome:
    """Flips, zeroes, cuts, deletes and swaps, in each file of the newest checkpoint in turn.

    Args:
        checkpoints: of a run, two or more of them sound.
        folder: to work in.
        places: bits flipped and bytes zeroed in each file.
    """
    outcome = Outcome("damaged checkpoints")
    newest, before = checkpoint.list_checkpoints(checkpoints)[:-3:-1]
    for name, what, content in _damages(newest, before, places):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoints, folder)
        path = folder / newest.name / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        outcome.tried += 1
        found = artifact.findings_of(folder / newest.name)
        with contextlib.redirect_stderr(io.StringIO()):
            chosen = checkpoint.find_resumable(folder, "auto")
        if not found or chosen != folder / before.name:
            outcome.failures.append(f"{name}: {what}: found {found}, gone on from {chosen}")
    return outcome


def _damages(folder: Path, before: Path, places: int) -> Iterator[tuple[str, str, bytes | None]]:
    """A file's name, what is done to it, and what it holds then; None where it is gone."""
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    for name, content in contents.items():
        for number in range(places):
            place = number * (len(content) - 1) // max(places - 1, 1)
            flipped, zeroed = bytearray(content), bytearray(content)
            flipped[place] ^= 1 << number % 8
            yield name, f"bit {number % 8} of byte {place} flipped", bytes(flipped)
            zeroed[place : place + 8] = bytes(len(zeroed[place : place + 8]))
            if zeroed != content:
                yield name, f"zeroes from byte {place}", bytes(zeroed)
        for length in sorted({0, 1, len(content) // 2, len(content) - 1}):
            yield name, f"cut to {length} bytes", content[:length]
        yield name, "deleted", None
        older = (before / name).read_bytes()
        if older != content:
            yield name, f"as in {before.name}", older
        for other, theirs in contents.items():
            if theirs != content:
                yield name, f"holds what {other} holds", theirs
