"""The speed benchmark at a tiny size: the same packs, the same losses, a table."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.speed import table
from benchmarks.speed.__main__ import main, those_at_hand
from benchmarks.speed.roofline import measured
from benchmarks.speed.workload import SIZES, config_of
from finetune.budget import budget_of
from finetune.config import RunConfig
from finetune.llama.architecture import PRESETS
from finetune.workload import flops_of

IN_NF4 = ("ours in nf4", "trl packed in nf4")


@pytest.fixture(scope="module")
def result(tmp_path_factory, shared):
    shared("data/alpaca_en_demo.json")
    folder = tmp_path_factory.mktemp("speed")
    options = ["--folder", str(folder), "--json", str(folder / "result.json"), "--size", "tiny"]
    options += ["--rounds", "1", "--steps", "5", "--dtype", "float32", "--allocator", "glibc"]
    names = ["ours", "trl packed", "trl padded", "ours with nothing fast", *IN_NF4]
    if importlib.util.find_spec("bitsandbytes") is None:
        names = names[: -len(IN_NF4)]
    assert main([*options, "--only", *names]) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.shared
class TestTiny:
    def test_every_contender_has_the_losses_of_trl(self, result):
        notes = result["runs"][0]["notes"]
        reference = notes["trl packed"][0]["losses"]
        assert len(reference) == 5
        for name in ("ours", "ours with nothing fast"):
            for found, expected in zip(notes[name][0]["losses"], reference, strict=True):
                assert abs(found / expected - 1) < 1e-4

    def test_over_4_bits_too(self, result):
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
        ours, trl = (result["runs"][0]["notes"][name][0]["losses"] for name in IN_NF4)
        assert ours == pytest.approx(trl, rel=1e-4)

    def test_tokens_are_counted_alike(self, result):
        run = result["runs"][0]
        seen = run["notes"]["trl packed"][0]
        assert seen["tokens"] == [step["tokens"] for step in run["useful_flops"]]
        assert seen["supervised"] == [step["supervised"] for step in run["useful_flops"]]
        assert seen["tokens"] != run["notes"]["trl padded"][0]["tokens"]

    def test_the_table_names_every_contender(self, result):
        shown = table.lines(result["runs"][0], 3)
        assert all(f"| {name} |" in shown for name in result["runs"][0]["notes"])


@pytest.mark.slow
@pytest.mark.shared
def test_one_that_fails_costs_the_others_nothing(tmp_path, shared, capsys):
    shared("data/alpaca_en_demo.json")
    fails = tmp_path / "peers" / "axolotl" / "bin" / "python"
    fails.parent.mkdir(parents=True)
    fails.write_text("#!/bin/sh\necho no memory left\nexit 9\n")
    fails.chmod(0o755)
    options = ["--folder", str(tmp_path / "speed"), "--json", str(tmp_path / "result.json")]
    options += ["--size", "tiny", "--steps", "4", "--dtype", "float32", "--allocator", "glibc"]
    asked = ["--only", "axolotl packed", "ours", "--peers", str(tmp_path / "peers")]
    assert main([*options, *asked]) == 1
    run = json.loads((tmp_path / "result.json").read_text())["runs"][0]
    assert run["failed"] == {"axolotl packed": 9}
    assert [len(notes["seconds"]) for notes in run["notes"]["ours"]] == [4, 4]
    shown = capsys.readouterr()
    assert "| ours |" in shown.out
    log = shown.err.split("axolotl packed: failed with 9, left out: ")[1].splitlines()[0]
    assert Path(log).read_text() == "no memory left\n"


def run_of(seconds: list[list[float]]) -> dict:
    """Two contenders, two rounds, four steps of 100 tokens."""
    steps = [{"tokens": 100, "supervised": 50, "flops": 1e9}] * 4
    note = {"memory_mib": {"peak": 700, "after_imports": 500}, "losses": [1.0] * 4}
    ours = [{**note, "seconds": s} for s in seconds]
    trl = [{**note, "seconds": [9, 2, 2, 2], "losses": [1.0, 1.0, 1.0, 1.001]}] * 2
    notes = {"ours": ours, "trl packed": trl}
    run = {"dtype": "float32", "allocator": "glibc", "gflops": [10.0, 30.0, 20.0]}
    return {**run, "useful_flops": steps, "notes": notes}


def test_a_step_counts_with_its_better_round_and_the_first_ones_not_at_all():
    shown = table.lines(run_of([[9, 1, 1, 3], [9, 3, 3, 1]]), 1)
    ours = next(line for line in shown.split("\n") if line.startswith("| ours |"))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[1:] == [
        *("2.000", "1.00–3.00", "100", "50", "2.00", "5 %", "200", "1.0e-03"),
    ]


def test_one_that_failed_is_named():
    run = run_of([[9, 1, 1, 3], [9, 3, 3, 1]]) | {"failed": {"axolotl packed": 9}}
    assert table.lines(run, 1).endswith("|\n\naxolotl packed: failed with 9")


def test_losses_of_other_weights_are_not_compared():
    run = run_of([[9, 1, 1, 3], [9, 3, 3, 1]])
    run["notes"] = {"ours in nf4": run["notes"]["ours"], "trl packed": run["notes"]["trl packed"]}
    assert "| 1.0e-03 |" not in table.lines(run, 1)
    run["notes"]["trl packed in nf4"] = run["notes"]["trl packed"]
    assert "| 1.0e-03 |" in table.lines(run, 1)


def test_losses_of_other_rows_are_not_compared():
    run = run_of([[9, 1, 1, 3], [9, 3, 3, 1]])
    for note in run["notes"]["ours"]:
        note["tokens"] = [90, 100, 100, 110]
    assert "| 1.0e-03 |" not in table.lines(run, 1)


def test_peers_that_are_not_there_are_left_out_aloud(tmp_path, capsys):
    there = tmp_path / "axolotl" / "bin" / "python"
    there.parent.mkdir(parents=True)
    there.touch()
    asked = ["ours", "axolotl padded", "litgpt padded", "torchtune packed"]
    assert those_at_hand(asked, tmp_path) == ["ours", "axolotl padded"]
    assert capsys.readouterr().err.endswith("left out: litgpt, torchtune\n")


def test_useful_flops_are_four_a_frozen_weight_and_six_a_trained_one():
    arch = PRESETS["llama3.2-1b"]
    counts = arch.num_parameters()
    config = RunConfig.model_validate(config_of(Path(), SIZES["tiny"], "float32", "count"))
    budget = replace(budget_of(config, arch), trainable=10)
    found = flops_of(budget, config, tokens=3, supervised=2)
    assert found == 3 * (4 * (counts.attention + counts.mlp) + 60) + 8 * counts.embedding


def test_a_matrix_product_has_a_rate():
    assert measured("float32", seconds=0.1) > 0.1
