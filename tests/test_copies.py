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

from finetune.copies import Copies, num_copies
from finetune.errors import CannotContinue, InputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies are forked on Linux alone")
ROOT = Path(__file__).resolve().parents[1]
HERE = os.getpid()


def with_pid(numbers):
    time.sleep(0.002 * (sum(numbers) % 3))
    return [(number * number, os.getpid()) for number in numbers]


def blocks_of(num_blocks: int, size: int = 120):
    """Blocks of numbers that count on."""
    return [range(n * size, (n + 1) * size) for n in range(num_blocks)]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, 120])
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 20])
def test_every_item_has_its_answer_in_order(number, num_blocks, size):
    blocks = blocks_of(num_blocks, size)
    with Copies(with_pid, number) as copies:
        for _ in range(2):  # a second file
            answers = list(copies.map(iter(blocks)))
            assert [block for block, _ in answers] == blocks
            pids = []
            for block, found in answers:
                assert [answer for answer, _ in found] == [n * n for n in block]
                pids.append({pid for _, pid in found})
            assert set().union(*pids[:1]) <= {os.getpid()}, "the first is done here"
            expected = min(number, max(num_blocks - 1, 0))
            others = set().union(*pids) - {os.getpid()}
            assert len(others) == expected


def work_for_long(numbers):
    """A copy needs as long as this process for 75 of a block's 130 items."""
    time.sleep(0.002 * len(numbers) if os.getpid() == HERE else 0.15)
    return [os.getpid() for _ in numbers]


def test_this_process_works_too_and_leaves_the_rest_of_a_block_to_a_copy():
    with Copies(work_for_long, 1) as copies:
        answers = [found for _, found in copies.map(blocks_of(9, 130))]
    shares = [found.count(os.getpid()) for found in answers[1:]]
    assert any(0 < share < 130 for share in shares)


def noted_blocks(read):
    """Fifty blocks of one number, each noted when it is read."""
    for number in range(50):
        read.append(number)
        yield [number]


def test_blocks_are_read_only_a_little_ahead():
    read = []
    with Copies(with_pid, 2) as copies:
        for (number,), _ in copies.map(noted_blocks(read)):
            assert len(read) <= number + 7


def slow_at_one(numbers):
    time.sleep(0.3 if 1 in numbers else 0)
    return list(numbers)


def test_a_slow_copy_is_waited_for():
    """Else what the others answer would pile up."""
    read = []
    with Copies(slow_at_one, 2) as copies:
        for (number,), found in copies.map(noted_blocks(read)):
            assert found == [number]
            assert len(read) <= number + 7


def singles(numbers):
    return ([number] for number in numbers)


def refuse_five(numbers):
    if 5 in numbers:
        raise InputError("five")
    return list(numbers)


def test_what_the_function_raises_is_raised_here_and_later_items_are_not_mixed_up():
    with Copies(refuse_five, 2) as copies:
        with pytest.raises(InputError, match="five"):
            list(copies.map(singles(range(20))))
        assert list(copies.map(singles(range(5)))) == [([n], [n]) for n in range(5)]


def test_items_that_cannot_be_read_end_it():
    def items():
        yield from singles(range(4))
        raise InputError("line 5")

    with Copies(with_pid, 1) as copies:
        with pytest.raises(InputError, match="line 5"):
            list(copies.map(items()))
        assert [n for (n,), _ in copies.map(singles(range(3)))] == [0, 1, 2]


def die(numbers):
    if os.getpid() != HERE:
        os.kill(os.getpid(), signal.SIGKILL)
    return list(numbers)


def test_a_killed_copy_is_said():
    with Copies(die, 1) as copies, pytest.raises(CannotContinue, match="exit code -9"):
        list(copies.map(singles(range(10))))


def test_copies_are_gone_when_nobody_asks_any_more():
    with Copies(with_pid, 2) as copies:
        answers = copies.map(blocks_of(9))
        pids = {pid for _, found in answers for _, pid in found} - {os.getpid()}
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_copies_end_with_a_process_that_is_killed(tmp_path):
    script = textwrap.dedent("""
        import os, time
        from finetune.copies import Copies
        def pid(items): return [os.getpid()] * len(items)
        with Copies(pid, 3) as copies:
            answers = copies.map([[n] for n in range(9)])
            print(*{p for _, found in answers for p in found} - {os.getpid()}, flush=True)
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
