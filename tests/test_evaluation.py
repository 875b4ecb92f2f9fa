"""Evaluation that acts, on a run that overfits: four rows, a high rate, best before the end."""

from __future__ import annotations

import shutil
import signal

import pytest
import yaml
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
    trainer_of,
    write_rows,
)
from test_resume import SETTINGS, Killed, killed_before_publishing, stopped_at
from test_train import on_step

from finetune import artifact, checkpoint
from finetune.errors import CheckFailed, InputError, Interrupted
from finetune.heldout import score
from finetune.inference import open_variant
from finetune.train import train
from finetune.trainer import OurSeams

FEW = 4
ROWS = (
    *("train.max_steps=24", "train.learning_rate=0.02", "train.lr_scheduler_type=constant"),
    *("train.per_device_train_batch_size=1", "train.eval_steps=2"),
)
BEST = (*ROWS, "train.load_best_model_at_end=true")
STOP = (*BEST, "train.early_stopping_patience=3")


def overfitting(bench):
    write_rows(bench.train_file, embedded_rows("train", FEW))
    return bench


@pytest.fixture
def few(bench):
    """A bench whose runs overfit."""
    return overfitting(bench)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, small_base):
    """The run that stops early, and that nobody disturbed."""
    return overfitting(Bench(tmp_path_factory.mktemp("stopped"), small_base)).train(*STOP)


def over(settings, *others):
    """Settings, each of them once: the later counts."""
    return [
        f"{key}={value}"
        for key, value in dict(s.split("=", 1) for s in (*settings, *others)).items()
    ]


def best_of(run):
    """(step, loss) by the file: of all held-out losses after step 1 the lowest, the earliest."""
    held = [(step, loss) for step, loss in heldout_lines(run) if step]
    return min(held, key=lambda line: (line[1], line[0]))


def steps_kept(run):
    return [int(path.name[5:]) for path in checkpoint.list_checkpoints(run.checkpoints)]


def facts_of(run):
    return artifact.verify(run.adapter)["facts"]


def assert_published(run, step):
    """The adapter is that checkpoint's, tensor by tensor."""
    saved = load_file(run.checkpoints / f"step-{step:06d}" / "trained.safetensors")
    assert same_bits(
        {name.replace(".default.", "."): tensor for name, tensor in saved.items()},
        adapter_tensors(run),
    )


def assert_same_end(found, expected):
    assert losses(found) == losses(expected)
    assert heldout_lines(found) == heldout_lines(expected)
    assert same_bits(adapter_tensors(found), adapter_tensors(expected))
    assert found.state() == expected.state()
    assert [facts_of(r)["step"] for r in (found, expected)] == [8, 8]
    for step in (8, 14):
        one, other = (r.checkpoints / f"step-{step:06d}" for r in (found, expected))
        for name in ("trained.safetensors", "optimizer.safetensors"):
            assert same_bits(load_file(one / name), load_file(other / name))
        for name in (checkpoint.BEST, "rng.json"):
            assert (one / name).read_text() == (other / name).read_text()


