"""What is kept between runs: converted bases, prepared data, hashes of large files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from finetune import artifact
from finetune.errors import CannotContinue, InputError, is_of_the_system

_SETTLED_NS = 1_000_000_000


def cache_root() -> Path:
    """FINETUNE_CACHE, or ~/.cache/plumbtune."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "plumbtune")


@contextlib.contextmanager
def kept_in_cache() -> Iterator[None]:
    """Says which setting chose the folder where the disk refuses what is to be kept there."""
    try:
        yield
    except CannotContinue as error:
        if not is_of_the_system(error.__cause__):
            raise
        raise CannotContinue(f"{error}. FINETUNE_CACHE names another folder") from error.__cause__


def remembered_sha256(file: Path, root: Path | None = None) -> str:
    """The hash of a file's content, from memory where size and times of change are last time's.

    A file changed within the last second is hashed, not remembered: the clock of a file system may
    be too coarse to tell the next change from this one. The inode's own time of change is looked at
    too, since `cp -p` and `rsync -t` put the other one back. Without a note that can be read or
    written the file is hashed each time.

    Args:
        root: where hashes are kept; `cache_root()` if left out.
    """
    file, root = file.resolve(), root or cache_root()
    stat, now = file.stat(), time.time_ns()
    times = [stat.st_mtime_ns, stat.st_ctime_ns]
    key = artifact.sha256_of_json([str(file), stat.st_size, *times, stat.st_ino])
    note = root / "hashes" / f"{key}.json"
    with contextlib.suppress(InputError, OSError, KeyError, TypeError):
        digest: str = artifact.read_json(note)["sha256"]
        return digest
    digest = artifact.sha256_of(file)
    if now - max(times) > _SETTLED_NS:
        with contextlib.suppress(OSError, CannotContinue):
            note.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_json(note, {"bytes": stat.st_size, "sha256": digest})
    return digest
