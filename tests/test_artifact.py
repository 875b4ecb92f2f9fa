"""Folders are published whole or not at all, and any damage afterwards is found."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import artifact
from finetune.artifact import findings_of, read_json, staged, sweep, verify, write_json
from finetune.errors import CannotContinue, CheckFailed, InputError

FILES = {
    "a.json": b'{"x": 1}\n',
    "weights.safetensors": bytes(range(256)) * 20,
    "empty": b"",
    "deep/er/n\xc3\xa4me.txt".encode("latin-1").decode(): b"text",
}
FACTS = {"step": 100, "loss": 0.1, "base": "döner/kebab", "shape": [1, 2]}


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def published(tmp_path) -> Path:
    with staged(tmp_path / "final", FACTS) as stage:
        fill(stage)
    return tmp_path / "final"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_a_folder_is_published_with_every_byte_and_its_hash(published):
    manifest = verify(published)
    assert contents(published).keys() == {*FILES, "manifest.json"}
    for name, content in FILES.items():
        assert (published / name).read_bytes() == content
        sha256 = hashlib.sha256(content).hexdigest()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": sha256}
    assert manifest["files"].keys() == FILES.keys()
    assert manifest["facts"] == FACTS
    assert findings_of(published) == []
    assert [p.name for p in published.parent.iterdir()] == ["final"]


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, SystemExit, CheckFailed, MemoryError]
)
def test_nothing_is_published_when_the_block_raises(tmp_path, error):
    def interrupted() -> None:
        with staged(tmp_path / "final") as stage:
            fill(stage)
            raise error("stopped")

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_refuses_cannot_continue(tmp_path):
    def refused() -> None:
        with staged(tmp_path / "final") as stage:
            fill(stage)
            raise OSError(28, "No space left on device")

    with pytest.raises(CannotContinue, match="No space left on device; nothing published"):
        refused()
    assert list(tmp_path.iterdir()) == []


def test_the_final_name_is_not_there_before_the_end(tmp_path):
    with staged(tmp_path / "final") as stage:
        fill(stage)
        assert not (tmp_path / "final").exists()
        assert stage.parent == tmp_path
        assert stage.name.startswith(".final.tmp-")
    assert (tmp_path / "final").is_dir()


def kinds_of_target(folder: Path) -> list[Path]:
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "old").write_text("old")
    (folder / "file").write_text("old")
    (folder / "link").symlink_to(folder / "nowhere")
    return [folder / name for name in ("empty", "full", "file", "link")]


def test_a_target_that_exists_is_refused_and_left_alone(tmp_path):
    for target in kinds_of_target(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="exists already"), staged(target):
            pytest.fail("the block was entered")
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "old").read_text() == "old"


def test_of_two_at_once_the_second_publishes_nothing(tmp_path):
    def late() -> None:
        with staged(tmp_path / "final") as stage:
            fill(stage)
            with staged(tmp_path / "final") as other:
                (other / "winner").write_text("first")

    with pytest.raises(CannotContinue, match="nothing published"):
        late()
    assert contents(tmp_path / "final").keys() == {"winner", "manifest.json"}
    assert verify(tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


KILLED = """\
import os, pathlib, signal, sys
from finetune.artifact import staged
with staged(pathlib.Path(sys.argv[1])) as stage:
    (stage / "half").write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""
WRITERS = {
    "python": 'lambda stage: (stage / "weights").write_bytes(bytes(100_000))',
    # These are written in Rust; what they raise is no OSError.
    "safetensors": """lambda stage: __import__("safetensors.numpy").numpy.save_file(
        {"a": __import__("numpy").zeros(10_000)}, stage / "weights")""",
    "tokenizers": """lambda stage: __import__("tokenizers").Tokenizer(
        __import__("tokenizers").models.BPE({chr(n): n for n in range(9_000)}, [])
    ).save(str(stage / "tokenizer.json"))""",
}
TOO_LARGE = """\
import pathlib, resource, sys
from finetune.artifact import staged
from finetune.errors import CannotContinue
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with staged(pathlib.Path(sys.argv[1])) as stage:
        WRITE(stage)
except CannotContinue as error:
    print(error)
    sys.exit(4)
"""


