"""What a command needs: wall time and peak memory of its process, also phase by phase.

Memory is the kernel's own count for the process (VmRSS and its high-water mark VmHWM of
/proc/PID/status, Linux only). It has two halves: RssAnon is what the process allocated, RssFile
is the pages of mapped files, which the kernel takes back when others need the memory.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SECONDS_BETWEEN_SAMPLES = 0.02
_KIB_IN_GIB = 1 << 20


@dataclass
class Phase:
    """A stretch of a command, between two changes of what lies on the disk."""

    seconds: float = 0.0
    peak_gib: float = 0.0


@dataclass
class Measured:
    """One command that ended well.

    Attributes:
        seconds: wall time, the interpreter's start included.
        peak_gib: high-water mark of the resident memory, as last read before the end; rusage
            is of no use, as it counts what the process that forks had.
        anon_gib: RssAnon in the sample with the most resident memory.
        file_gib: RssFile in the same sample.
        phases: by name, in order; their peaks are sampled.
    """

    seconds: float = 0.0
    peak_gib: float = 0.0
    anon_gib: float = 0.0
    file_gib: float = 0.0
    phases: dict[str, Phase] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Rounded, as it is kept."""
        kept = {key: round(getattr(self, key), 2) for key in ("seconds", "peak_gib")}
        at_peak = {"anon_gib": round(self.anon_gib, 2), "file_gib": round(self.file_gib, 2)}
        phases = {
            name: {"seconds": round(phase.seconds, 2), "peak_gib": round(phase.peak_gib, 2)}
            for name, phase in self.phases.items()
        }
        return {**kept, "at_the_peak": at_peak, "phases": phases}


def run_measured(command: Sequence[str], cwd: Path, phase_now: Callable[[], str]) -> Measured:
    """Runs a command and watches its process.

    Args:
        command: the program and its arguments.
        cwd: where it runs.
        phase_now: names the phase that the command is in.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    measured, most, begun = Measured(), 0.0, time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    last = begun
    while True:
        ended, now = process.poll() is not None, time.monotonic()
        phase = measured.phases.setdefault(phase_now(), Phase())
        phase.seconds, last = phase.seconds + now - last, now
        if ended:
            break
        memory = memory_gib(process.pid)
        phase.peak_gib = max(phase.peak_gib, memory["VmRSS"])
        measured.peak_gib = max(measured.peak_gib, memory["VmHWM"])
        if memory["VmRSS"] > most:
            most = memory["VmRSS"]
            measured.anon_gib, measured.file_gib = memory["RssAnon"], memory["RssFile"]
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    measured.seconds = now - begun
    return measured


def memory_gib(pid: int | str) -> dict[str, float]:
    """The four counts; zero for a process that has just ended."""
    names = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return {name: int(found.get(name, 0)) / _KIB_IN_GIB for name in names}
