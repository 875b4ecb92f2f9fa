"""What trackers are told, where they keep it, and that one that is missing ends no run late."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3

import pytest
from small_runs import Bench, heldout_lines, step_lines

from finetune import trackers
from finetune.errors import InputError
from finetune.train import train


def test_a_missing_package_is_said_before_anything_is_loaded(bench, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(InputError, match=r"pip install plumbtune\[wandb\]") as caught:
        train(bench.load("train.report_to=wandb"))
    assert caught.value.exit_code == 2
    assert not bench.run_folder().path.exists()


def test_without_a_tracker_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    trackers.refuse_missing("none")


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "leftovers").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("leftovers") is not None
    assert not trackers._is_installed("leftovers")
    assert trackers._is_installed("json")


def test_each_stays_in_the_run_folder_and_sends_nothing(tmp_path, monkeypatch):
    names = {name for values in trackers._LOCAL.values() for name in values}
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names})
    for tracker in ("tensorboard", "wandb", "mlflow", "trackio"):
        trackers.keep_local(tracker, tmp_path / "run")
    assert set(os.environ) >= names
    assert os.environ["WANDB_MODE"] == "offline"
    folder = str(tmp_path / "run")
    places = ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "MLFLOW_TRACKING_URI", "TRACKIO_DIR")
    assert all(folder in os.environ[name] for name in places)


def test_what_a_person_has_set_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    for name in set(trackers._LOCAL["wandb"]) - {"WANDB_MODE", "WANDB_DIR"}:
        monkeypatch.setenv(name, "as it is")
    trackers.keep_local("wandb", tmp_path)
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_DIR"]) == ("online", "elsewhere")


SETTINGS = ("train.max_steps=6", "train.logging_steps=2", "train.eval_steps=3")


def from_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            yield name, event.step, event.value


def from_mlflow(run):
    rows = sqlite3.connect(run / "mlflow.db").execute("select key, step, value from metrics")
    for key, step, value in rows:
        yield key.replace("eval_", "eval/") if "eval_" in key else f"train/{key}", step, value


def from_trackio(run):
    (file,) = (run / "trackio").glob("*.db")
    for (line,) in sqlite3.connect(file).execute("select metrics from metrics"):
        values = json.loads(line)
        for name, value in values.items():
            yield name, values["train/global_step"], value


READERS = {"tensorboard": from_tensorboard, "mlflow": from_mlflow, "trackio": from_trackio}


@pytest.fixture(scope="module", params=READERS)
def told(request, tmp_path_factory, small_base):
    """A run with a tracker, and what lies in its folder: {name: {step: value}}."""
    tracker = request.param
    if not trackers._is_installed(tracker):  # an import would fix the places it writes to
        pytest.skip(f"the extra {tracker} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name in trackers._LOCAL[tracker]:
            patch.delenv(name, raising=False)
        bench = Bench(tmp_path_factory.mktemp(tracker), small_base)
        run = bench.train(*SETTINGS, f"train.report_to={tracker}", "data.packing=false")
        for name in trackers._LOCAL[tracker]:
            os.environ.pop(name)
    scalars: dict[str, dict[int, float]] = {}
    for name, step, value in READERS[tracker](run.path):
        scalars.setdefault(name, {})[step] = value
    return run, scalars


def test_the_training_loss_is_ours_over_the_tokens_of_the_steps_since(told):
    run, scalars = told
    lines = step_lines(run)
    for step in (2, 4, 6):
        since = lines[step - 2 : step]
        total = sum(line["loss"] * line["tokens_trained"] for line in since)
        tokens = sum(line["tokens_trained"] for line in since)
        assert scalars["train/loss"][step] == pytest.approx(total / tokens, rel=1e-6)
        mean = sum(line["loss"] for line in since) / len(since)
        assert abs(mean - total / tokens) > 1e-4, "a mean of means would be another number"
    assert sorted(scalars["train/loss"]) == [2, 4, 6]


def test_held_out_losses_and_rates_are_those_of_metrics_jsonl(told):
    run, scalars = told
    held = {step: pytest.approx(loss, rel=1e-6) for step, loss in heldout_lines(run)}
    assert scalars["eval/loss"] == held
    assert list(held) == [0, 3, 6]
    rates = {line["step"]: line["learning_rate"] for line in step_lines(run)}
    for step, rate in scalars["train/learning_rate"].items():
        assert rate == pytest.approx(rates[step], rel=1e-6)


def test_the_run_is_that_without_a_tracker(told, tmp_path, small_base):
    run, _ = told
    plain = Bench(tmp_path, small_base).train(*SETTINGS, "data.packing=false")
    assert [line["loss"] for line in step_lines(plain)] == [x["loss"] for x in step_lines(run)]
