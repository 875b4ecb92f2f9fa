"""A function in forked copies of this process, so that other cores work on it too.

A copy starts in milliseconds with all that is loaded here: tokenizer, settings, code. It ends with
this process, however that ends: nobody holds the other end of its pipe any longer.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from finetune.errors import CannotContinue

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_A_FEW = 50  # items that are done here before copies are looked after again
MAX_COPIES = 3  # this process reads and writes what they work on; more would wait for it


def num_copies() -> int:
    """As many as there are cores left; none where forking is no safe thing to do."""
    if sys.platform != "linux":
        return 0
    return min(MAX_COPIES, len(os.sched_getaffinity(0)) - 1)


@dataclass
class _Block(Generic[Item, Answer]):
    """A block on its way.

    Attributes:
        items: of it.
        answers: of the first of them, done here.
        pipe: of the copy that works on the others; None where all are done.
    """

    items: Sequence[Item]
    answers: list[Answer]
    pipe: Connection | None


class Copies(Generic[Item, Answer]):
    """Copies of this process that wait for blocks of items; used as a context.

    Args:
        function: what is done with some items, an answer for each; the items do not know of each
            other. Items and answers are pickled between processes of one program.
        number: of copies; without one, the function runs here.
    """

    def __init__(self, function: Callable[[Sequence[Item]], list[Answer]], number: int) -> None:
        self._function, self._number = function, number
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._idle: deque[Connection] = deque()

    def map(
        self, blocks: Iterable[Sequence[Item]]
    ) -> Iterator[tuple[Sequence[Item], list[Answer]]]:
        """Each block with its answers, in order; a few blocks are read ahead.

        The first is done here: where it is the only one, nothing is forked. While every copy is at
        work, so is this process, a few items at a time.

        Raises:
            CannotContinue: a copy was killed.
        """
        blocks = iter(blocks)
        for block in blocks:
            yield block, self._function(block)
            break
        if not self._number:
            yield from ((block, self._function(block)) for block in blocks)
            return
        try:
            yield from self._side_by_side(blocks)
        except BaseException:  # answers that nobody reads would be taken for those to later items
            self._stop()
            raise

    def _side_by_side(
        self, blocks: Iterable[Sequence[Item]]
    ) -> Iterator[tuple[Sequence[Item], list[Answer]]]:
        waiting: deque[_Block[Item, Answer]] = deque()
        for items in blocks:
            if not self._workers:
                self._start()
            answers, pipe = self._shared_out(items, waiting)
            waiting.append(_Block(items, answers, pipe))
            if len(waiting) > self._number + 1:  # a copy that is slow is waited for
                self._receive(waiting[0])
            while waiting and waiting[0].pipe is None:
                done = waiting.popleft()
                yield done.items, done.answers
        for block in waiting:
            self._receive(block)
            yield block.items, block.answers

    def _shared_out(
        self, items: Sequence[Item], waiting: Iterable[_Block[Item, Answer]]
    ) -> tuple[list[Answer], Connection | None]:
        """Works on a block until a copy is free to take the rest of it.

        Returns:
            the answers made here, and the pipe of the copy; None where nothing was left.
        """
        answers: list[Answer] = []
        while len(answers) < len(items):
            for block in waiting:
                if block.pipe is not None and block.pipe.poll():
                    self._receive(block)
            if self._idle:
                pipe = self._idle.popleft()
                pipe.send(items[len(answers) :])  # its copy waits for it: this does not block
                return answers, pipe
            answers += self._function(items[len(answers) : len(answers) + _A_FEW])
        return answers, None

    def _receive(self, block: _Block[Item, Answer]) -> None:
        if block.pipe is not None:
            block.answers += self._received(block.pipe)
            self._idle.append(block.pipe)
            block.pipe = None

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
        self._idle.extend(ours)

    def _received(self, pipe: Connection) -> list[Answer]:
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
        result: list[Answer] = answer
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
        self._idle.clear()


def _answer(
    function: Callable[[Sequence[Item]], list[Answer]],
    pipe: Connection,
    others: Sequence[Connection],
) -> None:
    """What a copy does until the other end of its pipe is closed."""
    for other in others:  # inherited; while it is open here, its copy would outlive the run
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the run itself sees to it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads stayed in the other process
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            items = pipe.recv()
            reply: tuple[list[Answer] | None, Exception | None]
            try:
                reply = function(items), None
            except Exception as error:  # is raised where the answer is waited for
                reply = None, error
            pipe.send(reply)
