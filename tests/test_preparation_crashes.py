"""Preparations that are killed, run side by side, or meet a disk that refuses."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data_cache import Job, chats, exit_code, left_over, published, start, write_lines

from finetune import artifact
from finetune.data import load_data
from finetune.llama.chat import FORMATS

NOBODY = 65_534


class Place:
    """Two files, a config on them, and a cache of its own."""

    def __init__(self, folder: Path, config_of, tokenizer) -> None:
        self.folder, self.cache, self._tokenizer = folder, folder / "cache", tokenizer
        train = write_lines(folder / "train.jsonl", chats(60))
        heldout = write_lines(folder / "heldout.jsonl", chats(70, start=60))
        self._config = config_of(train, f"data.heldout={heldout}")
        made = (Path(self._config.run.dir) / "config.yaml").read_text()
        config_file = folder / "job.yaml"
        config_file.write_text(
            made.replace(f"  train: {train}", f"  train: {train}\n  heldout: {heldout}")
        )
        self.job = Job(config_file, self.cache)

    def load(self):
        return load_data(self._config, self._tokenizer, FORMATS["nano"])

    def forget(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)

    def check_whole_or_nothing(self) -> None:
        found = [artifact.findings_of(folder) for folder in published(self.cache)]
        assert found in ([], [[]])


@pytest.fixture
def place(tmp_path, config_of, nano_tokenizer, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, config_of, nano_tokenizer)


@pytest.fixture
def expected(place):
    """The facts of the data, from a preparation that nothing disturbed."""
    facts = place.load().as_json()
    place.forget()
    return facts


# Every call that makes a byte durable or gives a name; each stands for the moments around it.
STEPS = {("os", "rename"): 1, ("finetune.artifact", "write_json"): 1, ("os", "fsync"): 4}


@pytest.mark.parametrize(("module", "name"), STEPS, ids=str)
def test_killed_at_any_step_of_publishing_it_is_whole_or_not_there(place, expected, module, name):
    for number in itertools.count(step=STEPS[module, name]):
        code = exit_code(start(replace(place.job, kill=(module, name, number))))
        assert code in (0, -signal.SIGKILL)
        place.check_whole_or_nothing()
        if code == 0:
            break
        assert place.load().as_json() == expected
        place.forget()
    assert number > 0, "it was killed at least once"


def test_killed_at_random_times_the_next_load_is_whole(place, expected):
    began = time.monotonic()
    assert exit_code(start(place.job)) == 0
    usual, chance, killed = time.monotonic() - began, random.Random(0), 0
    for _ in range(20):
        place.forget()
        process = start(place.job)
        time.sleep(chance.uniform(0.3, 1) * usual)
        process.kill()
        killed += exit_code(process) == -signal.SIGKILL
        place.check_whole_or_nothing()
        assert place.load().as_json() == expected
    assert killed >= 3


def test_a_half_written_folder_is_never_opened(place, expected):
    """What a killed process leaves has another name, even where all its files are there."""
    process = start(replace(place.job, kill=("os", "rename", 0)))
    assert exit_code(process) == -signal.SIGKILL
    (half,) = left_over(place.cache)
    assert (half / artifact.MANIFEST).exists() and not published(place.cache)
    for file in half.rglob("*.bin"):
        file.write_bytes(b"")
    assert place.load().as_json() == expected


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_prepare_the_same_data_at_once_all_succeed(place, expected, damaged):
    for _ in range(3):
        if damaged:
            place.load()
            (folder,) = published(place.cache)
            (folder / "train" / "ids.bin").write_bytes(b"torn")
        said = [place.folder / f"said{n}" for n in range(4)]
        job = replace(place.job, start=time.monotonic() + 1.0)
        processes = [start(replace(job, said=path)) for path in said]
        codes = [exit_code(process) for process in processes]
        assert codes == [0] * 4, [path.read_text() for path in said]
        assert len(published(place.cache)) == 1 and not left_over(place.cache)
        place.check_whole_or_nothing()
        assert place.load().as_json() == expected
        place.forget()


@pytest.mark.parametrize("max_bytes", [0, 1, 100, 1000, 4000])
def test_a_full_disk_leaves_nothing_and_says_so(place, expected, max_bytes):
    assert exit_code(start(replace(place.job, max_bytes=max_bytes))) == 4
    assert not published(place.cache) and not left_over(place.cache)
    assert place.load().as_json() == expected


@pytest.fixture
def open_place(config_of, nano_tokenizer, monkeypatch):
    """A folder that other users may enter; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        place = Place(folder, config_of, nano_tokenizer)
        (folder / "said").touch()
        yield place
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


def read_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_cache_that_can_only_be_read_is_used(open_place):
    """As one that a cluster shares: no row is read, and no note of a hash is written."""
    open_place.load()
    shutil.rmtree(open_place.cache / "hashes", ignore_errors=True)
    time.sleep(1.1)  # the files are settled: their hashes would be noted
    read_only(open_place.cache)
    said = open_place.folder / "said"
    job = replace(open_place.job, user=NOBODY, said=said, reads=False)
    assert exit_code(start(job)) == 0, said.read_text()
    assert not (open_place.cache / "hashes").exists()


def test_a_cache_that_cannot_be_written_is_said_in_a_sentence(open_place):
    open_place.cache.mkdir()
    read_only(open_place.cache)
    said = open_place.folder / "said"
    assert exit_code(start(replace(open_place.job, user=NOBODY, said=said))) == 4
    assert "could not be written" in said.read_text()


def test_a_cache_that_is_a_file_is_said_in_a_sentence(place):
    place.cache.write_text("")
    said = place.folder / "said"
    assert exit_code(start(replace(place.job, said=said))) == 4
    assert "could not be written" in said.read_text()
