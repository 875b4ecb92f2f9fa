"""A disk with room and no inodes left: the last checkpoint stays, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from small_runs import Bench, adapter_tensors, losses, same_bits

from finetune import artifact
from finetune.__main__ import main

SETTINGS = ("train.max_steps=4", "train.save_steps=1", "data.packing=false")


@pytest.fixture
def disk(tmp_path):
    """`disk(40)`: a file system of so many files at `tmp_path / "disk"`, or that one with more."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root mounts a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(inodes: int):
        options = f"nr_inodes={inodes},size=256m"
        if os.path.ismount(folder):
            options = f"remount,{options}"
        command = ["mount", "-t", "tmpfs", "-o", options, "small", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mount is not allowed here")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, small_base):
    """The run that nothing disturbs."""
    return Bench(tmp_path_factory.mktemp("straight"), small_base).train(*SETTINGS)


def test_out_of_inodes(bench, straight, disk, capsys):
    """From too few for the first file to enough for all: each ends well or with 4."""
    stopped_at = set()
    for inodes in range(4, 60, 5):
        runs = f"run.dir={disk(inodes)}"
        run, command = bench.run_folder(runs), ["train", str(bench.config_file), *SETTINGS, runs]
        code = main(command)
        assert code in (0, 4)
        assert ("No space left on device" in capsys.readouterr().err) == (code == 4)
        published = [*run.checkpoints.glob("step-*")]
        assert [p for p in published if artifact.findings_of(p)] == [], "none is half there"
        stopped_at.add(len(published))
        disk(1000)
        assert main(command) == 0
        assert same_bits(adapter_tensors(run), adapter_tensors(straight))
        assert losses(run) == losses(straight)
        shutil.rmtree(run.path)
    assert {0, 1, 2} <= stopped_at
