"""Freed memory is kept for the next step, where the allocator is glibc's and nobody chose."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from small_runs import ROOT, losses

from finetune.fast import allocator
from finetune.fast.allocator import keep_freed_memory

HELD = """
import re, sys
import torch
from finetune.fast.allocator import keep_freed_memory
def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = held()
block = torch.ones(64, 1 << 20)  # 256 MiB
del block
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(("how", "least", "most"), [("keep", 250, 300), ("not", -10, 50)])
def test_a_freed_block_stays_with_the_process(how, least, most):
    command = [sys.executable, "-c", HELD, how]
    plain = {k: v for k, v in os.environ.items() if k not in allocator.VARIABLES}
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=plain)
    assert least < float(done.stdout) < most


@pytest.mark.parametrize(
    "name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"]
)
def test_what_the_environment_says_stands(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_the_switch_and_that_no_number_changes(bench, monkeypatch):
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(1))
    off = bench.train("train.max_steps=2", "fast.allocator=false", "run.name=off")
    assert calls == []
    on = bench.train("train.max_steps=2", "run.name=on")
    assert calls == [1]
    assert losses(on) == losses(off)


SHAPES = """
import ctypes, sys
if sys.argv[1] == "ours":
    import finetune
import torch
class Heap(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Heap
weight = torch.randn(64, 64, dtype=torch.bfloat16)
def products(counts):
    for count in counts:
        torch.randn(count, 64, dtype=torch.bfloat16) @ weight
    found = libc.mallinfo2()
    return (found.uordblks + found.hblkhd) / 2**20
before = products([64])
print(products(range(100, 500)) - before)
"""


needs_bfloat16 = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not torch.cpu._is_avx512_bf16_supported(),
    reason="the C library is not glibc, or the CPU has no bfloat16 units",
)


@needs_bfloat16
def test_shapes_of_bfloat16_products_are_forgotten():
    """400 shapes: without the limits of `finetune.__init__` all of them are kept."""
    assert float(said_by(SHAPES, "ours")) < 100 < float(said_by(SHAPES, "torch's"))


NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def said_by(script: str, *words: str, **settings: str) -> str:
    plain = {k: v for k, v in os.environ.items() if k not in NAMES}
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=plain | settings
    )
    return done.stdout


KERNELS = """
import sys
import torch
from finetune.fast.products import keep_small_kernels
if sys.argv[1] == "kept":
    keep_small_kernels()
weight = torch.randn(64, 64, dtype=torch.bfloat16)
for _ in range(2):  # the second time over, what was kept is not made again
    print("round", flush=True)
    for size in range(2, 102):
        torch.randn(size, 64, dtype=torch.bfloat16) @ weight
"""


@pytest.mark.parametrize(
    ("how", "settings", "is_kept"),
    [
        ("kept", {}, True),
        ("not", {}, False),
        ("kept", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "48"}, False),
    ],
    ids=["kept", "not", "chosen by the user"],
)
@needs_bfloat16
def test_bfloat16_keeps_the_kernels_of_more_sizes(how, settings, is_kept):
    """oneDNN says itself which kernels it makes."""
    said = said_by(KERNELS, how, ONEDNN_VERBOSE="profile_create", **settings)
    first, second = (part.count("create:cache_miss") for part in said.split("round")[1:])
    assert first >= 100
    assert second == 0 if is_kept else second >= 100
