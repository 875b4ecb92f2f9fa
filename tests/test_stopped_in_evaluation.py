"""A run that is signalled, killed or failed while held-out rows are scored, or by a callback."""

from __future__ import annotations

import signal

import pytest
import torch
from small_runs import Bench
from test_resume import Killed, assert_same_run
from test_train import on_step

from finetune import evaluation
from finetune.__main__ import main
from finetune.errors import Interrupted
from finetune.recipes import RECIPES
from finetune.train import train

SETTINGS = (
    *("adapter.lora_dropout=0.1", "train.max_steps=10", "train.save_steps=3", "train.eval_steps=2"),
    *("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, small_base):
    """The run that nobody stopped."""
    return Bench(tmp_path_factory.mktemp("straight"), small_base).train(*SETTINGS)


def in_scoring(monkeypatch, number, action):
    """Acts in the `number`-th scoring of the held-out rows, counted from 0: before step 1."""
    right, calls = evaluation.score_rows, []

    def scored(*args, **settings):
        calls.append(None)
        if len(calls) == number + 1:
            action()
        return right(*args, **settings)

    monkeypatch.setattr(evaluation, "score_rows", scored)


@pytest.mark.parametrize(("name", "scoring"), [("SIGTERM", 0), ("SIGUSR1", 2), ("SIGINT", 5)])
def test_a_signal_there_stops_at_the_next_step(bench, monkeypatch, straight, name, scoring):
    with monkeypatch.context() as patch:
        in_scoring(patch, scoring, lambda: signal.raise_signal(getattr(signal, name)))
        if scoring < 5:
            with pytest.raises(Interrupted, match="stopped after step"):
                train(bench.load(*SETTINGS))
            assert bench.run_folder().state()["exit_code"] == 75
        else:  # after the last step there is nothing left to stop
            train(bench.load(*SETTINGS))
    bench.train(*SETTINGS)
    assert_same_run(bench.run_folder(), straight)


@pytest.mark.parametrize("scoring", [0, 3])
def test_a_kill_there_loses_nothing_that_was_saved(bench, monkeypatch, straight, scoring):
    def dies():
        raise Killed

    with monkeypatch.context() as patch:
        in_scoring(patch, scoring, dies)
        with pytest.raises(Killed):
            train(bench.load(*SETTINGS))
    bench.train(*SETTINGS)
    assert_same_run(bench.run_folder(), straight)


def test_an_error_of_a_callback_ends_the_run_and_the_last_checkpoint_holds(
    bench, monkeypatch, straight, capsys
):
    def fails(trainer):
        raise ZeroDivisionError("in a callback")

    build = RECIPES["sft"]
    on_step(monkeypatch, fails, last_step=5)
    assert main(["train", str(bench.config_file), *SETTINGS]) == 1
    assert "ZeroDivisionError: in a callback" in capsys.readouterr().err
    state = bench.run_folder().state()
    assert (state["state"], state["exit_code"]) == ("failed", 1)
    monkeypatch.setitem(RECIPES, "sft", build)
    bench.train(*SETTINGS)
    assert "from " + str(bench.run_folder().checkpoints / "step-000003") in capsys.readouterr().err
    assert_same_run(bench.run_folder(), straight)


def test_another_number_of_threads_is_warned_of(bench, monkeypatch, capsys):
    def dies():
        raise Killed

    with monkeypatch.context() as patch:
        in_scoring(patch, 3, dies)
        with pytest.raises(Killed):
            train(bench.load(*SETTINGS))
    before = torch.get_num_threads()
    monkeypatch.setattr("finetune.train._use_all_cores", lambda: torch.set_num_threads(before + 1))
    try:
        bench.train(*SETTINGS)
    finally:
        torch.set_num_threads(before)
    assert f"threads {before}, now {before + 1}" in capsys.readouterr().err
