"""A run that was stopped and goes on ends where the straight run ends, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from small_runs import (
    Bench,
    adapter_tensors,
    embedded_rows,
    flip_bit,
    heldout_lines,
    losses,
    republish,
    same_bits,
    write_rows,
)
from test_train import on_step

from finetune import artifact
from finetune.errors import CannotContinue, CheckFailed, InputError, Interrupted
from finetune.monitor import stop_on_signals
from finetune.recipes import RECIPES
from finetune.run_folder import locked
from finetune.train import train

# 4 steps an epoch: 10 steps end in the third.
SETTINGS = (
    *("adapter.lora_dropout=0.1", "data.packing=true", "train.max_steps=10", "train.save_steps=3"),
    *("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"),
    *("train.eval_steps=4", "train.warmup_steps=2", "train.save_total_limit=4"),
)


class Killed(BaseException):
    """Ends a run where it stands, as a kill does: nothing is saved on the way out."""


def kill(trainer):
    raise Killed


@pytest.fixture(scope="module")
def straight(tmp_path_factory, small_base):
    """The run that nobody stopped."""
    return Bench(tmp_path_factory.mktemp("straight"), small_base).train(*SETTINGS)


def stopped_at(bench, monkeypatch, step, *settings, action=kill):
    """A run that ended during a step's end."""
    build = RECIPES["sft"]
    on_step(monkeypatch, action, last_step=step)
    try:
        train(bench.load(*settings))
    except (Killed, Interrupted) as error:
        return error
    finally:
        monkeypatch.setitem(RECIPES, "sft", build)
    return None


def killed_before_publishing(bench, monkeypatch, *settings):
    """Between the last checkpoint and the adapter."""

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("finetune.stages.publish", dies)
        with pytest.raises(Killed):
            train(bench.load(*settings))


def assert_same_run(found, expected):
    """Equal to the last bit: adapter, optimizer, the loss of every step, held-out losses."""
    assert losses(found) == losses(expected)
    assert same_bits(adapter_tensors(found), adapter_tensors(expected))
    assert heldout_lines(found) == heldout_lines(expected)
    last = "checkpoints/step-000010"
    for name in ("trained.safetensors", "optimizer.safetensors"):
        assert same_bits(
            load_file(found.path / last / name), load_file(expected.path / last / name)
        )
    assert found.state() == {"state": "finished", "exit_code": 0, "reason": None}


class TestBySignal:
    @pytest.mark.parametrize(
        ("step", "number"),
        [(2, signal.SIGINT), (4, signal.SIGTERM), (7, signal.SIGUSR1), (9, signal.SIGINT)],
    )
    def test_it_stops_at_the_step_with_a_checkpoint_and_goes_on(
        self, bench, monkeypatch, straight, capfd, step, number
    ):
        def send(trainer):
            signal.raise_signal(number)

        error = stopped_at(bench, monkeypatch, step, *SETTINGS, action=send)
        run = bench.run_folder()
        assert isinstance(error, Interrupted)
        assert error.exit_code == 75
        state = run.state()
        assert (state["state"], state["exit_code"]) == ("interrupted", 75)
        assert f"stopped after step {step}" in state["reason"]
        assert (run.checkpoints / f"step-{step:06d}").is_dir()
        assert not run.adapter.exists()
        assert len(losses(run)) == step
        capfd.readouterr()
        bench.train(*SETTINGS)
        assert f"resume   from {run.checkpoints / f'step-{step:06d}'}" in capfd.readouterr().err
        # A signal leaves no time for the held-out loss that was due at its step: it is made up for.
        assert_same_run(run, straight)

    def test_one_request_that_arrives_twice_is_one(self, bench, monkeypatch):
        """A scheduler signals every process of a job, and a launcher passes its own on."""

        def send(trainer):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

        error = stopped_at(bench, monkeypatch, 2, *SETTINGS, action=send)
        assert isinstance(error, Interrupted)
        assert bench.run_folder().state()["exit_code"] == 75

    def test_a_second_request_ends_at_once(self, monkeypatch):
        ended = []
        monkeypatch.setattr(signal, "raise_signal", ended.append)
        with stop_on_signals() as flag:
            flag(signal.SIGTERM, None)
            assert ended == []
            monkeypatch.setattr("finetune.monitor.SAME_REQUEST_SECONDS", 0.0)
            flag(signal.SIGTERM, None)
        assert ended == [signal.SIGTERM]

    def test_a_signal_in_the_last_step_comes_too_late_to_stop_it(
        self, bench, monkeypatch, straight
    ):
        error = stopped_at(
            bench,
            monkeypatch,
            10,
            *SETTINGS,
            action=lambda trainer: signal.raise_signal(signal.SIGTERM),
        )
        assert error is None
        assert_same_run(bench.run_folder(), straight)

    def test_the_handlers_found_are_put_back(self, bench):
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        bench.train("train.max_steps=1")
        after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        assert before == after