class TestTheBest:
    def test_it_stops_after_three_evaluations_without_improvement(self, stopped):
        assert best_of(stopped)[0] == 8
        assert [step for step, _ in heldout_lines(stopped)] == [0, 2, 4, 6, 8, 10, 12, 14]
        assert len(losses(stopped)) == 14
        state = stopped.state()
        assert (state["state"], state["exit_code"]) == ("finished", 0)
        assert state["reason"].startswith("stopped early after step 14: 3 evaluations without")

    def test_the_best_is_published_and_not_the_last(self, stopped):
        step, loss = best_of(stopped)
        assert_published(stopped, step)
        assert (facts_of(stopped)["step"], facts_of(stopped)["heldout_loss"]) == (step, loss)
        last = load_file(stopped.checkpoints / "step-000014" / "trained.safetensors")
        best = load_file(stopped.checkpoints / "step-000008" / "trained.safetensors")
        assert not same_bits(last, best)

    def test_the_published_folder_has_the_recorded_loss(self, stopped, few):
        opened = open_variant(stopped, "adapter")
        documents = trainer_of(few.load(*ROWS)).ours.heldout
        assert score(opened.model, documents, 8, opened.device).loss == best_of(stopped)[1]

    def test_it_outlives_newer_checkpoints(self, few, stopped, capfd):
        run = few.train(*BEST, "train.save_steps=2")
        assert len(losses(run)) == 24
        assert steps_kept(run) == [8, 22, 24], "the two newest, and the best"
        assert same_bits(adapter_tensors(run), adapter_tensors(stopped))
        assert facts_of(run)["step"] == 8
        said = capfd.readouterr().err
        assert f"best     step 8: held-out loss {best_of(run)[1]:.4f} (step 24: " in said
        assert "the best so far" in said
        assert run.state()["reason"] is None

    def test_without_it_the_last_is_published_aloud(self, few, capfd):
        run = few.train(*ROWS, "train.early_stopping_patience=3")
        assert "the last weights are published, not the best" in capfd.readouterr().err
        assert_published(run, 14)
        assert facts_of(run)["step"] == 14
        assert facts_of(run)["heldout_loss"] == heldout_lines(run)[-1][1]

    def test_a_threshold_asks_for_more(self, few):
        """From 8.00 at step 2 to 7.66 at step 8 is a fall by less than 0.5."""
        few.train(*STOP, "train.early_stopping_threshold=0.5")
        run = few.run_folder()
        assert [step for step, _ in heldout_lines(run)][-1] == 8
        assert facts_of(run)["step"] == 8, "the lowest, were it by less"

    def test_where_training_makes_it_worse_it_is_said_and_recorded(self, few, capfd):
        run = few.train(*over(BEST, "train.learning_rate=0.3", "train.max_steps=4"))
        before, after = heldout_lines(run)[0][1], best_of(run)[1]
        assert after > before
        reason = run.state()["reason"]
        assert f"no better: {before:.4f} before step 1, {after:.4f} of step" in reason
        assert f"note     {reason}" in capfd.readouterr().err
        assert_published(run, best_of(run)[0])

    def test_a_finished_run_stays_finished(self, stopped, small_base, capfd):
        bench = Bench(stopped.path.parents[1], small_base)
        overfitting(bench)
        before = {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()}
        assert train(bench.load(*STOP)) == 0
        assert "is finished; nothing to do" in capfd.readouterr().err
        assert {p: p.read_bytes() for p in stopped.path.rglob("*") if p.is_file()} == before

    def test_ranks_that_fell_later_are_put_back(self, few, monkeypatch):
        """AdaLoRA's scores and ranks are no parameters, and come with the checkpoint."""

        def spoil(trainer):
            for parameter in checkpoint.trained_parameters(trainer.model).values():
                parameter.data *= 4

        values = yaml.safe_load(few.config_file.read_text())
        values["adapter"] = {"method": "adalora", "init_r": 6, "target_r": 2, "tfinal": 1}
        few.config_file.write_text(yaml.safe_dump(values))
        on_step(monkeypatch, spoil, last_step=9)
        run = few.train(*over(BEST, "train.max_steps=12"))
        assert facts_of(run)["step"] == best_of(run)[0] == 8
        opened = open_variant(run, "adapter")
        documents = trainer_of(few.load(*ROWS, "run.name=other")).ours.heldout
        found = score(opened.model, documents, 8, opened.device).loss
        assert found == pytest.approx(best_of(run)[1], abs=1e-5)


class TestAtTheStart:
    def test_it_changes_no_bit_of_the_run(self, bench):
        with_it = bench.train(*SETTINGS)
        without = bench.train(*SETTINGS, "train.eval_on_start=false", "run.name=without")
        assert losses(with_it) == losses(without)
        assert same_bits(adapter_tensors(with_it), adapter_tensors(without))
        assert heldout_lines(with_it)[1:] == heldout_lines(without)
        assert heldout_lines(with_it)[0][0] == 0
        last = [r.checkpoints / "step-000010" for r in (with_it, without)]
        assert len({(path / "rng.json").read_text() for path in last}) == 1
        moments = [load_file(path / "optimizer.safetensors") for path in last]
        assert same_bits(*moments)

    def test_it_is_the_bases_own_loss_without_eval_steps_too(self, bench, capfd):
        run = bench.train("train.max_steps=2")
        assert [step for step, _ in heldout_lines(run)] == [0, 2]
        assert (
            f"heldout  step 0: {heldout_lines(run)[0][1]:.4f} nats a token (before training)"
            in capfd.readouterr().err
        )
        opened = open_variant(run, "base")
        documents = trainer_of(bench.load("run.name=other")).ours.heldout
        assert score(opened.model, documents, 8, opened.device).loss == pytest.approx(
            heldout_lines(run)[0][1], abs=1e-6
        )

    def test_it_is_the_first_thing_to_run_out_of_memory(self, bench, monkeypatch):
        def too_much(*_):
            raise MemoryError

        monkeypatch.setattr("finetune.evaluation.score_rows", too_much)
        with pytest.raises(MemoryError):
            train(bench.load())
        assert losses(bench.run_folder()) == []
        assert bench.run_folder().state()["exit_code"] == 4

    def test_a_run_that_goes_on_does_not_repeat_it(self, bench, monkeypatch, capfd):
        stopped_at(bench, monkeypatch, 5, *SETTINGS)
        capfd.readouterr()
        run = bench.train(*SETTINGS)
        assert "before training" not in capfd.readouterr().err
        assert [step for step, _ in heldout_lines(run)] == [0, 4, 8, 10]


