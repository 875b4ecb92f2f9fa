"""Checkpoints: what is put back is what was saved, and a damaged one is never gone on from."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import flip_bit, same_bits

from finetune import artifact, checkpoint
from finetune.artifact import staged
from finetune.errors import CannotContinue, CheckFailed, InputError


def small_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def trained_model(optimizer_class, **settings):
    """A model and an optimizer that have made three steps."""
    model = small_model()
    optimizer = optimizer_class(model.parameters(), lr=0.1, **settings)
    for step in range(3):
        _step(model, optimizer, step)
    return model, optimizer


def _step(model, optimizer, seed):
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def publish(checkpoints, step):
    """A published checkpoint of a small model."""
    model, optimizer = trained_model(torch.optim.AdamW)
    with staged(checkpoint.step_folder(checkpoints, step), {"step": step}) as stage:
        checkpoint.save_weights(model, stage)
        checkpoint.save_optimizer(optimizer, stage)
        checkpoint.save_rng([checkpoint.rng_state()], stage)
    return checkpoint.step_folder(checkpoints, step)


class TestContents:
    @pytest.mark.parametrize(
        ("optimizer_class", "settings"),
        [
            (torch.optim.AdamW, {"fused": True}),
            (torch.optim.AdamW, {"foreach": False, "weight_decay": 0.1}),
            (torch.optim.SGD, {}),
            (torch.optim.SGD, {"momentum": 0.9}),
        ],
    )
    def test_weights_and_optimizer_go_on_bit_for_bit(self, tmp_path, optimizer_class, settings):
        model, optimizer = trained_model(optimizer_class, **settings)
        checkpoint.save_weights(model, tmp_path)
        checkpoint.save_optimizer(optimizer, tmp_path)
        other = small_model(seed=1)
        fresh = optimizer_class(other.parameters(), lr=0.1, **settings)
        checkpoint.load_weights(other, tmp_path)
        checkpoint.load_optimizer(fresh, tmp_path)
        for step in range(3, 6):
            _step(model, optimizer, step)
            _step(other, fresh, step)
        assert same_bits(dict(model.named_parameters()), dict(other.named_parameters()))

    def test_the_settings_of_the_config_stand(self, tmp_path):
        """A changed rate or decay is to act, and an unchanged one is the same number."""
        _, optimizer = trained_model(torch.optim.AdamW, weight_decay=0.1)
        checkpoint.save_optimizer(optimizer, tmp_path)
        fresh = torch.optim.AdamW(small_model(seed=1).parameters(), lr=0.5, weight_decay=0.2)
        checkpoint.load_optimizer(fresh, tmp_path)
        assert {(g["lr"], g["weight_decay"]) for g in fresh.param_groups} == {(0.5, 0.2)}

    def test_only_trained_parameters_are_saved(self, tmp_path):
        model = small_model()
        model[0].requires_grad_(False)
        checkpoint.save_weights(model, tmp_path)
        assert set(load_file(tmp_path / checkpoint.WEIGHTS)) == {"1.weight", "1.bias"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t | {"2.weight": torch.zeros(1)}, "2.weight"),
            (lambda t: {n: v for n, v in t.items() if n != "0.bias"}, "0.bias"),
            (lambda t: t | {"0.bias": torch.zeros(5)}, r"0.bias is torch.float32 \(5,\)"),
            (lambda t: t | {"0.bias": t["0.bias"].double()}, "0.bias is torch.float64"),
        ],
    )
    def test_weights_of_another_model_are_refused(self, tmp_path, change, message):
        checkpoint.save_weights(small_model(), tmp_path)
        path = tmp_path / checkpoint.WEIGHTS
        save_file(change(load_file(path)), path)
        with pytest.raises(CheckFailed, match=message):
            checkpoint.load_weights(small_model(), tmp_path)

    def test_non_finite_weights_are_refused(self, tmp_path):
        model = small_model()
        model[1].bias.data[0] = float("nan")
        with pytest.raises(CannotContinue, match="1.bias"):
            checkpoint.save_weights(model, tmp_path)

    def test_every_generator_is_put_back(self, tmp_path):
        def draw():
            return [
                random.random(),
                *np.random.rand(3),
                *torch.rand(3).tolist(),
                random.gauss(0, 1),
            ]

        random.gauss(0, 1)  # leaves a second draw waiting inside the generator
        checkpoint.save_rng([{"python": None}, checkpoint.rng_state()], tmp_path)
        expected = draw()
        assert draw() != expected
        checkpoint.load_rng(tmp_path, rank=1)
        assert draw() == expected

    def test_a_rank_without_a_saved_generator_is_refused(self, tmp_path):
        checkpoint.save_rng([checkpoint.rng_state()], tmp_path)
        with pytest.raises(CheckFailed, match="written by 1 ranks; rank 1"):
            checkpoint.load_rng(tmp_path, rank=1)

    def test_no_pickle_is_written(self, tmp_path):
        folder = publish(tmp_path, 3)
        for path in folder.iterdir():
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                load_file(path)


class TestWhichOne:
    @pytest.fixture
    def checkpoints(self, tmp_path):
        """Steps 9, 100 and 99,999: sorted by number, not by name."""
        first = publish(tmp_path, 9)
        for step in (100, 99_999, 1_000_000):
            shutil.copytree(first, checkpoint.step_folder(tmp_path, step))
        return tmp_path

    def test_the_newest_by_number(self, checkpoints):
        names = [path.name for path in checkpoint.list_checkpoints(checkpoints)]
        assert names == ["step-000009", "step-000100", "step-099999", "step-1000000"]
        found = checkpoint.find_resumable(checkpoints, "auto")
        assert found == checkpoints / "step-1000000"

    def test_pruning_keeps_the_newest(self, checkpoints):
        checkpoint.prune(checkpoints, 2)
        assert sorted(p.name for p in checkpoints.iterdir()) == ["step-099999", "step-1000000"]
        checkpoint.prune(checkpoints, 2)
        assert len(checkpoint.list_checkpoints(checkpoints)) == 2

    def test_pruning_keeps_two_that_verify(self, checkpoints):
        """Else the one that is left is all there is when the next is torn."""
        flip_bit(checkpoints / "step-1000000" / "optimizer.safetensors")
        checkpoint.prune(checkpoints, 2)
        kept = sorted(p.name for p in checkpoints.iterdir())
        assert kept == ["step-000100", "step-099999", "step-1000000"]

    def test_pruning_leaves_the_protected_one(self, checkpoints):
        checkpoint.prune(checkpoints, 2, protected=checkpoints / "step-000009")
        kept = sorted(p.name for p in checkpoints.iterdir())
        assert kept == ["step-000009", "step-099999", "step-1000000"]

    def test_pruning_reads_what_was_just_written_no_more_than_once(self, checkpoints, monkeypatch):
        read = []
        monkeypatch.setattr(artifact, "findings_of", lambda path: read.append(path.name) or [])
        checkpoint.prune(checkpoints, 2, checkpoints / "step-1000000")
        assert read == ["step-099999"]

    @pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "add"])
    @pytest.mark.parametrize(
        "name",
        ["trained.safetensors", "optimizer.safetensors", "optimizer.json", "rng.json", "manifest"],
    )
    def test_a_damaged_newest_one_is_set_aside_aloud(self, checkpoints, capsys, name, damage):
        newest = checkpoints / "step-1000000"
        path = newest / ("manifest.json" if name == "manifest" else name)
        if damage == "flip":
            # In the manifest a bit of the first hash: elsewhere it could hit a fact.
            flip_bit(path, 0.5)
        elif damage == "truncate":
            path.write_bytes(path.read_bytes()[:-7])
        elif damage == "delete":
            path.unlink()
        else:
            (newest / "more.safetensors").write_bytes(b"")
        assert checkpoint.find_resumable(checkpoints, "auto") == checkpoints / "step-099999"
        assert "set aside as damaged-step-1000000" in capsys.readouterr().err
        assert (checkpoints / "damaged-step-1000000").is_dir()
        assert checkpoint.find_resumable(checkpoints, "auto") == checkpoints / "step-099999"

    def test_without_any_there_is_none(self, tmp_path):
        assert checkpoint.find_resumable(tmp_path, "auto") is None
        assert checkpoint.find_resumable(tmp_path / "missing", "auto") is None
        assert checkpoint.find_resumable(tmp_path, "never") is None

    def test_where_all_are_damaged_none_is_gone_on_from_now_or_later(self, checkpoints):
        """Set aside, they must not make the next start begin at step 0 as if nothing had been."""
        for path in checkpoint.list_checkpoints(checkpoints):
            flip_bit(path / "rng.json")
        for _ in range(2):
            with pytest.raises(CheckFailed, match="no checkpoint verifies"):
                checkpoint.find_resumable(checkpoints, "auto")

    def test_never_refuses_a_folder_with_checkpoints(self, checkpoints):
        with pytest.raises(InputError, match="step-1000000"):
            checkpoint.find_resumable(checkpoints, "never")

    def test_a_named_one_is_verified_as_well(self, checkpoints):
        named = checkpoints / "step-000100"
        assert checkpoint.find_resumable(checkpoints, str(named)) == named
        flip_bit(named / "optimizer.safetensors")
        with pytest.raises(CheckFailed, match="optimizer.safetensors"):
            checkpoint.find_resumable(checkpoints, str(named))
        assert named.is_dir(), "a named one is not renamed"
        with pytest.raises(InputError, match="no such checkpoint"):
            checkpoint.find_resumable(checkpoints, str(checkpoints / "step-000003"))

    def test_an_unfinished_staging_is_not_a_checkpoint(self, checkpoints):
        shutil.copytree(checkpoints / "step-000009", checkpoints / ".step-2000000.tmp-1234abcd")
        assert checkpoint.find_resumable(checkpoints, "auto").name == "step-1000000"
        assert artifact.sweep(checkpoints) == [".step-2000000.tmp-1234abcd"]
