"""Two processes on a CPU (gloo) train on the steps of one, number for number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tolerances
import torch
from safetensors.torch import load_file
from small_runs import (
    ROOT,
    Bench,
    adapter_tensors,
    embedded_rows,
    losses,
    same_bits,
    step_lines,
    worst_tensor,
    write_rows,
)

from finetune import artifact
from finetune.errors import InputError
from finetune.train import train

# 21 rows, 4 a step: the sixth step has one, so that rank 1 and three micro-batches train nothing.
SETTINGS = ("data.packing=false", "train.max_steps=8", "train.save_steps=5", "train.eval_steps=5")
RANKS = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2")
ONE = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")


LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
TWO = ("--multi_gpu", "--num_processes", "2", "finetune/train.py")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch …` from the repository's root, as the README has it."""
    return subprocess.run(
        [*LAUNCH, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch_two(bench, *overrides: str) -> subprocess.CompletedProcess[str]:
    config = str(bench.config_file)
    return launch(*TWO, config, *SETTINGS, *RANKS, *overrides)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, small_base):
    """Rows and config of both runs; a single held-out row, so that rank 1 has none."""
    bench = Bench(tmp_path_factory.mktemp("ranks"), small_base)
    write_rows(bench.train_file, embedded_rows("train", 21))
    write_rows(bench.heldout_file, embedded_rows("heldout", 1))
    return bench


@pytest.fixture(scope="module")
def two(bench):
    """The run of two ranks."""
    done = launch_two(bench, "run.name=two")
    assert done.returncode == 0, done.stderr
    return bench.run_folder("run.name=two")


@pytest.fixture(scope="module")
def one(bench):
    """The run of one rank on the same global batch."""
    return bench.train(*SETTINGS, *ONE, "run.name=one")


def test_the_loss_of_every_step_is_that_of_one_process(one, two):
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for ours, theirs in zip(step_lines(two), step_lines(one), strict=True):
        assert ours["tokens_trained"] == theirs["tokens_trained"]
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_heldout_losses_are_those_of_one_process(one, two):
    def held(run):
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        return {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}

    assert list(held(two)) == [0, 5, 8]
    assert held(two)[0] == pytest.approx(held(one)[0], rel=tolerances.HELDOUT_PADDED)
    assert held(two) == pytest.approx(held(one), rel=1e-5)


def test_the_adapters_agree(one, two):
    ours, theirs = adapter_tensors(two), adapter_tensors(one)
    assert min(float(t.abs().max()) for t in theirs.values()) > 1e-3, "it was trained"
    assert worst_tensor(theirs, ours) < tolerances.TWO_RANKS_ADAPTER


def test_one_rank_wrote_and_nothing_is_left_over(two):
    names = {path.name for path in two.path.iterdir()}
    assert not [name for name in names if ".tmp-" in name]
    assert two.state() == {"state": "finished", "exit_code": 0, "reason": None}
    checkpoints = sorted(two.checkpoints.glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-000005", "step-000008"]
    for path in [*checkpoints, two.adapter]:
        facts = artifact.verify(path)["facts"]
        assert facts.get("num_ranks", 2) == 2
    states = json.loads((checkpoints[0] / "rng.json").read_text())
    assert len(states) == 2


def test_going_on_with_two_ranks_ends_bit_for_bit_where_two_ranks_end(bench, two):
    """As if killed after step 5; a newer checkpoint is damaged, which both must not fall over."""
    run = bench.run_folder("run.name=again")
    shutil.copytree(two.path, run.path)
    config = run.config_file.read_text().replace("name: two", "name: again")
    run.config_file.write_text(config)
    shutil.rmtree(run.adapter)
    (run.checkpoints / "step-000008" / "trained.safetensors").write_bytes(b"torn")
    run.write_state(state="running", exit_code=None, reason=None)
    done = launch_two(bench, "run.name=again")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("set aside as damaged-step-000008") == 1
    assert f"resume   from {run.checkpoints / 'step-000005'}" in done.stderr
    assert same_bits(adapter_tensors(run), adapter_tensors(two))
    assert losses(run) == losses(two)
    last = "checkpoints/step-000008/optimizer.safetensors"
    assert same_bits(load_file(run.path / last), load_file(two.path / last))


def test_one_rank_does_not_go_on_for_two(bench, two):
    run = bench.run_folder("run.name=fewer")
    shutil.copytree(two.path, run.path)
    config = run.config_file.read_text().replace("name: two", "name: fewer")
    run.config_file.write_text(config)
    run.write_state(state="running", exit_code=None, reason=None)
    with pytest.raises(InputError, match="written by 2 ranks, this launch has 1"):
        train(bench.load(*SETTINGS, *RANKS, "run.name=fewer"))
    assert run.state()["exit_code"] == 2


def rank_of(pid: str) -> str | None:
    """The RANK a training process was started with."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [v.removeprefix(b"RANK=").decode() for v in variables if v.startswith(b"RANK=")]
    return ranks[0] if ranks and b"finetune/train.py" in words else None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(bench):
    run = bench.run_folder("run.name=signalled")
    settings = [s for s in SETTINGS if "max_steps" not in s and "save" not in s]
    overrides = (*settings, *RANKS, "train.max_steps=5000", "train.save_steps=5000")
    command = [*LAUNCH, *TWO, str(bench.config_file), *overrides, "run.name=signalled"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher:
        while not (run.metrics.exists() and run.metrics.read_text().count("\n") >= 3):
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {rank_of(pid): int(pid) for pid in children}
        os.kill(ranks["1"], signal.SIGTERM)
        _, said = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    state = run.state()
    assert (state["state"], state["exit_code"]) == ("interrupted", 75), said
    stopped = len(losses(run))
    assert [path.name for path in run.checkpoints.glob("step-*")] == [f"step-{stopped:06d}"]
    assert artifact.findings_of(run.checkpoints / f"step-{stopped:06d}") == []


# A launch in which one rank is disturbed at a moment of its own: (rank, what is wrapped, at which
# call of it, what happens).
DISTURBED = """\
import errno, itertools, os, signal, sys, time
sys.path.insert(0, {root!r})
from finetune import artifact, checkpoint, trainer
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def wait():
    time.sleep(15)
def fill_the_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
rank, owner, name, at, happens = {fault}
right, calls = getattr(owner, name), itertools.count(1)
def wrapped(*args, **settings):
    if next(calls) == at:
        happens()
    return right(*args, **settings)
if os.environ["RANK"] == rank:
    setattr(owner, name, wrapped)
from finetune.train import main
main(sys.argv[1:])
"""
FAULTS = {
    "the second is killed in step 7": '("1", trainer.OurSeams, "compute_loss", 13, kill)',
    "the first is killed in its second save": '("0", checkpoint, "save_rng", 2, kill)',
    "the first one's disk is full": '("0", checkpoint, "save_rng", 2, fill_the_disk)',
}


def launch_disturbed(bench, tmp_path, fault):
    """The run, its name and how it ended; the time limit is `launch`'s."""
    program = tmp_path / "disturbed.py"
    program.write_text(DISTURBED.format(root=str(ROOT), fault=fault))
    name = f"run.name={tmp_path.name}"
    settings = (str(bench.config_file), *SETTINGS, *RANKS, name)
    return bench.run_folder(name), name, launch(*TWO[:-1], str(program), *settings)


@pytest.mark.slow
def test_a_rank_that_is_only_slow_changes_nothing(bench, two, tmp_path):
    fault = '("1", trainer.OurSeams, "compute_loss", 5, wait)'
    run, _, done = launch_disturbed(bench, tmp_path, fault)
    assert done.returncode == 0, done.stderr
    assert max(line["seconds"] for line in step_lines(run)) > 15, "it was waited for"
    assert same_bits(adapter_tensors(run), adapter_tensors(two))
    assert losses(run) == losses(two)


@pytest.mark.parametrize(
    "fault", [name if n == 0 else pytest.param(name, marks=pytest.mark.slow)
              for n, name in enumerate(FAULTS)]
)  # fmt: skip
def test_what_ends_one_rank_ends_both_and_loses_nothing(bench, two, tmp_path, fault):
    """No hang, no exit code 0; the same command then ends where the undisturbed run does."""
    run, name, done = launch_disturbed(bench, tmp_path, FAULTS[fault])
    assert done.returncode != 0
    assert not run.is_finished
    if "disk" in fault:
        assert "No space left on device; nothing published" in done.stderr
        assert run.state()["exit_code"] == 4
    sound = [p.name for p in run.checkpoints.glob("step-*") if not artifact.findings_of(p)]
    assert sound == ["step-000005"]
    done = launch_two(bench, name)
    assert done.returncode == 0, done.stderr
    assert same_bits(adapter_tensors(run), adapter_tensors(two))
    assert losses(run) == losses(two)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the launcher starts both")
def test_a_launcher_that_starts_one_of_two_is_stopped(bench, one):
    """`--cpu --num_processes 2` starts a single process and says nothing (accelerate 1.15)."""
    shutil.copytree(one.path, bench.run_folder("run.name=lone").path)
    before = (bench.run_folder("run.name=lone").path / "run.json").read_bytes()
    arguments = ("--cpu", "--num_processes", "2", "finetune/train.py", str(bench.config_file))
    done = launch(*arguments, *SETTINGS, *ONE, "run.name=lone")
    assert done.returncode != 0
    assert "error: accelerate launch was asked for 2 processes and started 1" in done.stderr
    assert "--multi_gpu" in done.stderr
    assert "non-zero exit status 2" in done.stderr, "the child's own code"
    assert (bench.run_folder("run.name=lone").path / "run.json").read_bytes() == before
