"""`train CONFIG --smoke`: every config runs whole, on any machine, without its base or its rows."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import ROOT, embedded_rows, write_rows

from finetune.__main__ import main
from finetune.config.loader import load
from finetune.llama.architecture import HUB_IDS, PRESETS, architecture_of
from finetune.smoke import smoke_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def skip_where_impossible(path):
    config = load(path).config
    if config.base.quantization != "none":
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_evaluates_and_merges(path, capsys, tmp_path, monkeypatch):
    config = skip_where_impossible(path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(ROOT.iterdir()) | set((ROOT / "runs").glob("*"))
    assert main(["train", str(path), "--smoke"]) == 0
    captured = capsys.readouterr()
    assert "2 steps" in captured.err
    assert f"smoke    {path} runs: train, eval" in captured.err
    assert "loss" in captured.out, "the table of eval"
    if config.adapter.method != "none":
        assert "merged   logits differ by" in captured.err
        assert captured.out.split()[:3] == ["adapter", "base", "merged"]
    missing = [s.path for s in (*config.data.train, *config.data.heldout)]
    for source in {name for name in missing if not (ROOT / name).exists()}:
        assert source in captured.err, "what was replaced is said"
    assert set(ROOT.iterdir()) | set((ROOT / "runs").glob("*")) == before
    assert list(tmp_path.glob("smoke-*")) == [], "its folder is gone"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_makes_a_config_is_kept(path, tmp_path):
    config = skip_where_impossible(path)
    small = smoke_config(load(path), tmp_path).config
    assert small.adapter == config.adapter
    assert small.recipe == config.recipe
    kept = {"optim", "learning_rate", "lr_scheduler_type", "bf16", "activation_checkpointing"}
    kept |= {"weight_decay", "max_grad_norm", "adam_beta2"}
    for key in kept:
        assert getattr(small.train, key) == getattr(config.train, key), key
    asked = config.train.gradient_accumulation_steps
    assert small.train.gradient_accumulation_steps == min(asked, 2)
    for key in ("packing", "train_on", "on_overflow", "date_string"):
        assert getattr(small.data, key) == getattr(config.data, key), key
    assert (small.base.dtype, small.base.quantization) == (
        config.base.dtype,
        config.base.quantization,
    )
    preset = HUB_IDS.get(config.base.path)
    if preset:
        whole, tiny = PRESETS[preset], architecture_of(small.base.architecture)
        assert tiny.rope_scaling == whole.rope_scaling
        assert tiny.tie_word_embeddings == whole.tie_word_embeddings
        assert tiny.n_heads // tiny.n_kv_heads == whole.n_heads // whole.n_kv_heads
        assert tiny.num_parameters().total < 2e6
    assert torch.get_default_dtype() == torch.float32


def test_rows_of_the_config_are_used_where_they_are(tmp_path, capsys):
    rows = write_rows(tmp_path / "mine.jsonl", embedded_rows("train", 12))
    argv = ["train", "configs/lora_1b.yaml", f"data.train={rows}", "data.heldout=[]", "--smoke"]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert f"{rows}: the first 12 of 12 rows" in said
    assert "data.train: uses embedded rows" not in said


def test_many_long_rows_with_columns_of_their_own(tmp_path, capsys):
    """Only the first are used, none is too long for a config that allows its length."""
    question = "What is this? " * 60
    rows = [{"q": question, "a": f"{n}", "family": "x"} for n in range(90)]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    source = f"[{{path: {path}, columns: {{prompt: q, completion: a}}}}]"
    argv = ["train", "configs/lora_1b.yaml", f"data.train={source}", "data.heldout_fraction=0.2"]
    assert main([*argv, "--smoke"]) == 0
    said = capsys.readouterr().err
    assert f"{path}: the first 64 of 90 rows" in said
    assert "64 of 64 rows" in said


def test_a_base_that_nobody_documented_is_refused(capsys, tmp_path):
    argv = ["train", "configs/lora_8b.yaml", "base.path=someone/unknown-model", "--smoke"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "neither a folder nor a documented hub id" in said
    assert "Traceback" not in said


def test_a_wrong_config_is_refused_as_without_smoke(capsys):
    assert main(["train", "configs/lora_8b.yaml", "adapter.rank=4", "--smoke"]) == 2
    assert "adapter.rank" in capsys.readouterr().err


def test_the_users_own_folder_of_the_architecture(capsys, tmp_path, small_base):
    config = json.loads((small_base / "config.json").read_text())
    argv = ["train", "configs/lora_1b.yaml", f"base.path={small_base}", "--smoke"]
    assert main([*argv, "base.revision=null", "data.chat_format=nano"]) == 0
    assert config["vocab_size"] == 1024
    assert "prompt format nano" in capsys.readouterr().err
