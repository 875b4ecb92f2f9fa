"""Prepared once for each content and settings, whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import time
from pathlib import Path

import pytest
from data_cache import chat, chats, left_over, published, write_lines

from finetune import artifact, data_cache, preparation
from finetune.data import RunData, load_data
from finetune.errors import InputError
from finetune.llama.chat import FORMATS
from finetune.rendering import Renderer

NANO = FORMATS["nano"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def loaded(cache, config_of, nano_tokenizer):
    """`loaded(file, "data.max_length=64")`: the run's data."""

    def load(path: Path, *overrides: str, chat_format=NANO, tokenizer=nano_tokenizer) -> RunData:
        return load_data(config_of(path, *overrides), tokenizer, chat_format)

    return load


@pytest.fixture
def work(monkeypatch):
    """How many files were opened and how many blocks rendered since the test began."""
    done = {"files": 0, "blocks": 0}
    read, render = preparation.read_examples, Renderer.__call__

    def counting_read(*args, **kwargs):
        done["files"] += 1
        return read(*args, **kwargs)

    def counting_render(self, block):
        done["blocks"] += 1
        return render(self, block)

    monkeypatch.setattr(preparation, "read_examples", counting_read)
    monkeypatch.setattr(Renderer, "__call__", counting_render)
    return done


def test_a_second_load_reads_no_row_again(loaded, work, cache, tmp_path):
    train = write_lines(tmp_path / "a.jsonl", chats(30))
    heldout = write_lines(tmp_path / "b.jsonl", chats(35, start=30))
    first = loaded(train, f"data.heldout={heldout}")
    assert work == {"files": 2, "blocks": 2}
    again = loaded(train, f"data.heldout={heldout}")
    assert work == {"files": 2, "blocks": 2}
    assert again.as_json() == first.as_json()
    assert (again.train[:], again.heldout[:]) == (first.train[:], first.heldout[:])
    assert len(published(cache)) == 1 and not left_over(cache)


def settings_of(tmp_path: Path, nano_tokenizer) -> dict[str, tuple[tuple[str, ...], dict]]:
    other = copy.deepcopy(nano_tokenizer)
    other.add_tokens(["<|another|>"], special_tokens=True)
    heldout = write_lines(tmp_path / "heldout.jsonl", chats(45, start=40))
    train = tmp_path / "train.jsonl"
    as_source = f"data.train={{path: {train}, format: messages}}"
    renamed = f"data.train={{path: {train}, columns: {{messages: messages}}}}"
    return {
        "max_length": (("data.max_length=64",), {}),
        "train_on": (("data.train_on=last",), {}),
        "on_overflow": (("data.on_overflow=truncate_history",), {}),
        "heldout_fraction": (("data.heldout_fraction=0.3",), {}),
        "another fraction": (("data.heldout_fraction=0.4",), {}),
        "heldout": ((f"data.heldout={heldout}",), {}),
        "a file twice": ((f"data.train=[{train}, {train}]",), {}),
        "format of the source": ((as_source,), {}),
        "columns": ((renamed,), {}),
        "chat format": ((), {"chat_format": dataclasses.replace(NANO, name="other")}),
        "date": ((), {"chat_format": dataclasses.replace(NANO, date_string="1 May 2025")}),
        "tokenizer": ((), {"tokenizer": other}),
    }


def test_all_that_decides_the_documents_names_the_folder(loaded, cache, tmp_path, nano_tokenizer):
    train = write_lines(tmp_path / "train.jsonl", chats(40))
    loaded(train)
    for number, (name, (overrides, values)) in enumerate(
        settings_of(tmp_path, nano_tokenizer).items(), start=2
    ):
        loaded(train, *overrides, **values)
        assert len(published(cache)) == number, name
    write_lines(train, [*chats(39), chat("How many are 39 and 39?", "79 of them")])
    assert loaded(train).train[39].example.messages[1]["content"] == "79 of them"
    assert len(published(cache)) == number + 1