class TestByKill:
    @pytest.mark.parametrize("step", [1, 5, 8])
    def test_steps_since_the_last_checkpoint_are_made_again(
        self, bench, monkeypatch, straight, step
    ):
        assert isinstance(stopped_at(bench, monkeypatch, step, *SETTINGS), Killed)
        bench.train(*SETTINGS)
        assert_same_run(bench.run_folder(), straight)

    def test_after_the_last_step_no_step_is_added(self, bench, monkeypatch, straight):
        """Killed between the last checkpoint and the adapter; the epoch has steps left."""
        killed_before_publishing(bench, monkeypatch, *SETTINGS)
        assert (bench.run_folder().checkpoints / "step-000010").is_dir()
        bench.train(*SETTINGS)
        assert_same_run(bench.run_folder(), straight)

    def test_an_adapter_that_run_json_does_not_know_of_is_replaced(
        self, bench, monkeypatch, straight
    ):
        run = bench.train(*SETTINGS)
        run.write_state(state="running", exit_code=None, reason=None)
        bench.train(*SETTINGS)
        assert_same_run(run, straight)

    def test_a_damaged_newest_checkpoint_costs_its_steps_only(
        self, bench, monkeypatch, straight, capfd
    ):
        stopped_at(bench, monkeypatch, 8, *SETTINGS)
        run = bench.run_folder()
        flip_bit(run.checkpoints / "step-000006" / "optimizer.safetensors")
        bench.train(*SETTINGS)
        said = capfd.readouterr().err
        assert "set aside as damaged-step-000006" in said
        assert f"resume   from {run.checkpoints / 'step-000003'}" in said
        assert_same_run(run, straight)

    def test_without_a_sound_checkpoint_it_does_not_begin_anew(self, bench, monkeypatch):
        stopped_at(bench, monkeypatch, 8, *SETTINGS)
        run = bench.run_folder()
        for path in run.checkpoints.glob("step-*/rng.json"):
            flip_bit(path)
        for _ in range(2):
            with pytest.raises(CheckFailed, match="no checkpoint verifies"):
                train(bench.load(*SETTINGS))
            assert (run.state()["state"], run.state()["exit_code"]) == ("failed", 3)
        assert not run.adapter.exists()

    def test_full_weights_go_on_as_well(self, bench, monkeypatch):
        settings = ("adapter={method: none}", "train.max_steps=4", "train.save_steps=2")
        straight = bench.train(*settings, "run.name=straight")
        stopped_at(bench, monkeypatch, 3, *settings)
        run = bench.train(*settings)
        weights = [load_file(r.model / "model.safetensors") for r in (run, straight)]
        assert same_bits(*weights)

    @pytest.mark.parametrize(
        "settings",
        [
            ("train.optim=sgd", "train.bf16=true", "train.lr_scheduler_type=inverse_sqrt"),
            ("train.optim=adamw_8bit", "base.quantization=nf4", "base.dtype=bfloat16"),
            ("train.optim=paged_adamw_32bit", "train.activation_checkpointing=true"),
        ],
        ids=lambda settings: settings[0],
    )
    def test_other_optimizers_and_precisions_go_on_as_well(self, bench, monkeypatch, settings):
        if "8bit" in settings[0] or "paged" in settings[0]:
            pytest.importorskip("bitsandbytes", reason="its optimizers and quantised bases")
        settings = (
            "train.max_steps=5",
            "train.save_steps=2",
            "adapter.lora_dropout=0.1",
            *settings,
        )
        straight = bench.train(*settings, "run.name=straight")
        stopped_at(bench, monkeypatch, 3, *settings)
        run = bench.train(*settings)
        assert losses(run) == losses(straight)
        assert same_bits(adapter_tensors(run), adapter_tensors(straight))


