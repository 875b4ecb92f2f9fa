"""Freed memory is kept for the next step, where the allocator is glibc's and nobody chose."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
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
