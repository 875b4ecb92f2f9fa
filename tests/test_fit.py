"""`train.fit: auto`: the micro-batch from the plan, and a step that is done again in pieces."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from small_runs import Bench, adapter_tensors, same_bits
from test_resume import stopped_at
from tolerances import SUM_ORDER_FLOAT32

from finetune import checkpoint, fit, shrinking, trainer
from finetune import peak as peak_module
from finetune.__main__ import main
from finetune.devices import GIB, Cluster, Device
from finetune.errors import CannotContinue, CheckFailed, InputError
from finetune.fast.loss import cut, documents_of, pack
from finetune.fast.offload import offloaded
from finetune.plan import plan_of

AUTO = "train.fit=auto"


def machine(bytes_: int) -> Device:
    return Device("a test", "cpu", bytes_, None)


def peak(bench: Bench, *overrides: str) -> int:
    return plan_of(bench.load(*overrides).config, with_time=False).peak


def test_offloading_without_a_gpu_is_refused_before_a_folder_is_made(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="activation_offloading: found true"):
        bench.train("train.activation_offloading=true")
    assert not bench.run_folder().path.exists()
    with pytest.raises(InputError, match="activation_offloading: found true"):
        peak(bench, "train.activation_offloading=true")


def test_a_run_whose_activations_wait_elsewhere_is_the_same(
    bench, tmp_path, small_base, monkeypatch
):
    (tmp_path / "plain").mkdir()
    plain = Bench(tmp_path / "plain", small_base).train()
    calls = []

    def from_the_cpu(model):
        calls.append(model)
        return offloaded(model, "cpu")

    monkeypatch.setattr(trainer, "offloaded", from_the_cpu)
    monkeypatch.setattr(peak_module, "refuse_offloading", lambda *_: None)
    run = bench.train("train.activation_offloading=true")
    assert calls
    assert same_bits(adapter_tensors(run), adapter_tensors(plain))


class TestChoice:
    def test_the_largest_micro_batch_that_fits(self, bench):
        rows = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=6"]
        config = bench.load(AUTO, *rows).config
        for size in (6, 3, 2, 1):
            change = [f"train.per_device_train_batch_size={size}"]
            change += [f"train.gradient_accumulation_steps={6 // size}"]
            needed = peak(bench, *change)
            plan = fit.choose(config, Cluster(machine(int(needed / 0.95) + 1000)))
            chosen = plan.config.train
            assert chosen.per_device_train_batch_size == size
            assert chosen.gradient_accumulation_steps == 6 // size
            assert not chosen.activation_checkpointing

    def test_recomputing_comes_before_giving_up(self, bench):
        config = bench.load(AUTO).config
        needed = peak(bench, "train.per_device_train_batch_size=1")
        plan = fit.choose(config, Cluster(machine(int(needed / 0.95) - 20_000)))
        assert plan.config.train.activation_checkpointing
        with pytest.raises(InputError, match="no micro-batch fits"):
            fit.choose(config, Cluster(machine(GIB // 2)))

    def test_every_candidate_has_the_rows_of_the_config(self, bench):
        rows = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=3"]
        found = list(fit.candidates(bench.load(*rows).config))
        sizes, steps, recompute = zip(*(c.values() for c in found), strict=True)
        assert {a * b for a, b in zip(sizes, steps, strict=True)} == {12}
        assert sizes == (12, 6, 4, 3, 2, 1) * 2
        assert recompute == (False,) * 6 + (True,) * 6
        only = list(fit.candidates(bench.load("train.activation_checkpointing=true").config))
        assert all(c["activation_checkpointing"] for c in only)

    def test_a_run_keeps_to_what_was_chosen(self, bench, monkeypatch):
        rows = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"]
        run = bench.train(AUTO, *rows)
        chosen = json.loads(run.fit_file.read_text())
        assert (chosen["per_device_train_batch_size"], chosen["gradient_accumulation_steps"]) == (
            2,
            1,
        )
        config = bench.load(AUTO, *rows).config
        monkeypatch.setattr(fit, "this_machine", lambda: machine(1))  # would refuse
        again = fit.fitted(config, run.fit_file, 1, is_first=True)
        assert again.train.per_device_train_batch_size == 2

    def test_another_batch_is_chosen_for_anew(self, bench):
        """Allowed to change, or after a start that was refused."""
        rows = ["train.per_device_train_batch_size={}", "train.gradient_accumulation_steps=2"]
        run = bench.train(AUTO, *(r.format(1) for r in rows))
        config = bench.load(AUTO, *(r.format(3) for r in rows)).config
        again = fit.fitted(config, run.fit_file, 1, is_first=True).train
        assert again.per_device_train_batch_size * again.gradient_accumulation_steps == 6

    def test_memory_that_is_not_known_is_no_memory(self, bench):
        with pytest.raises(InputError, match="memory is not known"):
            fit.choose(bench.load(AUTO).config, Cluster(Device("?", "cpu", None, None)))

    def test_ranks_on_a_cpu_share_its_memory(self):
        assert Cluster(machine(8 * GIB), 4).memory == 2 * GIB
        assert Cluster(Device("a gpu", "cuda", 8 * GIB, None), 4).memory == 8 * GIB

    def test_what_is_no_choice_is_refused(self, bench, tmp_path):
        file = tmp_path / "fit.json"
        file.write_text('{"per_device_train_batch_size": "8"}')
        with pytest.raises(Exception, match="is not what `train` wrote"):
            fit.fitted(bench.load(AUTO).config, file, 1, is_first=True)


DOCUMENTS = [([1, 5, 9], [False, True, True]), ([4], [True]), ([8, 10, 0, 17], [True] * 4)]


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 7])
def test_pieces_are_whole_documents_in_order(num_pieces):
    packed = pack(DOCUMENTS)
    pieces = cut(packed, num_pieces)
    assert len(pieces) == min(num_pieces, 3)
    assert [length for p in pieces for length in p.document_lengths] == [3, 1, 4]
    for name in ("input_ids", "position_ids", "labels"):
        joined = torch.cat([getattr(p, name) for p in pieces], 1)
        assert torch.equal(joined, getattr(packed, name))
    assert [p.document_lengths for p in documents_of(packed)] == [[3], [1], [4]]


@pytest.fixture
def memory(monkeypatch):
    """`memory(limit)`: a micro-batch of more tokens fails as torch's allocator does."""
    right, sizes = trainer.token_losses, []

    def limited(limit: int) -> list[int]:
        def losses(model, packed, **settings):
            found = right(model, packed, **settings)
            sizes.append(packed.labels.numel())
            if packed.labels.numel() > limit:
                found = found + torch.empty(1 << 55)[0]  # after the forward pass
            return found

        monkeypatch.setattr(trainer, "token_losses", losses)
        return sizes

    return limited