@pytest.mark.parametrize(
    "override",
    ["data.packing=false", "data.on_overlap=drop", "run.seed=5", "train.learning_rate=0.5"],
)
def test_what_comes_after_the_documents_does_not(loaded, work, cache, tmp_path, override):
    train = write_lines(tmp_path / "train.jsonl", chats(20))
    heldout = f"data.heldout={write_lines(tmp_path / 'heldout.jsonl', chats(25, start=20))}"
    before = loaded(train, heldout)
    after = loaded(train, heldout, override)
    assert len(published(cache)) == 1 and work["files"] == 2
    assert after.documents_sha256 == before.documents_sha256


def test_weights_do_not(loaded, work, cache, tmp_path):
    files = [write_lines(tmp_path / f"{n}.jsonl", chats(9 * n + 9, start=9 * n)) for n in (0, 1)]
    weighted = ", ".join(f"{{path: {f}, weight: {n + 1}}}" for n, f in enumerate(files))
    assert loaded(files[0], f"data.train=[{files[0]}, {files[1]}]").mixture is None
    assert loaded(files[0], f"data.train=[{weighted}]").mixture is not None
    assert len(published(cache)) == 1 and work["files"] == 2


def edited(path: Path, keep_time: bool) -> None:
    """The same number of bytes in the same inode."""
    before, stat = path.read_bytes(), path.stat()
    with path.open("r+b") as file:
        file.write(before.replace(b"of them", b"of many"))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_ino) == (stat.st_size, stat.st_ino)
    assert (after.st_mtime_ns == stat.st_mtime_ns) == keep_time


@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("seconds", [0, 1.2])
def test_an_edit_in_place_is_noticed(loaded, tmp_path, keep_time, seconds):
    """At once, and of a file whose hash is remembered; with its time put back, as `rsync -t`."""
    train = write_lines(tmp_path / "train.jsonl", chats(5))
    time.sleep(seconds)
    assert loaded(train).train[0].example.messages[1]["content"] == "0 of them"
    edited(train, keep_time)
    assert loaded(train).train[0].example.messages[1]["content"] == "0 of many"


def test_a_hash_is_remembered_once_the_file_is_settled(cache, tmp_path, monkeypatch):
    file = write_lines(tmp_path / "train.jsonl", chats(5))
    expected, num_hashed = artifact.sha256_of(file), []
    real = artifact.sha256_of
    monkeypatch.setattr(artifact, "sha256_of", lambda p: num_hashed.append(p) or real(p))
    assert {preparation.remembered_sha256(file) for _ in range(3)} == {expected}
    assert len(num_hashed) == 3, "changed within the last second"
    time.sleep(1.1)
    assert {preparation.remembered_sha256(file) for _ in range(3)} == {expected}
    assert len(num_hashed) == 4
    (note,) = (cache / "hashes").iterdir()
    for content in ("", "[]", "{}", "{\x00"):
        note.write_text(content)
        assert preparation.remembered_sha256(file) == expected, "a note that says nothing"
    note.unlink()
    (note / "in its place").mkdir(parents=True)
    assert preparation.remembered_sha256(file) == expected, "a note that cannot be written"


