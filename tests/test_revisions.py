"""A run stays at the commit of the hub that it began with, and at the bytes that the hub has.

The hub's cache is made here as huggingface_hub and `datasets` lay it out; there is no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import datasets
import huggingface_hub
import pytest
from small_runs import Bench, embedded_rows, flip_bit, write_base

from finetune import artifact, hub
from finetune.__main__ import main
from finetune.config.base import is_commit
from finetune.errors import CheckFailed
from finetune.hub import download, download_dataset

FIRST, SECOND = "a1" * 20, "b2" * 20


def push(cache, folder, commit):
    """A commit of owner/base, to which `main` then points."""
    repo = cache / "models--owner--base"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / part).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        name = artifact.sha256_of(file) if file.suffix == ".safetensors" else git
        (repo / "blobs" / name).write_bytes(content)
        (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{name}")
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, small_base, monkeypatch):
    """The hub's cache with one commit of owner/base."""
    monkeypatch.setattr(hub, "OFFLINE_BY_CHOICE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    push(tmp_path / "hub", small_base, FIRST)
    return tmp_path / "hub"


@pytest.fixture
def other(tmp_path):
    return write_base(tmp_path / "other", seed=5)


@pytest.fixture
def bench(cache, tmp_path):
    """A config that names owner/base, without a revision."""
    (tmp_path / "bench").mkdir()
    return Bench(tmp_path / "bench", "owner/base")


@pytest.fixture
def ended(capsys):
    def end(code, *argv):
        found = main([str(word) for word in argv])
        said = capsys.readouterr().err
        assert found == code, said
        return said

    return end


def interrupted(run):
    """As if it had been stopped after its last checkpoint."""
    shutil.rmtree(run.adapter)
    run.write_state(state="interrupted", exit_code=75, reason="")


class TestBase:
    def test_a_branch_is_warned_of_with_the_commit_to_write(self, bench, ended):
        said = ended(0, "train", bench.config_file)
        assert "warning: base.revision is the branch main, which may become another" in said
        assert f"this run stays at {FIRST}" in said
        pinned = ended(0, "train", bench.config_file, f"base.revision={FIRST}", "run.name=pinned")
        assert "warning: base.revision" not in pinned

    def test_a_run_goes_on_from_its_commit_when_the_branch_has_moved(
        self, bench, ended, cache, other
    ):
        ended(0, "train", bench.config_file, "train.save_steps=2")
        run = bench.run_folder()
        before = ended(0, "eval", run.path, "--against", "base")
        interrupted(run)
        push(cache, other, SECOND)
        assert download("owner/base", None).name == SECOND
        said = ended(0, "train", bench.config_file, "train.save_steps=2")
        assert "resume   from" in said and f"stays at {FIRST}" in said
        known = artifact.read_json(run.environment_file)
        assert (known["base_hub_id"], known["base_revision"]) == ("owner/base", FIRST)
        ended(0, "merge", run.path)
        assert ended(0, "eval", run.path, "--against", "base")[-200:] == before[-200:]

    def test_a_new_run_takes_the_new_commit(self, bench, ended, cache, other):
        ended(0, "train", bench.config_file)
        push(cache, other, SECOND)
        assert f"stays at {SECOND}" in ended(0, "train", bench.config_file, "run.name=new")

    def test_its_own_commit_may_be_written_into_the_config_later(self, bench, ended):
        ended(0, "train", bench.config_file, "train.save_steps=2")
        interrupted(bench.run_folder())
        settings = ("train.save_steps=2", f"base.revision={FIRST}")
        assert "warning: base" not in ended(0, "train", bench.config_file, *settings)

    def test_another_commit_is_refused(self, bench, ended, cache, other):
        settings = ("train.save_steps=2", f"base.revision={FIRST}")
        ended(0, "train", bench.config_file, *settings)
        run = bench.run_folder()
        interrupted(run)
        push(cache, other, SECOND)
        said = ended(2, "train", bench.config_file, settings[0], f"base.revision={SECOND}")
        assert "holds a run of another config" in said
        text = run.config_file.read_text()  # somebody edited the run's own as well
        run.config_file.write_text(text.replace(FIRST, SECOND))
        said = ended(3, "train", bench.config_file, settings[0], f"base.revision={SECOND}")
        assert f"began with commit {FIRST} of owner/base; base.revision is now {SECOND}" in said

    def test_a_start_that_was_refused_holds_no_commit(self, bench, ended, cache, other):
        ended(2, "train", bench.config_file, "data.max_length=8")
        push(cache, other, SECOND)
        assert f"stays at {SECOND}" in ended(0, "train", bench.config_file)

    @pytest.mark.parametrize("value", ["../../../etc", "main", 3, None, ["x"]])
    def test_a_recorded_name_that_is_no_commit_is_not_followed(self, bench, value):
        run = bench.run_folder()
        run.path.mkdir(parents=True)
        facts = {"base_hub_id": "owner/base", "base_revision": value}
        artifact.write_json(run.environment_file, facts)
        assert run.recorded_commit("owner/base") is None


class TestBytes:
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_a_changed_byte_in_the_cache_is_refused(self, bench, ended, cache, name):
        snapshot = cache / "models--owner--base" / "snapshots" / FIRST
        assert download("owner/base", None) == snapshot
        flip_bit((snapshot / name).resolve())
        said = ended(3, "train", bench.config_file)
        assert f"{name}: its content is not what the hub has under its hash" in said
        assert f"delete {(snapshot / name).resolve()}" in said

    def test_so_is_one_that_shows_in_no_time_of_change(self, cache):
        blob = (download("owner/base", None) / "config.json").resolve()
        stat = blob.stat()
        flip_bit(blob)
        os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(CheckFailed, match=r"config\.json: its content"):
            download("owner/base", FIRST)

    def test_names_that_are_no_hashes_are_left(self, cache):
        snapshot = download("owner/base", None)
        (cache / "models--owner--base" / "blobs" / "etag-of-a-mirror").write_text("x")
        (snapshot / "more.json").symlink_to("../../blobs/etag-of-a-mirror")
        assert download("owner/base", None) == snapshot


class TestRows:
    @pytest.fixture
    def rows(self, tmp_path, monkeypatch):
        """`rows(commit, start)`: the cache of `datasets` after it read that commit."""
        monkeypatch.setattr(hub, "OFFLINE_BY_CHOICE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)

        def push_rows(commit, start=0):
            made = datasets.Dataset.from_list(embedded_rows("train", 24, start))
            folder = tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / commit
            made.save_to_disk(str(tmp_path / "saved"))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            shutil.move(next((tmp_path / "saved").glob("*.arrow")), folder / "name-train.arrow")
            info = {
                "builder_name": "json",
                "config_name": "default",
                "dataset_name": "name",
                "features": made.features.to_dict(),
                "splits": {"train": {"name": "train", "num_examples": len(made), "num_bytes": 1}},
                "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
            }
            (folder / "dataset_info.json").write_text(json.dumps(info))
            shutil.rmtree(tmp_path / "saved")

        return push_rows

    def test_the_commit_is_in_the_name_of_what_is_kept(self, rows, tmp_path):
        rows(FIRST)
        file = download_dataset("owner/name", "train", None, tmp_path / "kept")
        assert hub.commits_of([str(file)]) == {hub.kept_name("owner/name", "train"): FIRST}

    def test_another_commit_than_the_one_asked_for_is_refused(self, rows, tmp_path):
        """`datasets` takes the latest that it has, in silence."""
        rows(SECOND)
        assert download_dataset("owner/name", "train", SECOND, tmp_path / "kept").is_file()
        with pytest.raises(CheckFailed, match=f"commit {FIRST} was asked for, {SECOND} was read"):
            download_dataset("owner/name", "train", FIRST, tmp_path / "kept")

    def test_a_run_stays_at_its_commit(self, rows, tmp_path, small_base, ended):
        rows(FIRST)
        (tmp_path / "bench").mkdir()
        bench = Bench(tmp_path / "bench", small_base)
        source = "data.train={path: hf://datasets/owner/name, split: train}"
        said = ended(0, "train", bench.config_file, source, "train.save_steps=2")
        assert "hf://datasets/owner/name is the branch main, which may become another" in said
        assert f"stays at {FIRST}" in said
        interrupted(bench.run_folder())
        shutil.rmtree(tmp_path / "datasets")
        rows(SECOND, start=5)
        said = ended(3, "train", bench.config_file, source, "train.save_steps=2")
        assert f"commit {FIRST} was asked for, {SECOND} was read" in said
        rows(FIRST)
        shutil.rmtree(tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / SECOND)
        ended(0, "train", bench.config_file, source, "train.save_steps=2")


def test_what_a_commit_is():
    assert is_commit(FIRST)
    assert not any(
        map(is_commit, ("main", None, FIRST[1:], FIRST + "1", FIRST.upper(), FIRST + "\n"))
    )