class TestPieces:
    OVERRIDES = ("train.gradient_accumulation_steps=2", "train.eval_on_start=false")

    def test_a_step_done_again_is_the_same_step(self, bench, memory, capsys):
        whole = bench.train("run.name=whole", *self.OVERRIDES)
        sizes = memory(150)
        pieces = bench.train("run.name=pieces", AUTO, *self.OVERRIDES)
        assert max(sizes) > 150 >= sizes[-1]
        assert "ran out of memory; it is done again" in capsys.readouterr().err
        lines = [
            [json.loads(line) for line in run.metrics.read_text().splitlines()]
            for run in (whole, pieces)
        ]
        steps = [[s for s in side if "grad_norm" in s] for side in lines]
        assert [s["tokens_trained"] for s in steps[0]] == [s["tokens_trained"] for s in steps[1]]
        assert max(s["micro_batch_pieces"] for s in steps[1]) > 1
        assert "micro_batch_pieces" not in steps[0][0]
        first = [side[0] for side in steps]
        assert abs(first[0]["loss"] / first[1]["loss"] - 1) < SUM_ORDER_FLOAT32
        assert abs(first[0]["grad_norm"] / first[1]["grad_norm"] - 1) < 10 * SUM_ORDER_FLOAT32

    def test_a_run_that_goes_on_keeps_to_its_pieces(self, bench, memory, monkeypatch):
        settings = (AUTO, *self.OVERRIDES, "adapter.lora_dropout=0.1", "train.save_steps=2")
        memory(150)
        straight = bench.train("run.name=straight", *settings)
        memory(150)
        stopped_at(bench, monkeypatch, 3, *settings)
        memory(150)
        run = bench.train(*settings)
        assert same_bits(adapter_tensors(run), adapter_tensors(straight))

    def test_pieces_that_are_none_are_refused(self, tmp_path):
        for found in ({"num_pieces": 0}, {"num_pieces": True}, {}, []):
            (tmp_path / "pieces.json").write_text(json.dumps(found))
            with pytest.raises(CheckFailed, match="is not what training writes"):
                checkpoint.load_pieces(tmp_path)

    def test_the_penalty_of_adalora_counts_once(self, bench, memory):
        values = yaml.safe_load(bench.config_file.read_text())
        values["adapter"] = {"method": "adalora", "init_r": 6, "target_r": 2, "tfinal": 1}
        bench.config_file.write_text(yaml.safe_dump(values))
        whole = bench.train("run.name=whole", *self.OVERRIDES)
        memory(150)
        pieces = bench.train("run.name=pieces", AUTO, *self.OVERRIDES)
        lines = [run.metrics.read_text().splitlines()[0] for run in (whole, pieces)]
        norms = [json.loads(line)["grad_norm"] for line in lines]
        assert abs(norms[0] / norms[1] - 1) < 10 * SUM_ORDER_FLOAT32

    def test_one_document_too_large_ends_the_run(self, bench, memory):
        memory(0)
        with pytest.raises(CannotContinue, match="one document at a time"):
            bench.train(AUTO, *self.OVERRIDES)

    def test_without_fit_the_run_ends_as_before(self, bench, memory, capsys):
        memory(150)
        arguments = ["train", str(bench.config_file), *self.OVERRIDES]
        assert main(arguments) == 4
        assert "out of memory" in capsys.readouterr().err

    def test_another_error_is_not_taken_for_memory(self, bench, monkeypatch):
        def failing(*_, **__):
            raise RuntimeError("on purpose")

        monkeypatch.setattr(trainer, "token_losses", failing)
        with pytest.raises(RuntimeError, match="on purpose"):
            bench.train(AUTO, *self.OVERRIDES)

    def test_ranks_that_wait_are_not_left_alone(self, bench, monkeypatch):
        seam = shrinking.MemorySeam.__new__(shrinking.MemorySeam)
        seam._seen = [{"document_lengths": [1, 2]}]
        seam.state = type("State", (), {"global_step": 0})
        seam.args = type("Args", (), {"world_size": 2})
        with pytest.raises(CannotContinue, match="the other ranks"):
            seam._shrink(torch.nn.Linear(1, 1))
