"""sha256 beside the work that reads or writes the bytes: hashlib lets go of the interpreter."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_WAITING_BYTES = 32 << 20


class BackgroundSha256:
    """The sha256 of a stream of buffers, computed by a thread of its own.

    A buffer must not change after `update`. Those that wait hold 32 MiB at most, or are one.

    Args:
        beside: called with each buffer by another thread at the same time, such as a file's
            `write`; what it raises comes out of the next call.
    """

    def __init__(self, beside: Callable[[Any], object] | None = None) -> None:
        self._digest = hashlib.sha256()
        works = [self._digest.update, *([beside] if beside else [])]
        self._threads = [(work, ThreadPoolExecutor(max_workers=1)) for work in works]
        self._pending: deque[tuple[int, list[Future[object]]]] = deque()
        self._num_bytes = 0  # of those that wait

    def __enter__(self) -> BackgroundSha256:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, content: Any) -> None:
        """Adds bytes, or anything that gives its memory."""
        size = memoryview(content).nbytes
        self._wait(max(_WAITING_BYTES - size, 0))
        works = [thread.submit(work, content) for work, thread in self._threads]
        self._pending.append((size, works))
        self._num_bytes += size

    def hexdigest(self) -> str:
        """The hash of everything so far."""
        self._wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Ends the threads."""
        for _, thread in self._threads:
            thread.shutdown()

    def _wait(self, most: int = 0) -> None:
        """Until those that wait hold so many bytes at most."""
        while self._num_bytes > most:
            size, works = self._pending.popleft()
            self._num_bytes -= size
            for work in works:
                work.result()