class TestWhatIsRefused:
    def test_another_config_names_every_key(self, bench, monkeypatch):
        stopped_at(bench, monkeypatch, 5, *SETTINGS)
        before = bench.run_folder().config_file.read_text()
        changed = [s for s in SETTINGS if "warmup" not in s]
        with pytest.raises(InputError) as caught:
            train(bench.load(*changed, "train.learning_rate=0.02", "adapter.r=2"))
        text = str(caught.value)
        assert "holds a run of another config" in text
        assert "train.learning_rate: the folder has 0.01, the config 0.02" in text
        assert "adapter.r: the folder has 4, the config 2" in text
        assert "train.warmup_steps: the folder has 2, the config 0" in text
        assert len(caught.value.findings) == 4
        assert bench.run_folder().config_file.read_text() == before

    def test_other_rows_under_the_same_name(self, bench, monkeypatch):
        """Going on over changed rows would train on a mixture that no config describes."""
        stopped_at(bench, monkeypatch, 5, *SETTINGS)
        write_rows(bench.train_file, embedded_rows("train", 24, start=1))
        with pytest.raises(InputError, match="train.jsonl"):
            train(bench.load(*SETTINGS))

    def test_another_base_under_the_same_name(self, bench, monkeypatch, tmp_path, small_base):
        base = tmp_path / "base"
        shutil.copytree(small_base, base)
        settings = (*SETTINGS, f"base.path={base}")
        stopped_at(bench, monkeypatch, 5, *settings)
        flip_bit(base / "model.safetensors", 0.99)
        with pytest.raises(CheckFailed, match="base"):
            train(bench.load(*settings))

    def test_never_and_a_named_checkpoint(self, bench, monkeypatch, straight):
        stopped_at(bench, monkeypatch, 8, *SETTINGS)
        with pytest.raises(InputError, match="run.resume never"):
            train(bench.load(*SETTINGS, "run.resume=never"))
        named = bench.run_folder().checkpoints / "step-000003"
        bench.train(*SETTINGS, f"run.resume={named}")
        assert_same_run(bench.run_folder(), straight)

    def test_a_checkpoint_of_another_number_of_ranks(self, bench, monkeypatch):
        stopped_at(bench, monkeypatch, 5, *SETTINGS)
        republish(bench.run_folder().checkpoints / "step-000003", num_ranks=2)
        with pytest.raises(InputError, match="written by 2 ranks, this launch has 1"):
            train(bench.load(*SETTINGS))

    @pytest.mark.parametrize("instead", ["nothing", "another folder"])
    def test_a_folder_that_is_taken_away_while_the_run_trains(
        self, bench, monkeypatch, straight, instead
    ):
        """Nothing is written in its place; put back, the run goes on."""
        run = bench.run_folder()
        away = run.path.with_name("away")

        def take(trainer):
            run.path.rename(away)
            if instead != "nothing":
                run.checkpoints.mkdir(parents=True)

        with monkeypatch.context() as patch:
            on_step(patch, take, last_step=5)
            with pytest.raises(CannotContinue, match="nothing is written there") as caught:
                train(bench.load(*SETTINGS))
        assert caught.value.exit_code == 4
        assert not run.path.exists() or not any(run.checkpoints.iterdir())
        if run.path.exists():
            shutil.rmtree(run.path)
        away.rename(run.path)
        bench.train(*SETTINGS)
        assert_same_run(run, straight)

    def test_a_checkpoint_that_was_trained_on_something_else(self, bench, monkeypatch):
        """Even where the run folder's own notes say nothing of it."""
        stopped_at(bench, monkeypatch, 5, *SETTINGS)
        folder = bench.run_folder().checkpoints / "step-000003"
        facts = artifact.verify(folder)["facts"]
        known = facts["trained_on"]
        assert facts["data_position"] == {"seed": 0, "epoch": 0, "steps_of_epoch": 3}
        assert set(known) >= {"config_sha256", "documents_sha256", "base_fingerprint"}
        for key in ("documents_sha256", "base_fingerprint", "tokenizer_sha256"):
            republish(folder, trained_on=known | {key: "0" * 64})
            with pytest.raises(CheckFailed, match=f"trained on something else: {key} differ"):
                train(bench.load(*SETTINGS))

    def test_a_checkpoint_of_other_libraries_is_gone_on_from_aloud(
        self, bench, monkeypatch, straight, capfd
    ):
        stopped_at(bench, monkeypatch, 5, *SETTINGS)
        folder = bench.run_folder().checkpoints / "step-000003"
        known = artifact.verify(folder)["facts"]["trained_on"]
        older = known["libraries"] | {"torch": "2.12.0"}
        republish(folder, trained_on=known | {"libraries": older})
        bench.train(*SETTINGS)
        assert "step-000003 was written with torch 2.12.0, now" in capfd.readouterr().err
        assert_same_run(bench.run_folder(), straight)

    def test_a_second_process_in_the_folder(self, bench):
        run = bench.run_folder()
        run.path.mkdir(parents=True)
        run.write_state(state="running", exit_code=None, reason=None)
        code = (
            "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
            "f.write('pid 12345'); f.flush(); print('locked', flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", code, str(run.path / "lock")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            assert holder.stdout.readline() == b"locked\n"
            with pytest.raises(InputError, match=r"another process \(pid 12345\) is at work"):
                train(bench.load())
            assert run.state()["state"] == "running", "the other's state is not touched"
            holder.kill()
        bench.train()

    def test_two_locks_in_one_process(self, bench):
        run = bench.run_folder()
        run.path.mkdir(parents=True)
        with locked(run), pytest.raises(InputError, match="is at work"), locked(run):
            pass
        with locked(run):
            pass