class TestKilled:
    @pytest.mark.parametrize("step", [8, 14])
    def test_between_the_evaluation_and_its_save(self, few, monkeypatch, stopped, step):
        save = OurSeams._save_checkpoint

        def dies(self, model, trial):
            if self.state.global_step == step:
                raise Killed
            save(self, model, trial)

        with monkeypatch.context() as patch:
            patch.setattr(OurSeams, "_save_checkpoint", dies)
            with pytest.raises(Killed):
                train(few.load(*STOP))
        run = few.run_folder()
        assert heldout_lines(run)[-1][0] == step
        assert max(steps_kept(run)) < step
        few.train(*STOP)
        assert_same_end(run, stopped)

    def test_in_a_step_after_the_best(self, few, monkeypatch, stopped):
        settings = (*STOP, "train.save_steps=5")
        assert isinstance(stopped_at(few, monkeypatch, 12, *settings), Killed)
        assert steps_kept(few.run_folder()) == [8, 10]
        few.train(*settings)
        assert_same_end(few.run_folder(), stopped)

    def test_after_the_stop_no_step_is_added(self, few, monkeypatch, stopped):
        killed_before_publishing(few, monkeypatch, *STOP)
        few.train(*STOP)
        assert_same_end(few.run_folder(), stopped)

    @pytest.mark.parametrize("step", [8, 14])
    def test_an_evaluation_a_signal_left_no_time_for_is_made_up_for(
        self, few, monkeypatch, stopped, step
    ):
        def send(trainer):
            signal.raise_signal(signal.SIGTERM)

        error = stopped_at(few, monkeypatch, step, *STOP, action=send)
        assert isinstance(error, Interrupted)
        run = few.run_folder()
        assert heldout_lines(run)[-1][0] == step - 2
        few.train(*STOP)
        assert losses(run) == losses(stopped)
        assert heldout_lines(run) == heldout_lines(stopped)
        assert same_bits(adapter_tensors(run), adapter_tensors(stopped))
        assert run.state() == stopped.state()

    def test_a_checkpoint_from_before_there_was_a_best(self, few, monkeypatch, stopped):
        """It goes on; with the settings on, the best is looked for from there."""
        stopped_at(few, monkeypatch, 5, *ROWS, "train.save_steps=3")
        folder = few.run_folder().checkpoints / "step-000003"
        (folder / checkpoint.BEST).unlink()
        republish(folder)
        shutil.copytree(few.run_folder().path, few.run_folder("run.name=on").path)
        run = few.train(*ROWS, "train.save_steps=3")
        assert losses(run)[:14] == losses(stopped)
        assert heldout_lines(run)[:8] == heldout_lines(stopped)
        on = few.run_folder("run.name=on")
        on.config_file.write_text(on.config_file.read_text().replace("name: small", "name: on"))
        settings = (*STOP, "train.save_steps=3", "run.name=on")
        keys = ["train.load_best_model_at_end", "train.early_stopping_patience"]
        assert train(few.load(*settings), keys) == 0
        assert same_bits(adapter_tensors(on), adapter_tensors(stopped))


class TestDamage:
    def test_a_damaged_best_is_not_published_and_the_last_may_be(self, few, monkeypatch):
        run = few.run_folder()

        def damage(trainer):
            flip_bit(run.checkpoints / "step-000008" / "trained.safetensors")

        with monkeypatch.context() as patch:
            on_step(patch, damage, last_step=13)
            with pytest.raises(CheckFailed, match="step-000008.*its content differs"):
                train(few.load(*STOP))
        assert not run.adapter.exists()
        assert run.state()["exit_code"] == 3
        with pytest.raises(CheckFailed, match=r"step-000008.*The last checkpoint stays") as caught:
            train(few.load(*STOP))
        assert "train.load_best_model_at_end=false" in str(caught.value)
        off = few.load(*over(STOP, "train.load_best_model_at_end=false"))
        assert train(off, ["train.load_best_model_at_end"]) == 0
        assert_published(run, 14)
        assert run.state()["reason"].startswith("stopped early after step 14")

    def test_weights_that_score_otherwise_are_not_published(self, few, monkeypatch):
        load = checkpoint.load_weights

        def half(model, folder):
            load(model, folder)
            next(iter(checkpoint.trained_parameters(model).values())).data.zero_()

        monkeypatch.setattr(checkpoint, "load_weights", half)
        with pytest.raises(CheckFailed, match="its held-out loss is .* now and was"):
            train(few.load(*STOP))
        assert not few.run_folder().adapter.exists()


class TestDrift:
    def test_where_evaluation_acts_its_steps_decide(self, few, monkeypatch):
        stopped_at(few, monkeypatch, 5, *STOP)
        with pytest.raises(InputError, match="train.eval_steps: the folder has 2, the config 3"):
            train(few.load(*over(STOP, "train.eval_steps=3")))
        with pytest.raises(InputError, match="train.early_stopping_patience"):
            train(few.load(*over(STOP, "train.early_stopping_patience=9")))

    def test_more_patience_lets_a_stopped_run_go_on(self, few, monkeypatch):
        """Killed after its stop and before it was published."""
        killed_before_publishing(few, monkeypatch, *STOP)
        more = few.load(*over(STOP, "train.early_stopping_patience=4"))
        assert train(more, ["train.early_stopping_patience"]) == 0
        assert len(losses(few.run_folder())) == 16


def test_the_hooks_are_the_engines_own():
    """Each would be silently idle if the library renamed its own."""
    from transformers import Trainer

    for name in ("_evaluate", "_finalize_training", "_run_epoch", "evaluate", "log"):
        assert hasattr(Trainer, name)
