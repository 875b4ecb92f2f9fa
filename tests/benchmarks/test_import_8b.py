"""The import's benchmark at a tiny size, and its parts against what is known."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fingerprints import fingerprints
from benchmarks.import_8b import LIMIT_GIB, is_good, main
from benchmarks.peaks import run_measured
from benchmarks.random_checkpoint import make_checkpoint, shape_of, tiktoken_ranks
from finetune.llama.meta_format import read_checkpoint
from finetune.llama.tiktoken_file import NUM_RANKS, read_tiktoken

RESULT = "2026-11-24-import-8b.json"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")


@pytest.mark.slow
def test_a_tiny_run_from_end_to_end(tmp_path):
    options = ["--folder", str(tmp_path / "disk"), "--small", "--shards", "2"]
    assert main([*options, "--json", str(tmp_path / "result.json")]) == 0
    text = (tmp_path / "result.json").read_text()
    assert str(tmp_path) not in text
    (run,) = json.loads(text)["runs"]
    assert list(run["import"]["phases"]) == ["read and check", "write", "fsync and hash"]
    assert 0.05 < run["import"]["peak_gib"] < 1.5
    seconds = sum(phase["seconds"] for phase in run["import"]["phases"].values())
    assert seconds == pytest.approx(run["import"]["seconds"], abs=0.1)
    assert run["export_to_1"]["weights_are_identical"] and run["export_to_8"]["peak_gib"] > 0
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["llama3.1-8b-small-in-2"]


def test_the_kept_result_is_a_good_one():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / RESULT
    result = json.loads(path.read_text())
    assert result["preset"] == "llama3.1-8b" and result["num_parameters"] == 8_030_261_248
    assert [run["num_shards"] for run in result["runs"]] == [1, 2]
    assert all(run["bytes"] > 16e9 and is_good(run) for run in result["runs"])


def test_a_high_peak_and_another_weight_are_not_good():
    part = {"peak_gib": LIMIT_GIB - 0.01, "weights_are_identical": True}
    run = {"import": {"peak_gib": 1.0}, "export_to_1": part, "export_to_8": part}
    assert is_good(run)
    assert not is_good(run | {"import": {"peak_gib": LIMIT_GIB}})
    assert not is_good(run | {"export_to_8": part | {"peak_gib": LIMIT_GIB}})
    assert not is_good(run | {"export_to_1": part | {"weights_are_identical": False}})


def test_the_peak_of_a_process_that_is_known():
    code = "b = bytearray(300 << 20); b[::4096] = b'x' * len(b[::4096]); import time; time.sleep(1)"
    measured = run_measured([sys.executable, "-c", code], Path.cwd(), lambda: "all")
    assert 300 / 1024 < measured.peak_gib < 400 / 1024
    assert measured.anon_gib == pytest.approx(measured.peak_gib, abs=0.03)
    assert 1 < measured.seconds < 30
    with pytest.raises(subprocess.CalledProcessError):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], Path.cwd(), lambda: "all")


def test_every_rank_is_the_join_of_two_lower_ones(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiktoken_ranks(NUM_RANKS))
    pieces = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
    rank_of = {piece: rank for rank, piece in enumerate(pieces)}
    assert len(rank_of) == len(pieces) == NUM_RANKS
    for rank, piece in enumerate(pieces[256:], start=256):
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        assert any(max(rank_of.get(part, rank) for part in cut) < rank for cut in cuts)
    assert read_tiktoken(path).tokenizer.get_vocab_size() == NUM_RANKS + 256


def test_the_checkpoint_is_of_its_shape_and_a_fingerprint_sees_one_bit(tmp_path):
    arch = shape_of("llama3.1-8b", small=True)
    for name in ("a", "b"):
        make_checkpoint(tmp_path / name, arch, 2)
    assert read_checkpoint(tmp_path / "a").arch.num_parameters() == arch.num_parameters()
    before = fingerprints(tmp_path / "a")
    assert fingerprints(tmp_path / "b") == before
    path = tmp_path / "b" / "consolidated.01.pth"
    state = torch.load(path, weights_only=True)
    state["layers.1.feed_forward.w2.weight"].view(torch.int16)[3, 4] ^= 1
    torch.save(state, path)
    after = fingerprints(tmp_path / "b")
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["layers.1.feed_forward.w2.weight"]
