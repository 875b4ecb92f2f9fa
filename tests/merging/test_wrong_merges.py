"""Merges that are wrong in one thing are found by the proof, whatever the method and the base.

The wrong arithmetic is the merge's alone: the proof reads, adds and computes by other code.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
from small_runs import write_base

from finetune import merge as merging
from finetune import proof
from finetune.__main__ import main
from finetune.merging import writing
from finetune.merging.update import LowRank

QUANTIZED = [("qlora nf4", "full"), ("qlora nf4", "dequantized")]
WHOLE = [("lora", "full"), ("rslora", "full"), ("dora", "full"), ("pissa", "full"), *QUANTIZED]
# (case of the methods' contract, what it is merged into, base, type)
MERGES = [(*merge, kind, "float32") for merge in WHOLE for kind in ("tied", "untied")]
MERGES += [(name, "full", "tied", "bfloat16") for name in ("lora", "dora")]


class Transposed:
    """B read as if it were stored the other way round."""

    def __init__(self, stored):
        self.name, self.shape, self._stored = stored.name, stored.shape, stored

    def read(self):
        return self._stored.read().T.reshape(self.shape).contiguous()

    def rows(self, start, stop):
        return Rows(self, start, stop)


class Rows:
    """Some rows of it."""

    def __init__(self, whole, start, stop):
        self.name, self._whole, self._rows = whole.name, whole, slice(start, stop)
        self.shape = (stop - start, *whole.shape[1:])

    def read(self):
        return self._whole.read()[self._rows]


def scaled(updates):
    return {name: with_scale(update, 1.1) for name, update in updates.items()}


def with_scale(update, factor):
    if isinstance(update, LowRank):
        return dataclasses.replace(update, scale=factor * update.scale)
    config = copy.deepcopy(update.config)
    config.lora_alpha *= factor
    return dataclasses.replace(update, config=config)


def transposed(updates):
    return {name: with_b_transposed(update) for name, update in updates.items()}


def with_b_transposed(update):
    if isinstance(update, LowRank):
        return dataclasses.replace(update, stored_b=Transposed(update.stored_b))
    stored = {
        name: Transposed(part) if ".lora_B." in name else part
        for name, part in update.stored.items()
    }
    return dataclasses.replace(update, stored=stored)


def skipped(updates):
    return {n: u for n, u in updates.items() if "layers.1.self_attn.k_proj" not in n}


def swapped(updates):
    one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    return updates | {one: updates[two], two: updates[one]}


WRONG = {
    "scale off by a tenth": scaled,
    "B is transposed": transposed,
    "a module is skipped": skipped,
    "two modules are swapped": swapped,
}


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    """Two rows and no text: the weights alone have to tell."""
    monkeypatch.setattr(proof, "NUM_ROWS", 2)
    monkeypatch.setattr(proof, "TEXT_BYTES", 0)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """Bases of the same shapes with other numbers, by kind."""
    presets = {"tied": "llama3.2-1b", "untied": "llama3-8b"}
    folder = tmp_path_factory.mktemp("others")
    return {kind: write_base(folder / kind, name, seed=1) for kind, name in presets.items()}


def merge_with(monkeypatch, change):
    """The verb `merge` of a plan that `change` has spoiled."""
    right = merging.plan_merge
    monkeypatch.setattr(merging, "plan_merge", lambda *arguments: change(right(*arguments)))


def refused(done, folder, target, capsys):
    command = ["merge", str(done.run.path), "--out", str(folder / "merged"), "--base", target]
    assert main(command) == 3
    assert "the merge proof failed, nothing is published" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("name", "target", "kind", "dtype"), MERGES)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arithmetic(trained, tmp_path, monkeypatch, capsys, wrong, name, target, kind, dtype):
    def change(plan):
        updates = WRONG[wrong](dict(plan.updates))
        files = {
            path: [dataclasses.replace(t, update=updates.get(t.stored.name)) for t in tensors]
            for path, tensors in plan.files.items()
        }
        return dataclasses.replace(plan, files=files)

    merge_with(monkeypatch, change)
    refused(trained(name, kind, dtype), tmp_path, target, capsys)


@pytest.mark.parametrize(("name", "target", "kind", "dtype"), MERGES)
def test_another_base_of_the_same_shape(
    trained, other_base, tmp_path, monkeypatch, capsys, name, target, kind, dtype
):
    """Past the fingerprint, as if it did not exist."""

    def change(plan):
        base = dataclasses.replace(plan.base, folder=other_base[kind])
        files = merging.planned_files(base, plan.updates, plan.dtype)
        return dataclasses.replace(plan, files=files)

    merge_with(monkeypatch, change)
    monkeypatch.setattr(merging, "check", lambda *_: None)
    monkeypatch.setattr(writing, "check_base", lambda *_: None)
    refused(trained(name, kind, dtype), tmp_path, target, capsys)


@pytest.mark.parametrize(("name", "target"), QUANTIZED)
def test_the_other_of_the_two_bases(trained, tmp_path, monkeypatch, capsys, name, target):
    """Merged into the weights on disk and said to be dequantised, or the other way round."""
    other = {"full": "dequantized", "dequantized": "full"}[target]
    right = merging.write_merged
    monkeypatch.setattr(
        merging,
        "write_merged",
        lambda plan, *rest: right(dataclasses.replace(plan, target=other), *rest),
    )
    refused(trained(name), tmp_path, target, capsys)
