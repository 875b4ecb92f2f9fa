"""No pickle and no module is ever read: not beside what is read, nor in the place of it."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
from planting import MODULES, PICKLES
from small_runs import republish

from finetune.llama.weight_files import SINGLE


def start_again(bench, run):
    """What makes `train` go on with a copied run as after an interruption."""
    shutil.rmtree(run.adapter)
    run.write_state(state="interrupted", exit_code=75, reason="")
    return ("train", bench.config_file, "train.save_steps=2", f"run.dir={run.path.parent}")


def published_files(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_canary_sings_where_a_pickle_is_read(tmp_path, canary):
    """Else the others prove nothing."""
    for kind in range(3):
        canary.pickle(tmp_path / "x", kind)
        if kind == 0:
            pickle.loads((tmp_path / "x").read_bytes())
        else:
            torch.load(tmp_path / "x", weights_only=False)
        assert canary.sings
        canary.path.unlink()


class TestBeside:
    """What the other tools write or look for lies next to the real files."""

    def test_the_base_and_the_run(self, run, canary, ended, tmp_path):
        names = canary.plant(run.path)
        shutil.rmtree(run.merged)
        ended(0, "merge", run.path)
        ended(0, "eval", run.path, "--against", "base,merged")
        ended(0, "generate", run.path, "--prompt", "x", "--max-new-tokens", "2")
        for kind in ("hf", "peft"):
            ended(0, "export", run.path, "--format", kind, "--out", tmp_path / kind)
            ended(0, "verify", tmp_path / kind)
        for folder in (run.merged, run.adapter, tmp_path / "hf", tmp_path / "peft"):
            assert published_files(folder) & names == set(), "nothing of it is passed on"

    def test_the_adapter(self, run, canary, ended, tmp_path):
        canary.plant(run.adapter)
        for argv in (
            ("merge", run.path, "--out", tmp_path / "merged"),
            ("eval", run.path),
            ("export", run.path, "--format", "peft", "--out", tmp_path / "out"),
            ("verify", run.adapter),
        ):
            assert "adapter_model.bin: is not in the manifest" in ended(3, *argv)

    def test_the_merged_model(self, run, canary, ended, tmp_path):
        canary.plant(run.merged)
        export = ("export", run.path, "--format", "hf", "--out", tmp_path / "out")
        for argv in (("eval", run.merged, "--run", run.path), export, ("merge", run.path)):
            assert "pytorch_model.bin: is not in the manifest" in ended(3, *argv)

    def test_a_checkpoint(self, spoilt_bench, run, canary, ended):
        canary.plant(run.checkpoints / "step-000004")
        said = ended(0, *start_again(spoilt_bench, run))
        assert "set aside as damaged-step-000004" in said
        assert f"from {run.checkpoints / 'step-000002'}" in said

    def test_the_rows(self, bench, canary, ended):
        folder = bench.folder / "rows"
        canary.plant(folder)
        shutil.copy(bench.train_file, folder / "rows.jsonl")
        said = ended(2, "train", bench.config_file, f"data.train={folder}")
        assert "data that is not read" in said and ".pkl" in said
        ended(0, "data", bench.config_file, f"data.train={folder / 'rows.jsonl'}")


class TestInThePlace:
    """The real file is a pickle, or only a pickle is there; the manifest was forged to fit."""

    @pytest.mark.parametrize("kind", range(3))
    def test_of_the_bases_files(self, bench, small_base, canary, ended, kind):
        folder = shutil.copytree(small_base, bench.folder / "base")
        argv = ("train", bench.config_file, f"base.path={folder}")
        for name in (SINGLE, "tokenizer.json", "config.json"):
            whole = (folder / name).read_bytes()
            canary.pickle(folder / name, kind)
            assert name in ended(2, *argv)
            (folder / name).write_bytes(whole)
        (folder / SINGLE).unlink()
        canary.plant(folder)
        assert "pickled weights (.bin, .pt) are not read" in ended(2, *argv)
        (folder / "tokenizer.json").unlink()
        canary.pickle(folder / "tokenizer.model", kind)
        ended(2, "tokenize", folder, "--text", "x")

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
    def test_of_the_adapters_weights(self, run, canary, ended, tmp_path, name):
        (run.adapter / "adapter_model.safetensors").unlink()
        canary.pickle(run.adapter / name, 1)
        republish(run.adapter)
        ended([2, 3], "eval", run.path)
        ended([2, 3], "merge", run.path, "--out", tmp_path / "merged")
        if name.endswith(".bin"):
            ended([2, 3], "export", run.path, "--format", "peft", "--out", tmp_path / "out")

    @pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors"])
    @pytest.mark.parametrize("other", [None, "optimizer.pt"])
    def test_of_a_checkpoints_state(self, spoilt_bench, run, canary, ended, name, other):
        for folder in run.checkpoints.glob("step-*"):
            (folder / name).unlink()
            canary.pickle(folder / (other or name), 1)
            republish(folder)
        ended([2, 3, 4], *start_again(spoilt_bench, run))

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz"])
    def test_of_rows(self, bench, canary, ended, suffix):
        for kind in range(3):
            file = canary.pickle(bench.folder / f"rows{suffix}", kind)
            ended(2, "data", bench.config_file, f"data.train={file}")

    def test_of_a_named_file_of_rows(self, bench, canary, ended):
        for name in ("data.pkl", "training_args.bin", "model.pth"):
            file = canary.pickle(bench.folder / name, 0)
            said = ended(2, "train", bench.config_file, f"data.train={file}")
            assert "are not read" in said

    def test_all_names_are_different(self):
        assert len({*PICKLES, *MODULES}) == len(PICKLES) + len(MODULES)
