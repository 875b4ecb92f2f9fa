"""A function in forked copies of this process, so that other cores work on it too.

A copy starts in milliseconds with all that is loaded here: tokenizer, settings, code. It ends with
this process, however that ends: nobody holds the other end of its pipe any longer.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from finetune.errors import CannotContinue

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_YOUNG_OBJECTS = 50_000  # before the collector looks for cycles among them; Python's own is 700
MAX_COPIES = 3  # this process reads and writes what they work on; more would wait for it


def num_copies() -> int:
    """As many as there are cores left; none where forking is no safe thing to do."""
    if sys.platform != "linux":
        return 0
    return min(MAX_COPIES, len(os.sched_getaffinity(0)) - 1)


@contextlib.contextmanager
def heap_at_rest() -> Iterator[None]:
    """Spares what is loaded already the garbage collector's walks, here and in copies.

    Rows are a hundred thousand young objects, and every few of them the collector would walk all
    of the libraries, which in a copy also copies their memory: half of the time of a preparation.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class Copies(Generic[Item, Answer]):
    """Copies of this process that wait for items; used as a context.

    Args:
        function: what a copy does with an item; items and answers are pickled between processes
            of one program.
        number: of copies; without one, the function runs here.
    """

    def __init__(self, function: Callable[[Item], Answer], number: int) -> None:
        self._function, self._number = function, number
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Answer]]:
        """Each item with its answer, in order; a few items are read ahead.

        The first is done here: where it is the only one, nothing is forked.

        Raises:
            CannotContinue: a copy was killed.
        """
        items = iter(items)
        for item in items:
            yield item, self._function(item)
            break
        if not self._number:
            yield from ((item, self._function(item)) for item in items)
            return
        try:
            yield from self._side_by_side(items)
        except BaseException:  # answers that nobody reads would be taken for those to later items
            self._stop()
            raise

    def _side_by_side(self, items: Iterable[Item]) -> Iterator[tuple[Item, Answer]]:
        waiting: deque[tuple[Item, Connection]] = deque()
        for item in items:
            if not self._workers:
                self._start()
            answered = None
            if len(waiting) == self._number:
                done, pipe = waiting.popleft()
                answered = done, self._received(pipe)
            else:
                pipe = self._workers[len(waiting)][1]
            pipe.send(item)  # its copy waits for it, so that this never blocks for long
            waiting.append((item, pipe))
            if answered is not None:
                yield answered
        for item, pipe in waiting:
            yield item, self._received(pipe)

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        ours: list[Connection] = []
        for _ in range(self._number):
            here, there = context.Pipe()
            ours.append(here)
            process = context.Process(
                target=_answer, args=(self._function, there, tuple(ours)), daemon=True
            )
            process.start()
            there.close()
            self._workers.append((process, here))

    def _received(self, pipe: Connection) -> Answer:
        try:
            answer, error = pipe.recv()
        except (EOFError, ConnectionError):
            process = next(process for process, other in self._workers if other is pipe)
            process.join()
            raise CannotContinue(
                f"a process that renders rows ended early (exit code {process.exitcode}); "
                "-9 is mostly the system's answer to too little memory; start again"
            ) from None
        if error is not None:
            raise error
        result: Answer = answer
        return result

    def __enter__(self) -> Copies[Item, Answer]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.terminate()  # it may be at work on what nobody waits for any more
            process.join()
        self._workers.clear()


def _answer(
    function: Callable[[Item], Answer], pipe: Connection, others: Sequence[Connection]
) -> None:
    """What a copy does until the other end of its pipe is closed."""
    for other in others:  # inherited; while it is open here, its copy would outlive the run
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the run itself sees to it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads stayed in the other process
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            item = pipe.recv()
            reply: tuple[Answer | None, Exception | None]
            try:
                reply = function(item), None
            except Exception as error:  # is raised where the answer is waited for
                reply = None, error
            pipe.send(reply)
