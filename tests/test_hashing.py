"""The hash beside the work: the bytes', in order, with bounded memory; errors are not lost."""

import hashlib
import threading

import pytest

from finetune import hashing
from finetune.hashing import BackgroundSha256


def buffers(count=50, size=1000):
    return [bytes([n % 256]) * (size + n) for n in range(count)]


def test_the_hash_is_that_of_the_bytes_and_the_work_beside_sees_them_in_order():
    seen = []
    with BackgroundSha256(beside=seen.append) as digest:
        for buffer in buffers():
            digest.update(buffer)
        found = digest.hexdigest()
    assert seen == buffers()
    assert found == hashlib.sha256(b"".join(buffers())).hexdigest()


def test_an_error_beside_comes_out():
    def refuse(_):
        raise OSError("full")

    with BackgroundSha256(beside=refuse) as digest:
        digest.update(b"x")
        with pytest.raises(OSError, match="full"):
            digest.hexdigest()


def test_what_waits_is_bounded(monkeypatch):
    """A slow disk holds up the work that makes the bytes, not the memory."""
    monkeypatch.setattr(hashing, "_WAITING_BYTES", 100)
    go, taken, given = threading.Event(), [], []

    def write(content):
        go.wait()
        taken.append(content)

    with BackgroundSha256(beside=write) as digest:

        def give():
            for _ in range(10):
                digest.update(b"x" * 40)
                given.append(1)

        giver = threading.Thread(target=give)
        giver.start()
        giver.join(0.5)
        assert len(given) == 2  # 80 bytes; a third would make it 120
        go.set()
        giver.join()
        assert digest.hexdigest() == hashlib.sha256(b"x" * 400).hexdigest()
    assert len(taken) == 10


def test_a_buffer_above_the_bound_waits_alone(monkeypatch):
    monkeypatch.setattr(hashing, "_WAITING_BYTES", 100)
    with BackgroundSha256() as digest:
        for _ in range(3):
            digest.update(b"y" * 1000)
        assert digest.hexdigest() == hashlib.sha256(b"y" * 3000).hexdigest()
