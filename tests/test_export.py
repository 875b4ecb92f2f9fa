"""The verb `export --format meta`: runs and model folders in Meta's layout, and back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_runs import NANO, flip_bit

from finetune import merge
from finetune.__main__ import main
from finetune.llama.meta_format import import_checkpoint


@pytest.fixture
def meta_base(tmp_path, small_base):
    """The small base once in Meta's layout."""
    out = tmp_path / "meta"
    argv = ["export", str(small_base), "--format", "meta", "--out", str(out)]
    assert main([*argv, "--tokenizer", str(NANO / "tokenizer.model")]) == 0
    return out


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_folder_goes_there_and_back(small_base, tmp_path, shards, capsys):
    out, back = tmp_path / "meta", tmp_path / "back"
    argv = ["export", str(small_base), "--format", "meta", "--out", str(out), "--json"]
    argv += ["--shards", str(shards), "--tokenizer", str(NANO / "tokenizer.model")]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == shards
    assert len(list(out.glob("consolidated.*.pth"))) == shards
    import_checkpoint(out, back)
    before = load_file(small_base / "model.safetensors")
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_is_exported_as_it_was_merged(bench, meta_base, tmp_path, capsys):
    """Trained on a Meta folder: the tokenizer file is found in the run's own base."""
    run = bench.train(f"base.path={meta_base}", "data.chat_format=nano")
    out = tmp_path / "out"
    argv = ["export", str(run.path), "--format", "meta", "--out", str(out)]
    assert main(argv) == 2
    assert f"python -m finetune merge {run.path}" in capsys.readouterr().err
    merge.merge(run)
    assert main(argv) == 0
    assert (out / "tokenizer.model").read_bytes() == (NANO / "tokenizer.model").read_bytes()
    import_checkpoint(out, tmp_path / "back")
    merged = load_file(run.merged / "model.safetensors")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    flip_bit(run.merged / "model.safetensors")
    shutil.rmtree(out)
    assert main(argv) == 3
    assert "model.safetensors" in capsys.readouterr().err
    assert not out.exists()


def test_the_tokenizer_that_the_config_names_is_found(bench, tmp_path):
    shape = "{dim: 32, n_layers: 1, n_heads: 2, vocab_size: 1024}"
    run = bench.train(
        "base.path=null",
        f"base.architecture={shape}",
        f"base.tokenizer={NANO}",
        "train.max_steps=1",
    )
    merge.merge(run)
    out = tmp_path / "out"
    assert main(["export", str(run.path), "--format", "meta", "--out", str(out)]) == 0
    assert (out / "tokenizer.model").read_bytes() == (NANO / "tokenizer.model").read_bytes()


def test_what_cannot_be_exported_is_refused(small_base, meta_base, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(target, *more: str) -> str:
        assert main(["export", str(target), "--format", "meta", "--out", str(out), *more]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "name it with --tokenizer" in refused(small_base)
    assert "is in Meta's layout already" in refused(meta_base)
    assert "neither a run" in refused(tmp_path)
    other = tmp_path / "other.model"
    argv = ["train-tokenizer", str(NANO / "data" / "train.jsonl"), "--vocab-size", "400"]
    assert main([*argv, "--out", str(other)]) == 0
    assert "is not the tokenizer of" in refused(small_base, "--tokenizer", str(other))
    as_json = ["--tokenizer", str(small_base / "tokenizer.json")]
    assert "holds no tokenizer.model" in refused(small_base, *as_json)
    nano = ["--tokenizer", str(NANO / "tokenizer.model")]
    assert "num_shards: 3" in refused(small_base, "--shards", "3", *nano)
    assert "num_shards: 0" in refused(small_base, "--shards", "0", *nano)
