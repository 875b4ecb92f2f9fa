"""What a disk holds after the power went: only what was fsynced is sure to be there.

A file's bytes are durable as they were at its last fsync, a folder's names as they were at the last
fsync of the folder. What came later may be there or not, so three images are made of one moment:
`lost` (none of it), `applied` (all names, no bytes that were not fsynced) and `mixed` (drawn for
each folder and file).
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

Entries = dict[str, "tuple[int, bool]"]  # a name's own number, and whether it is a folder
KINDS = ("lost", "applied", "mixed")


class Disk:
    """The durable state of a folder, beside its visible one.

    Inodes are given again once their file is gone, and so each file and folder has a number of its
    own here.

    Args:
        root: everything in it now is durable.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._next = itertools.count()
        self._numbers: dict[int, int] = {}
        self._bytes: dict[int, bytes] = {}
        self._entries: dict[int, Entries] = {}
        self._fsync_all(self.root)

    def _fsync_all(self, folder: Path) -> None:
        self._entries[self._number_of(folder)] = self._listing(folder)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                self._fsync_all(path)
            else:
                self._bytes[self._number_of(path)] = path.read_bytes()

    def _number_of(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._numbers:
            self._numbers[inode] = next(self._next)
        return self._numbers[inode]

    def _listing(self, folder: Path) -> Entries:
        return {p.name: (self._number_of(p), p.is_dir()) for p in folder.iterdir()}

    def after(self, kind: str, path: Path) -> None:
        """An operation has been done (`Operations`)."""
        if kind == "fsync":
            if path.is_dir():
                self._entries[self._number_of(path)] = self._listing(path)
            else:
                self._bytes[self._number_of(path)] = path.read_bytes()
        elif kind in ("create", "mkdir"):
            self._numbers.pop(path.stat().st_ino, None)  # it was another file's
            if kind == "mkdir":
                self._entries[self._number_of(path)] = {}

    def write_image(self, target: Path, kind: str, seed: int) -> None:
        """Writes the folder as the next start would find it."""
        chance = random.Random(f"{kind}{seed}")
        self._write(self.root, self._number_of(self.root), target, kind, chance)

    def _write(
        self, live: Path | None, number: int, target: Path, kind: str, chance: random.Random
    ) -> None:
        target.mkdir(parents=True)
        durable = self._entries.get(number, {})
        now = self._listing(live) if live is not None else {}
        takes_now = kind == "applied" or (kind == "mixed" and chance.random() < 0.5)
        for name, (child, is_folder) in (now if takes_now else durable).items():
            there = (
                live / name if live is not None and now.get(name) == (child, is_folder) else None
            )
            if is_folder:
                self._write(there, child, target / name, kind, chance)
                continue
            content = self._bytes.get(child, b"")
            if kind == "mixed" and there is not None and chance.random() < 0.5:
                content = there.read_bytes()
            (target / name).write_bytes(content)
