"""Room on the disk: what a run will write, against what there is, before the first step."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from small_runs import losses
from test_resume import stopped_at

from finetune import checkpoint
from finetune.config import TrainSection
from finetune.errors import CannotContinue
from finetune.train import train


@pytest.fixture
def free(monkeypatch):
    def make(size: int) -> None:
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    return make


def test_a_disk_too_small_is_said_before_the_first_step(bench, free):
    free(10_000_000)
    with pytest.raises(CannotContinue, match="10,000,000 bytes are free; 2 more checkpoints of"):
        train(bench.load("train.max_steps=3"))
    run = bench.run_folder()
    assert run.state()["exit_code"] == 4
    assert not run.metrics.exists() or not losses(run)


def test_no_more_checkpoints_are_asked_for_than_the_run_makes(bench, free):
    """A limit far above them is no reason to refuse a disk that has room."""
    free(100_000_000)
    run = bench.train("train.max_steps=3", "train.save_total_limit=500")
    assert len(checkpoint.list_checkpoints(run.checkpoints)) == 1


@pytest.mark.parametrize(
    ("settings", "steps", "saves"),
    [
        ({"save_steps": 2}, 0, 1),
        ({"save_steps": 2}, 4, 3),
        ({"save_steps": 2}, 5, 4),
        ({"save_steps": 2, "load_best_model_at_end": True}, 5, 5),
        ({"save_steps": 2, "load_best_model_at_end": True, "eval_steps": 2}, 5, 7),
        ({"save_steps": 2, "eval_steps": 2}, 5, 4),
    ],
)
def test_what_so_many_steps_write(settings, steps, saves):
    """Those that are due, one where it is stopped, one for each evaluation that may be the best."""
    assert TrainSection(**settings).most_saves(steps) == saves


def test_a_limit_holds_the_best_and_the_one_being_written_besides():
    few = TrainSection(save_total_limit=3)
    best = TrainSection(save_total_limit=3, load_best_model_at_end=True)
    assert [few.checkpoints_at_once(n) for n in (None, 2, 9)] == [4, 2, 4]
    assert [best.checkpoints_at_once(n) for n in (None, 4, 9)] == [5, 4, 5]


@pytest.fixture
def most(monkeypatch):
    """The most checkpoints that were there at once."""
    counts, real = [0], checkpoint.prune

    def counting(checkpoints, *args):
        counts.append(len(checkpoint.list_checkpoints(checkpoints)))
        real(checkpoints, *args)

    monkeypatch.setattr(checkpoint, "prune", counting)
    return counts


def test_an_early_best_lies_beside_the_newest(bench, most):
    rises = ("learning_rate=0.3", "lr_scheduler_type=constant", "max_grad_norm=0")
    saves = ("max_steps=6", "save_steps=1", "eval_steps=1", "load_best_model_at_end=true")
    overrides = [f"train.{setting}" for setting in (*rises, *saves)]
    bench.train(*overrides)
    assert max(most) == 4
    assert max(most) == bench.load(*overrides).config.train.checkpoints_at_once(None)


def test_a_run_that_was_stopped_writes_one_more(bench, monkeypatch, most):
    settings = [f"train.{s}" for s in ("max_steps=5", "save_steps=2", "save_total_limit=50")]
    stopped_at(bench, monkeypatch, 3, *settings, action=lambda _: signal.raise_signal(2))
    run = bench.train(*settings)
    kept = checkpoint.list_checkpoints(run.checkpoints)
    assert [checkpoint.step_of(folder) for folder in kept] == [2, 3, 4, 5]
    assert max(most) == bench.load(*settings).config.train.most_saves(5)


def test_a_run_that_goes_on_needs_room_for_what_is_to_come(bench, monkeypatch):
    settings = ["train.max_steps=5", "train.save_steps=1"]
    stopped_at(bench, monkeypatch, 3, *settings, action=lambda _: signal.raise_signal(2))
    asked, real = [], checkpoint.refuse_small_disk

    def noting(model, section, num_steps, folder):
        asked.append(num_steps)
        real(model, section, num_steps, folder)

    monkeypatch.setattr(checkpoint, "refuse_small_disk", noting)
    bench.train(*settings)
    assert asked == [2]


@pytest.mark.parametrize("stops", [0, 2, 4, 30])
def test_checkpoints_of_earlier_stops_take_no_room_from_those_to_come(tmp_path, free, stops):
    """600 steps to come write two that are due and one more, whatever lies there already."""
    model, section = torch.nn.Linear(1000, 1000), TrainSection(save_steps=500, save_total_limit=20)
    for step in range(stops):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    one = 3 * 4 * 1001 * 1000 + (16 << 20)
    count = 1 if stops == 30 else 3  # of thirty, the oldest make room
    free(count * one + 4 * 1001 * 1000 - 1)
    with pytest.raises(CannotContinue, match=f" {count} more checkpoints of {one:,} bytes"):
        checkpoint.refuse_small_disk(model, section, 600, tmp_path)
    free(count * one + 4 * 1001 * 1000)
    checkpoint.refuse_small_disk(model, section, 600, tmp_path)


@pytest.mark.parametrize(("name", "step"), [("step-000120", 120), ("best", 0), ("step-12", 0)])
def test_the_step_of_a_folder(tmp_path, name, step):
    assert checkpoint.step_of(tmp_path / name) == step
