"""The run folder: whose it is, what state it is in, which one is meant."""

from __future__ import annotations

import json
import os
import stat

import pytest
from small_runs import write_rows

from finetune.errors import CannotContinue, InputError
from finetune.run_folder import RunFolder, environment, find_run, open_run
from finetune.train import train


class TestOpening:
    def test_a_new_folder_begins_with_the_resolved_config(self, bench):
        loaded = bench.load("adapter.r=3")
        run = open_run(loaded)
        assert [path.name for path in run.path.iterdir()] == ["config.yaml"]
        assert run.config() == loaded.config
        text = run.config_file.read_text()
        assert "override" in text, "the origin of a value is said"
        assert (run.state(), run.is_finished) == ({}, False)

    def test_nobody_else_may_look_until_the_owner_says_so(self, bench):
        path = open_run(bench.load()).path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        path.chmod(0o755)
        open_run(bench.load())
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
        assert stat.S_IMODE(path.parent.stat().st_mode) & 0o700 == 0o700

    def test_the_same_config_opens_it_again(self, bench):
        path = open_run(bench.load()).path
        assert open_run(bench.load()).path == path
        assert open_run(bench.load("run.resume=never")).path == path

    def test_another_config_is_refused_and_every_key_named(self, bench):
        open_run(bench.load())
        with pytest.raises(InputError) as caught:
            open_run(bench.load("adapter.r=3", "data.packing=false", "run.seed=4"))
        keys = [finding.split(":")[0] for finding in caught.value.findings[1:]]
        assert keys == ["adapter.r", "data.packing", "run.seed"]

    def test_a_corrected_config_may_have_the_folder_of_a_refused_start(self, bench):
        with pytest.raises(InputError, match="no such file"):
            train(bench.load("data.train=missing.jsonl"))
        assert bench.run_folder().state()["exit_code"] == 2
        bench.train("train.max_steps=1")
        assert bench.run_folder().is_finished
        assert bench.run_folder().config() == bench.load("train.max_steps=1").config

    def test_random_weights_of_a_refused_start_are_not_taken_over(self, bench):
        shape = "{dim: 32, n_layers: 1, n_heads: 2, vocab_size: 1024, context: 256}"
        random = (
            *("base.path=null", f"base.architecture={shape}", "train.max_steps=1"),
            f"base.tokenizer={bench.base}",
        )
        write_rows(bench.folder / "bad.jsonl", [{"column": 1}])
        with pytest.raises(InputError, match="bad.jsonl"):
            train(bench.load(*random, f"data.train={bench.folder / 'bad.jsonl'}"))
        run = bench.run_folder()
        before = (run.path / "base" / "model.safetensors").read_bytes()
        bench.train(*random, "run.seed=1")
        assert (run.path / "base" / "model.safetensors").read_bytes() != before

    def test_a_failed_run_with_checkpoints_is_kept_from_another_config(self, bench):
        run = bench.train("train.max_steps=1")
        run.write_state(state="failed", exit_code=2, reason="a held-out file went away")
        with pytest.raises(InputError, match="holds a run of another config"):
            open_run(bench.load("train.max_steps=2"))

    def test_a_folder_that_cannot_be_written_says_so(self, bench):
        (bench.folder / "runs").write_text("a file where a folder should be")
        with pytest.raises((InputError, CannotContinue, OSError)):
            train(bench.load())


class TestFinding:
    @pytest.fixture
    def runs(self, tmp_path):
        """Three runs; the oldest by name is the newest by time; one has an adapter."""
        for age, name in enumerate(["a", "b", "c"]):
            folder = tmp_path / "runs" / name
            folder.mkdir(parents=True)
            (folder / "config.yaml").touch()
            os.utime(folder / "config.yaml", (1e9 - age, 1e9 - age))
        (tmp_path / "runs" / "b" / "adapter").mkdir()
        (tmp_path / "runs" / "notes.txt").touch()
        return tmp_path / "runs"

    def test_the_newest_is_taken_and_named_aloud(self, runs, capsys):
        assert find_run(None, runs).path == runs / "a"
        assert f"{runs / 'a'} (the newest)" in capsys.readouterr().err

    def test_the_newest_of_those_that_have_what_is_needed(self, runs):
        assert find_run(None, runs, need="adapter").path == runs / "b"

    @pytest.mark.parametrize("name", ["missing", "runs/c"])
    def test_a_named_one_without_it_is_refused(self, runs, name):
        with pytest.raises(InputError, match="adapter"):
            find_run(str(runs.parent / name), need="adapter")

    def test_without_any_run(self, tmp_path):
        with pytest.raises(InputError, match="train first"):
            find_run(None, tmp_path / "runs")

    def test_a_named_one(self, runs):
        assert find_run(str(runs / "c")).path == runs / "c"


def test_a_state_is_replaced_whole(tmp_path):
    run = RunFolder(tmp_path)
    run.write_state(state="running", exit_code=None, reason=None)
    run.write_state(state="failed", exit_code=4, reason="disk")
    assert run.state() == {"state": "failed", "exit_code": 4, "reason": "disk"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_environment_names_no_person_host_or_path():
    text = json.dumps(environment())
    for secret in (os.uname().nodename, os.path.expanduser("~"), os.environ.get("USER", "\0")):
        assert len(secret) < 3 or secret not in text
    assert environment()["packages"]["torch"]
