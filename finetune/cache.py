"""What is kept between runs: converted bases, prepared data, hashes of large files."""

from __future__ import annotations

import os
from pathlib import Path

from finetune import artifact


def cache_root() -> Path:
    """FINETUNE_CACHE, or ~/.cache/plumbtune."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "plumbtune")


def remembered_sha256(file: Path, root: Path | None = None) -> str:
    """The hash of a file's content, from memory where size and time of change are last time's.

    A file changed within the last second is hashed, not remembered: the clock of a file system may
    be too coarse to tell the next change from this one.

    Args:
        root: where hashes are kept; `cache_root()` if left out.
    """
    file, root = file.resolve(), root or cache_root()
    stat = file.stat()
    key = artifact.sha256_of_json([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    note = root / "hashes" / f"{key}.json"
    if note.exists():
        digest: str = artifact.read_json(note)["sha256"]
        return digest
    digest = artifact.sha256_of(file)
    if _is_settled(stat.st_mtime_ns):
        note.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(note, {"bytes": stat.st_size, "sha256": digest})
    return digest


def _is_settled(changed_ns: int) -> bool:
    import time

    return time.time_ns() - changed_ns > 1_000_000_000
