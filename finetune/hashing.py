"""sha256 beside the work that reads or writes the bytes: hashlib lets go of the interpreter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundSha256:
    """The sha256 of a stream of buffers, computed by a thread of its own.

    A buffer must not change after `update`. At most one waits, so that memory stays bounded.

    Args:
        first: called with each buffer by that thread before it is hashed, such as a file's
            `write`; what it raises comes out of the next call.
    """

    def __init__(self, first: Callable[[Any], object] | None = None) -> None:
        self._digest = hashlib.sha256()
        self._first = first
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> BackgroundSha256:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, content: Any) -> None:
        """Adds bytes, or anything that gives its memory."""
        self._wait()
        self._pending = self._pool.submit(self._take, content)

    def hexdigest(self) -> str:
        """The hash of everything so far."""
        self._wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()

    def _take(self, content: Any) -> None:
        if self._first is not None:
            self._first(content)
        self._digest.update(content)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
