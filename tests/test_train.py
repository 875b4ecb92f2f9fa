"""A run as a whole: what it writes, what it says, and that it stops on bad numbers."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from small_runs import embedded_rows, losses, same_bits, step_lines, trainer_of, write_rows
from transformers import TrainerCallback

from finetune import artifact
from finetune.errors import CannotContinue, InputError
from finetune.monitor import Progress, StepMetrics
from finetune.recipes import RECIPES
from finetune.train import train

SHORT = ("train.max_steps=6", "train.save_steps=2")


def on_step(monkeypatch, action, last_step):
    """Calls `action(trainer)` at the end of a step (None: of each) of every run that follows."""

    class AtStep(TrainerCallback):
        def __init__(self, trainer) -> None:
            self.trainer = trainer

        def on_step_end(self, args, state, control, **_):
            if last_step in (None, state.global_step):
                action(self.trainer)

    def with_action(parts, build=RECIPES["sft"]):
        trainer = build(parts)
        trainer.add_callback(AtStep(trainer))
        return trainer

    monkeypatch.setitem(RECIPES, "sft", with_action)


def poison(trainer):
    norm = dict(trainer.model.named_parameters())["base_model.model.model.norm.weight"]
    norm.data[0] = float("nan")


class TestNonFinite:
    @pytest.mark.parametrize("clipping", [1.0, 0.0])
    def test_the_run_stops_at_the_step_and_keeps_the_last_checkpoint(
        self, bench, monkeypatch, clipping
    ):
        on_step(monkeypatch, poison, last_step=3)
        loaded = bench.load(*SHORT, f"train.max_grad_norm={clipping}")
        with pytest.raises(CannotContinue, match="step 4: loss is nan"):
            train(loaded)
        run = bench.run_folder()
        state = run.state()
        assert (state["state"], state["exit_code"]) == ("failed", 4)
        assert "step 4" in state["reason"]
        assert [line["step"] for line in step_lines(run)] == [1, 2, 3]
        assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-000002"]
        assert artifact.findings_of(run.checkpoints / "step-000002") == []
        assert not run.adapter.exists()
        for path in run.path.rglob("*.safetensors"):
            assert all(bool(t.isfinite().all()) for t in load_file(path).values()), path

    def test_weights_do_not_move_on_an_infinite_gradient(self, bench, monkeypatch):
        kept = {}

        class Explode(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **_):
                trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
                kept.update({n: p.detach().clone() for n, p in trained.items()})
                kept["model"] = trained
                if state.global_step == 1:
                    parameter = next(iter(trained.values()))
                    parameter.register_hook(lambda gradient: gradient + float("inf"))

        def exploding(parts, build=RECIPES["sft"]):
            trainer = build(parts)
            trainer.add_callback(Explode())
            return trainer

        monkeypatch.setitem(RECIPES, "sft", exploding)
        with pytest.raises(CannotContinue, match="step 2: loss is .*, gradient norm (nan|inf)"):
            train(bench.load(*SHORT, "data.packing=false"))
        moved = kept.pop("model")
        assert same_bits(kept, {n: p.detach() for n, p in moved.items()})

    def test_a_non_finite_heldout_loss_stops_the_run(self, bench, monkeypatch):
        on_step(monkeypatch, poison, last_step=2)
        with pytest.raises(CannotContinue, match=r"heldout\.jsonl:1: the held-out loss is nan"):
            train(bench.load("train.max_steps=2"))
        assert bench.run_folder().state()["exit_code"] == 4
        assert not bench.run_folder().adapter.exists()

    @pytest.mark.parametrize("save_steps", [1, 9])
    def test_non_finite_weights_are_never_written(self, bench, monkeypatch, save_steps):
        """The optimizer's own move may be the one that breaks them: no loss has shown it yet."""

        def spoil(trainer):
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            trained[-1].data[0, 0] = float("inf")

        on_step(monkeypatch, spoil, last_step=2)
        with pytest.raises(CannotContinue, match="non-finite"):
            train(
                bench.load("train.max_steps=2", "data.heldout=[]", f"train.save_steps={save_steps}")
            )
        run = bench.run_folder()
        assert not run.adapter.exists()
        assert len(list(run.checkpoints.glob("step-*"))) == (1 if save_steps == 1 else 0)
        for path in run.path.rglob("*.safetensors"):
            assert all(bool(t.isfinite().all()) for t in load_file(path).values()), path

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ((), r"before step 1: .*heldout\.jsonl:1: .* not finite: .*layers\.1\.mlp\.up_proj"),
            (("train.eval_on_start=false",), "step 1: loss is nan"),
        ],
    )
    def test_a_base_with_a_nan_is_refused_at_the_first_step(
        self, bench, tmp_path, small_base, settings, says
    ):
        import shutil

        shutil.copytree(small_base, tmp_path / "nan")
        weights = load_file(tmp_path / "nan" / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CannotContinue, match=says):
            train(bench.load(f"base.path={tmp_path / 'nan'}", *settings))


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 75),
        (OSError(28, "No space left on device"), "failed", 4),
        (MemoryError(), "failed", 4),
        (ZeroDivisionError(), "failed", 1),
    ],
)
def test_run_json_says_how_a_run_ended_before_its_first_step(
    bench, monkeypatch, error, state, code
):
    def end(*_):
        raise error

    monkeypatch.setattr("finetune.stages.prepare_model", end)
    with pytest.raises(type(error)):
        train(bench.load())
    found = bench.run_folder().state()
    assert (found["state"], found["exit_code"]) == (state, code)
    assert found["reason"]
    monkeypatch.undo()
    assert bench.train("train.max_steps=4").is_finished