def test_a_file_that_changes_while_it_is_read_is_refused(loaded, cache, tmp_path, monkeypatch):
    """Or its rows would be kept under the hash of other ones, for every later run."""
    train, render = write_lines(tmp_path / "train.jsonl", chats(5)), Renderer.__call__

    def render_and_edit(self, block):
        edited(train, keep_time=False)
        return render(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(Renderer, "__call__", render_and_edit)
        with pytest.raises(InputError, match=r"train\.jsonl: changed while it was read"):
            loaded(train)
    assert not published(cache) and not left_over(cache)
    assert loaded(train).train[0].example.messages[1]["content"] == "0 of many"


FILES = sorted(data_cache._FILES | {artifact.MANIFEST})


def damages(path: Path) -> dict[str, bytes | None]:
    """Other contents of a file; None is no file."""
    content, chance = path.read_bytes(), random.Random(path.name)
    place = chance.randrange(len(content)) if content else 0
    flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    return {
        "cut off": content[: len(content) // 2],
        "a flipped bit": flipped,
        "missing": None,
    }


def test_a_damaged_folder_is_prepared_again_aloud(loaded, cache, tmp_path, capsys):
    """Also where a damage leaves the file's time as it was."""
    train = write_lines(tmp_path / "train.jsonl", chats(10))
    heldout = f"data.heldout={write_lines(tmp_path / 'heldout.jsonl', chats(15, start=10))}"
    expected = loaded(train, heldout)
    documents = (expected.train[:], expected.heldout[:])
    (folder,) = published(cache)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} == set(FILES)
    for name in FILES:
        for keep_time, (what, content) in enumerate(damages(folder / name).items()):
            stat = (folder / name).stat()
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
            if keep_time and content is not None:
                os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            capsys.readouterr()
            again = loaded(train, heldout)
            assert (again.train[:], again.heldout[:]) == documents, (name, what)
            assert again.as_json() == expected.as_json()
            assert "is damaged; prepared again" in capsys.readouterr().err, (name, what)
            assert published(cache) == [folder] and not left_over(cache)
            assert artifact.findings_of(folder) == []
    loaded(train, heldout)
    assert "damaged" not in capsys.readouterr().err


def forged(folder: Path, how: str) -> None:
    """A manifest that agrees with itself."""
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    files, facts = manifest["files"], manifest["facts"]
    if how == "lists less":
        del files["train/ids.bin"]
        (folder / "train" / "ids.bin").write_bytes(bytes((folder / "train/ids.bin").stat().st_size))
    elif how == "lists nothing":
        files.clear()
    elif how == "an entry that is none":
        files["train/ids.bin"] = 5
    elif how == "an entry without a hash":
        files["train/ids.bin"] = {"bytes": files["train/ids.bin"]["bytes"]}
    elif how == "of other rows":
        facts["files"][0]["sha256"] = "0" * 64
    elif how == "another kind":
        facts["kind"] = "checkpoint"
    manifest["sha256"] = artifact._own_hash(manifest)
    artifact.write_json(folder / artifact.MANIFEST, manifest)


@pytest.mark.parametrize(
    "how",
    [
        *("lists less", "lists nothing", "an entry that is none", "an entry without a hash"),
        *("of other rows", "another kind"),
    ],
)
def test_a_forged_manifest_is_not_believed(loaded, cache, tmp_path, capsys, how):
    train = write_lines(tmp_path / "train.jsonl", chats(10))
    expected = loaded(train).train[:]
    (folder,) = published(cache)
    forged(folder, how)
    assert loaded(train).train[:] == expected
    assert "prepared again" in capsys.readouterr().err
    assert artifact.findings_of(folder) == []


def test_findings_of_several_files_come_together_and_are_all_counted(loaded, cache, tmp_path):
    broken = ["{", json.dumps({"messages": 5}), json.dumps(chat("a", "b")).replace("user", "me")]
    misplaced = {"messages": [{"role": "assistant", "content": "b"}]}
    overlong = chat("word " * 80, "long")
    first = write_lines(tmp_path / "a.jsonl", [*chats(3), *broken, *[misplaced] * 9])
    second = write_lines(tmp_path / "b.jsonl", [chat("x", "y"), *[overlong] * 11, *broken * 4])
    text = write_lines(tmp_path / "c.jsonl", [{"text": "plain"}])
    sources = f"data.train=[{tmp_path}/none.jsonl, {first}, {second}, {text}]"
    with pytest.raises(InputError) as caught:
        loaded(first, sources, "data.max_length=64", "data.on_overflow=error")
    findings = caught.value.findings
    total = 1 + (3 + 9) + (11 + 12) + 1
    assert findings[-1] == f"and {total - 20} more rows"
    places = [finding.split(": ")[0] for finding in findings[:13]]
    assert places[0] == f"{tmp_path}/none.jsonl"
    # Both what cannot be read and what cannot be rendered; the one may come before the other.
    assert sorted(places[1:]) == sorted(f"{first}:{line}" for line in range(4, 16))
    assert not published(cache) and not left_over(cache)