def in_a_process(program: str, target: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", program, str(target)],
        cwd=root, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_killed_process_leaves_nothing_that_is_taken_for_the_folder(tmp_path):
    done = in_a_process(KILLED, tmp_path / "final")
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".final.tmp-")
    assert sweep(tmp_path) == [left.name]
    with staged(tmp_path / "final") as stage:
        fill(stage)
    assert verify(tmp_path / "final")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_the_system_refuses_publishes_nothing(tmp_path, writer):
    done = in_a_process(TOO_LARGE.replace("WRITE", f"({WRITERS[writer]})"), tmp_path / "final")
    assert done.returncode == 4, done.stderr
    assert "could not be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """The order of the calls: files and folders are flushed, then renamed, then the parent."""
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        log.append("RENAME")
        rename(source, target)

    monkeypatch.setattr(artifact.os, "fsync", noted_fsync)
    monkeypatch.setattr(artifact.os, "rename", noted_rename)
    with staged(tmp_path / "final") as stage:
        fill(stage)
    before, after = log[: log.index("RENAME")], log[log.index("RENAME") + 1 :]
    names = {Path(name).name for name in FILES} | {"deep", "er", stage.name}
    assert names <= set(before)
    assert any(name.startswith(".manifest.json.tmp-") for name in before)
    assert after == [tmp_path.name]


def test_every_flipped_bit_is_found(published):
    chance = random.Random(0)
    for name, content in contents(published).items():
        places = (
            range(len(content)) if len(content) < 600 else chance.sample(range(len(content)), 300)
        )
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << chance.randrange(8)
            (published / name).write_bytes(damaged)
            assert findings_of(published), f"{name}, byte {place}"
        (published / name).write_bytes(content)
    assert findings_of(published) == []


def test_every_truncation_is_found(published):
    for name, content in contents(published).items():
        for length in {0, 1, len(content) // 2, len(content) - 1} & set(range(len(content))):
            (published / name).write_bytes(content[:length])
            findings = findings_of(published)
            assert findings and name in findings[0]
        (published / name).write_bytes(content)
    assert findings_of(published) == []


def test_missing_renamed_and_swapped_files_are_found(published):
    for name in (*FILES, "manifest.json"):
        (published / name).rename(published / "away")
        findings = findings_of(published)
        assert any(name in finding for finding in findings)
        if name != "manifest.json":
            assert f"{published / 'away'}: is not in the manifest" in findings
        (published / "away").rename(published / name)
    assert findings_of(published) == []


@pytest.mark.parametrize("name", ["more.safetensors", ".hidden", "deep/pickle.pkl", "new/x"])
def test_files_that_came_later_are_found(published, name):
    (published / name).parent.mkdir(exist_ok=True)
    (published / name).write_bytes(b"")
    assert findings_of(published) == [f"{published / name}: is not in the manifest"]
    with pytest.raises(CheckFailed, match="is not in the manifest"):
        verify(published)


def test_links_that_came_later_are_found(published, tmp_path):
    (published / "nowhere").symlink_to(tmp_path / "none")
    (published / "folder").symlink_to(tmp_path)
    assert findings_of(published) == [
        f"{published / 'folder'}: is not in the manifest",
        f"{published / 'nowhere'}: is not in the manifest",
    ]


def test_two_equal_sized_files_that_changed_places_are_found(tmp_path):
    with staged(tmp_path / "final") as stage:
        (stage / "one").write_bytes(b"aaaa")
        (stage / "two").write_bytes(b"bbbb")
    (tmp_path / "final" / "one").write_bytes(b"bbbb")
    (tmp_path / "final" / "two").write_bytes(b"aaaa")
    assert len(findings_of(tmp_path / "final")) == 2


def test_every_damage_is_named_together(published):
    (published / "a.json").unlink()
    (published / "empty").write_bytes(b"!")
    (published / "weights.safetensors").write_bytes(bytes(256 * 20))
    with pytest.raises(CheckFailed) as caught:
        verify(published)
    assert str(caught.value).split("\n") == [
        f"{published}/a.json: missing",
        f"{published}/empty: 1 bytes, the manifest says 0",
        f"{published}/weights.safetensors: its content differs from what was published (sha256)",
    ]
    assert caught.value.exit_code == 3


def forge(folder: Path, files: object, facts: object = None) -> None:
    """A manifest that is right in itself: as someone would write it who means harm."""
    manifest = {"facts": {} if facts is None else facts, "files": files}
    sha256 = artifact.sha256_of_json(manifest)
    write_json(folder / "manifest.json", {**manifest, "sha256": sha256})


@pytest.mark.parametrize("name", ["../secret", "deep/../../secret", "deep/../a.json", "ABSOLUTE"])
def test_a_manifest_may_not_point_outside(published, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes(b"key")
    entry = {"bytes": 3, "sha256": hashlib.sha256(b"key").hexdigest()}
    files = verify(published)["files"]
    forge(published, files)
    assert findings_of(published) == []
    forge(published, {**files, str(secret) if name == "ABSOLUTE" else name: entry})
    (finding,) = findings_of(published)
    assert finding.endswith("a manifest may not point outside its folder")


@pytest.mark.parametrize(
    "entry", [{}, None, "x", 3, {"bytes": 8}, {"sha256": "0"}, {"bytes": 8, "sha256": "0", "x": 1}]
)
def test_a_manifest_that_says_too_little_is_found(published, entry):
    forge(published, {**verify(published)["files"], "a.json": entry})
    assert findings_of(published) == [
        f"{published}/a.json: the manifest does not say what it holds"
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "{}", "[" * 100_000),
        *('{"files": {}}', '{"facts": {}, "files": {}}'),
        *('{"facts": {}, "files": [], "sha256": "0"}', '{"facts": {}, "files": {}, "sha256": "0"}'),
    ],
)
def test_other_files_are_no_manifest(published, text):
    (published / "manifest.json").write_text(text)
    (finding,) = findings_of(published)
    assert finding.startswith(f"{published}/manifest.json: ")
    with pytest.raises(CheckFailed, match="manifest"):
        verify(published)


def test_a_folder_without_a_manifest_does_not_verify(tmp_path):
    with pytest.raises(CheckFailed, match="no readable manifest"):
        verify(tmp_path)


def test_a_copy_verifies_wherever_it_lies(published, tmp_path):
    shutil.copytree(published, tmp_path / "copy")
    assert verify(tmp_path / "copy") == verify(published)


def test_what_is_removed_has_no_name_first(published, monkeypatch):
    seen = []
    real = shutil.rmtree
    monkeypatch.setattr(
        artifact.shutil, "rmtree", lambda p, **k: (seen.append(published.exists()), real(p, **k))
    )
    artifact.remove(published)
    assert seen == [False]
    assert list(published.parent.iterdir()) == []


def test_sweeping_leaves_everything_else(published):
    folder = published.parent
    (folder / ".cache").mkdir()
    (folder / "x.tmp-1").write_text("a user's own")
    (folder / ".run.json.tmp-1234").write_text("{")
    (folder / ".final.tmp-trash-1").mkdir()
    assert sweep(folder) == [".final.tmp-trash-1", ".run.json.tmp-1234"]
    assert sorted(p.name for p in folder.iterdir()) == [".cache", "final", "x.tmp-1"]
    assert sweep(folder / "none") == []


@pytest.mark.parametrize("change", [b" ", b"\r\n", b"\n"])
def test_a_manifest_of_the_same_meaning_in_other_bytes_is_found(published, change):
    path = published / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\n", change, 1) if change != b"\n" else content + change)
    (finding,) = findings_of(published)
    assert "its content differs from what was published" in finding


def test_json_files_are_replaced_whole(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"state": "running", "name": "näh"})
    assert read_json(path) == {"state": "running", "name": "näh"}
    with pytest.raises(TypeError):
        write_json(path, {"state": object()})
    assert read_json(path)["state"] == "running"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("content", "says"), [(b"{", "not readable as JSON"), (b"\xff", "not readable")]
)
def test_json_files_that_cannot_be_read_are_refused(tmp_path, content, says):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "y.json")


def test_the_hash_of_a_value_is_that_of_its_canonical_text():
    value = {"b": [1, 2.5, None], "a": "é"}
    text = '{"a":"é","b":[1,2.5,null]}'
    assert artifact.sha256_of_json(value) == hashlib.sha256(text.encode()).hexdigest()
    assert artifact.sha256_of_json(dict(reversed(value.items()))) == artifact.sha256_of_json(value)
    assert artifact.sha256_of_json({**value, "a": "e"}) != artifact.sha256_of_json(value)
