"""Numbers that go wrong: told, stopped or skipped at their step, with names."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import adapter_tensors, losses, same_bits, step_lines
from test_train import on_step

from finetune import checkpoint
from finetune.errors import CannotContinue, CheckFailed
from finetune.footprint import LiveBytes
from finetune.train import train
from finetune.trainer import OurSeams
from finetune.watchdog import (
    MIN_HISTORY,
    SpikeWatch,
    StillnessWatch,
    checksum,
    frozen_checksums,
    not_finite,
    refuse_changed,
)


class TestSpikes:
    @pytest.fixture
    def watch(self):
        watch = SpikeWatch()
        for step in range(MIN_HISTORY):
            assert watch.look(1.0 + 0.1 * math.sin(step), 2.0 + 0.1 * math.cos(step)) == []
        return watch

    def test_what_is_usual_is_none(self, watch):
        assert watch.look(1.3, 2.3) == []

    def test_a_loss_of_ten_times_is_one(self, watch):
        (spike,) = watch.look(10.0, 2.0)
        assert (spike.name, spike.value) == ("loss", 10.0)
        assert spike.mean == pytest.approx(1.0, abs=0.05)
        assert str(spike) == f"loss 10, where {spike.mean:.4g} ± {spike.deviation:.2g} is usual"

    def test_both_may_spike_and_neither_joins_the_window(self, watch):
        before = watch.state()
        assert [s.name for s in watch.look(10.0, 20.0)] == ["loss", "gradient norm"]
        assert watch.state() == before

    def test_a_fall_is_none(self, watch):
        assert watch.look(0.0, 0.0) == []

    def test_a_few_steps_are_no_rule(self):
        watch = SpikeWatch()
        for _ in range(MIN_HISTORY - 1):
            watch.look(1.0, 1.0)
        assert watch.look(100.0, 100.0) == []

    def test_it_goes_on_from_its_state(self, watch):
        other = SpikeWatch()
        other.restore(watch.state())
        for step in range(200):
            assert other.look(1.0 + step % 7, 2.0) == watch.look(1.0 + step % 7, 2.0)
        assert other.state() == watch.state()


def spiking(monkeypatch, step: int, factor: float = 1000.0):
    """Multiplies the loss of one step, as a bad row would."""
    compute = OurSeams.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 == step:
            self._step_loss_sum *= factor
            loss = loss * factor
        return loss

    monkeypatch.setattr(OurSeams, "compute_loss", compute_loss)


LONG = ("train.max_steps=40", "train.save_steps=36", "train.learning_rate=0.0005")


class TestPolicies:
    def test_it_is_recorded_and_the_run_goes_on(self, bench, monkeypatch, capfd):
        spiking(monkeypatch, 36)
        run = bench.train(*LONG)
        lines = {line["step"]: line for line in step_lines(run)}
        assert [step for step, line in lines.items() if "spikes" in line] == [36]
        assert len(lines[36]["spikes"]) == 2
        assert "spike    step 36: loss" in capfd.readouterr().err

    def test_skip_moves_no_weight_at_that_step(self, bench, monkeypatch):
        spiking(monkeypatch, 36)
        seen = {}

        def note(trainer):
            state = checkpoint.trained_parameters(trainer.model)
            seen[trainer.state.global_step] = {n: p.detach().clone() for n, p in state.items()}

        on_step(monkeypatch, note, last_step=None)
        bench.train(*LONG, "train.on_spike=skip")
        assert same_bits(seen[35], seen[36])
        assert not same_bits(seen[36], seen[37])

    def test_stop_ends_the_run_with_the_checkpoint_intact(self, bench, monkeypatch):
        spiking(monkeypatch, 38)
        with pytest.raises(CannotContinue, match=r"step 38: loss .* stopped by train.on_spike"):
            train(bench.load(*LONG, "train.on_spike=stop"))
        run = bench.run_folder()
        assert [p.name for p in checkpoint.list_checkpoints(run.checkpoints)] == ["step-000036"]
        assert run.state()["exit_code"] == 4


class TestStillness:
    def test_a_rate_too_small_for_the_weights_stops_the_run(self, bench):
        """A bfloat16 weight does not move by a hundred-millionth of itself."""
        settings = ("adapter.method=none", "base.dtype=bfloat16", "train.learning_rate=1e-12")
        config = bench.config_file.read_text().splitlines()
        bench.config_file.write_text("\n".join(_without_adapter(config)))
        with pytest.raises(CannotContinue, match="no trained weight moved in 10 steps"):
            train(bench.load(*settings, "train.max_steps=12", "train.optim=sgd"))
        assert not bench.run_folder().model.exists()

    def test_moving_weights_pass(self):
        model = torch.nn.Linear(2, 2)
        watch = StillnessWatch(model)
        for step in range(1, 30):
            watch.look(step, 0.1)
            with torch.no_grad():
                model.weight[0, 0] += 1e-6


def _without_adapter(lines: list[str]) -> list[str]:
    kept, inside = [], False
    for line in lines:
        inside = line.startswith("adapter:") or (inside and line.startswith(" "))
        if not inside:
            kept.append(line)
    return kept


class TestFrozen:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int8])
    def test_any_bit_changes_the_sum(self, dtype):
        tensor = torch.zeros(37, dtype=dtype)
        before = checksum([tensor])
        words = tensor.view(torch.uint8)
        for place in range(len(words)):
            for bit in range(8):
                words[place] ^= 1 << bit
                assert checksum([tensor]) != before
                words[place] ^= 1 << bit
        assert checksum([tensor]) == before

    def test_a_large_tensor_is_summed_in_little_memory(self):
        """The same sum as in one go, which widens all of it."""
        tensor = torch.randn(3, 5_000_001)
        whole = int(tensor.view(torch.int32).sum(dtype=torch.int64))
        assert checksum([tensor]) == 3 * whole % (1 << 63)
        with LiveBytes() as live:
            checksum([tensor])
        assert live.peak < tensor.nbytes

    def test_a_changed_base_is_named(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        model[0].requires_grad_(False)
        before = frozen_checksums(model)
        refuse_changed(before, model)
        with torch.no_grad():
            model[1].weight += 1
        refuse_changed(before, model)
        with torch.no_grad():
            model[0].weight[1, 1] *= 2
        with pytest.raises(CheckFailed, match=r"1 tensors of the base changed .* 0\.weight"):
            refuse_changed(before, model)

    def test_a_run_whose_base_changes_publishes_nothing(self, bench, monkeypatch):
        def damage(trainer):
            weight = next(p for p in trainer.model.parameters() if not p.requires_grad)
            weight.data.view(torch.int32).flatten()[5] ^= 1

        on_step(monkeypatch, damage, last_step=2)
        with pytest.raises(CheckFailed, match="tensors of the base changed"):
            train(bench.load("train.max_steps=3"))
        assert not bench.run_folder().adapter.exists()


class TestNotFinite:
    def test_names(self):
        tensors = [(f"t{n}", torch.tensor([1.0, float("nan") if n % 2 else 2.0])) for n in range(9)]
        assert not_finite([*tensors, ("none", None)]) == ["t1", "t3", "t5"]

    def test_a_broken_weight_is_named_and_nothing_is_saved(self, bench, monkeypatch):
        def damage(trainer):
            parameters = checkpoint.trained_parameters(trainer.model)
            name = next(n for n in parameters if "layers.1.mlp.up_proj.lora_B" in n)
            parameters[name].data[0, 0] = float("nan")

        on_step(monkeypatch, damage, last_step=2)
        with pytest.raises(CannotContinue) as caught:
            train(bench.load("train.max_steps=5"))
        message = str(caught.value)
        assert message.startswith("step 3: loss is nan")
        assert "weights not finite: " in message
        assert "layers.1.mlp.up_proj.lora_B" in message
        assert "rows whose loss is not finite: " in message
        assert "train.jsonl:" in message

    def test_the_rows_named_are_those_of_the_step(self, bench, monkeypatch):
        """One row is made to break: it alone is named."""
        from finetune import trainer as module

        found = {}
        real = module.document_losses

        def with_one_broken(model, documents, device):
            found["rows"] = [d.example.where for d in documents]
            values = real(model, documents, device)
            return [float("inf"), *values[1:]]

        monkeypatch.setattr(module, "document_losses", with_one_broken)
        spiking(monkeypatch, 3, float("inf"))
        with pytest.raises(CannotContinue) as caught:
            train(bench.load("train.max_steps=5"))
        assert f"rows whose loss is not finite: {found['rows'][0]}." in str(caught.value)


def losses_of(run) -> list[float]:
    return losses(run) if run.metrics.exists() else []


def test_the_published_adapter_is_that_of_the_last_step(bench):
    """The checks change nothing of the run."""
    run = bench.train("train.max_steps=3", "train.on_spike=skip")
    assert adapter_tensors(run)
