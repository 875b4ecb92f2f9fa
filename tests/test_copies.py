"""A function in copies of this process: every answer, in order, and no copy left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from finetune.copies import Copies, heap_at_rest, num_copies
from finetune.errors import CannotContinue, InputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies are forked on Linux alone")
ROOT = Path(__file__).resolve().parents[1]


def with_pid(number: int) -> tuple[int, int]:
    time.sleep(0.002 * (number % 3))
    return number * number, os.getpid()


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 20])
def test_every_item_has_its_answer_in_order(number, num_items):
    with Copies(with_pid, number) as copies:
        for _ in range(2):  # a second file
            answers = list(copies.map(range(num_items)))
            assert [(n, answer) for n, (answer, _) in answers] == [
                (n, n * n) for n in range(num_items)
            ]
            pids = [pid for _, (_, pid) in answers]
            assert set(pids[:1]) <= {os.getpid()}, "the first is done here"
            expected = min(number, max(num_items - 1, 0))
            assert len(set(pids) - {os.getpid()}) == expected


def test_items_are_read_only_a_little_ahead():
    read = []

    def items():
        for number in range(50):
            read.append(number)
            yield number

    with Copies(with_pid, 2) as copies:
        for number, _ in copies.map(items()):
            assert len(read) <= number + 4


def refuse_five(number: int) -> int:
    if number == 5:
        raise InputError("five")
    return number


def test_what_the_function_raises_is_raised_here_and_later_items_are_not_mixed_up():
    with Copies(refuse_five, 2) as copies:
        with pytest.raises(InputError, match="five"):
            list(copies.map(range(20)))
        assert list(copies.map(range(5))) == [(n, n) for n in range(5)]


def test_items_that_cannot_be_read_end_it():
    def items():
        yield from range(4)
        raise InputError("line 5")

    with Copies(with_pid, 1) as copies:
        with pytest.raises(InputError, match="line 5"):
            list(copies.map(items()))
        assert [n for n, _ in copies.map(range(3))] == [0, 1, 2]


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_copy_is_said():
    with Copies(die_at_three, 1) as copies, pytest.raises(CannotContinue, match="exit code -9"):
        list(copies.map(range(10)))


def test_copies_are_gone_when_nobody_asks_any_more():
    with Copies(with_pid, 2) as copies:
        pids = {pid for _, (_, pid) in copies.map(range(9))} - {os.getpid()}
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_copies_end_with_a_process_that_is_killed(tmp_path):
    script = textwrap.dedent("""
        import os, time
        from finetune.copies import Copies
        def pid(item): return os.getpid()
        with Copies(pid, 3) as copies:
            print(*{p for _, p in copies.map(range(9))} - {os.getpid()}, flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_running(pid) for pid in pids)


def _is_running(pid: int) -> bool:
    """Zombies, which wait for whoever adopts them, are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_core_is_left_for_this_process(monkeypatch):
    for cores, expected in ((1, 0), (2, 1), (4, 3), (64, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert num_copies() == expected


def test_the_collector_is_left_as_it_was():
    import gc

    before = gc.get_threshold()
    with heap_at_rest():
        assert gc.get_freeze_count() > 1000
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