class TestWhatARunWrites:
    def test_every_file_of_the_contract(self, bench):
        run = bench.train(*SHORT, "train.eval_steps=3")
        found = {path.name for path in run.path.iterdir()}
        assert found == {
            *("config.yaml", "environment.json", "run.json", "lock", "data.json"),
            *("metrics.jsonl", "checkpoints", "adapter", "witness.safetensors"),
        }
        assert run.state() == {"state": "finished", "exit_code": 0, "reason": None}
        assert run.config() == bench.load(*SHORT, "train.eval_steps=3").config
        assert len(losses(run)) == 6
        steps = [path.name for path in sorted(run.checkpoints.glob("step-*"))]
        assert steps == ["step-000004", "step-000006"], "two are kept"
        latest = json.loads((run.checkpoints / "latest.json").read_text())
        assert latest == {"step": 6, "folder": "step-000006"}
        settings = json.loads((run.adapter / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(bench.base)

    def test_heldout_losses_are_those_of_their_steps(self, bench):
        run = bench.train("train.max_steps=6", "train.eval_steps=3", "train.save_steps=3")
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        held = {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}
        assert list(held) == [0, 3, 6]
        assert len(lines) == 9, "each once"
        facts = artifact.read_manifest(run.adapter)["facts"]
        assert facts["heldout_loss"] == held[6] != held[3]
        trainer = trainer_of(bench.load("run.name=other"))
        trainer._load_from_checkpoint(str(run.checkpoints / "step-000003"))
        assert trainer._score_heldout().loss == held[3]

    def test_a_final_heldout_loss_without_eval_steps(self, bench):
        run = bench.train("train.max_steps=2")
        last = json.loads(run.metrics.read_text().splitlines()[-1])
        assert last["heldout_loss"] == artifact.read_manifest(run.adapter)["facts"]["heldout_loss"]

    def test_full_weights_leave_a_model_that_plain_transformers_loads(self, bench):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        run = bench.train("adapter={method: none}", "train.max_steps=2")
        assert not run.adapter.exists()
        model = AutoModelForCausalLM.from_pretrained(run.model)
        saved = load_file(run.checkpoints / "step-000002" / "trained.safetensors")
        assert same_bits(saved, {name: p.detach() for name, p in model.named_parameters()})
        assert model.generation_config.eos_token_id == 2
        assert AutoTokenizer.from_pretrained(run.model).eos_token == "</s>"

    @pytest.mark.parametrize(
        ("rows", "settings", "steps"),
        [
            (24, ("train.num_train_epochs=2",), 24),
            (21, ("train.num_train_epochs=1",), 11),
            (10, ("train.num_train_epochs=0.5",), 3),
            (3, ("train.num_train_epochs=1", "train.gradient_accumulation_steps=8"), 1),
        ],
    )
    def test_the_steps_announced_are_the_steps_made(self, bench, capfd, rows, settings, steps):
        write_rows(bench.train_file, embedded_rows("train", rows))
        run = bench.train(*settings, "train.max_steps=null", "data.packing=false")
        assert len(losses(run)) == steps
        assert f"; {steps} steps, about" in capfd.readouterr().err

    def test_every_row_is_trained_once_an_epoch(self, bench):
        run = bench.train("train.max_steps=null", "train.num_train_epochs=2")
        ledger = json.loads((run.path / "data.json").read_text())["train"]
        assert (
            sum(line["tokens_trained"] for line in step_lines(run)) == 2 * ledger["tokens_trained"]
        )
        assert sum(line["tokens"] for line in step_lines(run)) == 2 * ledger["tokens"]


class TestRepetition:
    def test_a_run_repeats_bit_for_bit(self, bench):
        settings = ("adapter.lora_dropout=0.1",)
        first, second = bench.train(*settings), bench.train(*settings, "run.name=again")
        assert losses(first) == losses(second)
        other = bench.train(*settings, "run.name=other", "run.seed=1")
        assert losses(first) != losses(other)

    def test_a_finished_run_is_left_alone(self, bench, capfd):
        run = bench.train()
        before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
        assert train(bench.load()) == 0
        assert "is finished; nothing to do" in capfd.readouterr().err
        assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()} == before


class TestMetricsFile:
    def test_a_half_written_last_line_is_dropped(self, bench):
        trainer = trainer_of(bench.load())
        path = bench.folder / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
        trainer.state.global_step = 1
        metrics = StepMetrics(trainer, path, Progress(10))
        metrics.on_train_begin(trainer.args, trainer.state, trainer.control)
        metrics.close()
        assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


class TestLaunch:
    def test_fewer_processes_than_were_asked_for(self, bench, monkeypatch):
        monkeypatch.setattr("finetune.train._accelerate_num_processes", lambda: 2)
        with pytest.raises(InputError, match="asked for 2 processes and started 1"):
            train(bench.load())
        assert not bench.run_folder().path.exists()

    def test_a_world_of_two_without_the_other(self, bench, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR"):
            train(bench.load())
        assert not bench.run_folder().path.exists()
