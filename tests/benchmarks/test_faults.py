"""A part of `make faults`: some points of every sweep, on real runs; a broken protocol is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT

from benchmarks.faults.power import KINDS, Disk

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="finds the names of open files in /proc"
)

SWEEPS = {  # the least points of each, at every 43rd and at every 141st
    "killed at every file operation": (5, 1),
    "ENOSPC at every file operation": (5, 1),
    "EIO at every file operation": (5, 1),
    "read-only from every file operation on": (5, 1),
    "full at a byte of a file": (4, 1),
    "power lost at every file operation": (15, 3),
    "SIGTERM in every micro-batch": (1, 1),
    "SIGTERM again at every file operation after the first": (1, 1),
    "killed at random times, chained": (1, 1),
    "damaged checkpoints": (300, 100),
    "faults at random, chained": (6, 2),
}


@pytest.fixture(scope="module", params=[pytest.param("43", marks=pytest.mark.slow), "141"])
def sweeps(request, tmp_path_factory):
    """Every 43rd or 141st point of each sweep."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "benchmarks.faults", "--folder", str(folder / "work")]
    options = ["--json", str(folder / "result.json"), "--step", request.param]
    options += ["--kills", "2" if request.param == "43" else "1"]
    options += ["--pairs", "6" if request.param == "43" else "2"]
    subprocess.run([*command, *options], cwd=ROOT, check=False, capture_output=True)
    result = json.loads((folder / "result.json").read_text())
    return {sweep["name"]: sweep for sweep in result["sweeps"]} | {"step": request.param}


def test_these_are_all(sweeps):
    assert list(sweeps) == [*SWEEPS, "step"]


@pytest.mark.parametrize("name", SWEEPS)
def test_it_holds(sweeps, name):
    assert sweeps[name]["failures"] == []
    assert sweeps[name]["tried"] >= SWEEPS[name][sweeps["step"] == "141"]


IN_A_PROCESS = """
import os, sys
from pathlib import Path
from benchmarks.faults.operations import Operations
from benchmarks.faults.power import Disk
root, images = Path(sys.argv[1]), Path(sys.argv[2])
(root / "old").write_text("durable")
disk, seen = Disk(root), []
note = lambda number, kind, path: seen.append(f"{kind} {path.name}")
Operations(root, note, disk.after).install()
with (root / "new").open("w") as file:
    file.write("half")
with (root / "kept").open("w") as file:
    file.write("kept")
    file.flush()
    os.fsync(file.fileno())
(root / "folder").mkdir()
os.replace(root / "kept", root / "old")
(images.parent / "elsewhere").write_text("not counted")
print("; ".join(seen))
disk.write_image(images / "lost", "lost", 0)
disk.write_image(images / "applied", "applied", 0)
descriptor = os.open(root, os.O_RDONLY)
os.fsync(descriptor)
disk.write_image(images / "fsynced", "lost", 0)
"""


def test_what_was_not_fsynced_is_lost(tmp_path):
    root, images = tmp_path / "root", tmp_path / "images"
    root.mkdir()
    command = [sys.executable, "-c", IN_A_PROCESS, str(root), str(images)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip().split("; ") == [
        *("open new", "write new", "open kept", "write kept", "fsync kept"),
        *("mkdir folder", "replace old"),
    ]

    def image(name):
        found = sorted((images / name).rglob("*"))
        return {p.name: p.read_text() if p.is_file() else None for p in found}

    assert image("lost") == {"old": "durable"}, "a new name in an old folder is not there"
    assert image("applied") == {"new": "", "old": "kept", "folder": None}
    assert image("fsynced") == {"new": "", "old": "kept", "folder": None}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_there_before_is_durable(tmp_path, kind):
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "deep" / "a").write_text("x")
    Disk(tmp_path / "root").write_image(tmp_path / "image", kind, 0)
    assert (tmp_path / "image" / "deep" / "a").read_text() == "x"


WITHOUT_FSYNC = """
import sys
from pathlib import Path
from benchmarks.faults import runs, sweeps
from finetune import artifact
artifact._fsync = lambda path: None
runs.import_all()
place = runs.Runs(Path(sys.argv[1]))
print(len(sweeps.powerless(place, sweeps.straight(place), range(60, 220, 61)).failures))
"""


@pytest.mark.slow
def test_files_that_are_never_fsynced_are_seen_to_be_lost(tmp_path):
    command = [sys.executable, "-c", WITHOUT_FSYNC, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(done.stdout) > 0
