"""sha256 beside the work that reads or writes the bytes: hashlib lets go of the interpreter."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundSha256:
    """The sha256 of a stream of buffers, computed by a thread of its own.

    A buffer must not change after `update`. At most one waits, so that memory stays bounded.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[Any] | None = None

    def update(self, content: Any) -> None:
        """Adds bytes, or anything that gives its memory."""
        self._wait()
        self._pending = self._pool.submit(self._digest.update, content)

    def hexdigest(self) -> str:
        """The hash of everything so far."""
        self._wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
