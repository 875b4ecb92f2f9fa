"""A folder on disk that is staged, hashed, published by one rename, and verified before use.

Checkpoints, adapters, imports and merged models all go through `staged`: their final name
appears only when every byte is on disk and listed, with its hash, in `manifest.json`. A
process that dies before leaves a hidden `.NAME.tmp-*` folder that nobody takes for the thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import CannotContinue, CheckFailed, InputError, is_of_the_system

MANIFEST = "manifest.json"
_READ_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    """The sha256 of bytes, as hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_json(value: Any) -> str:
    """The sha256 of a JSON value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256_of_bytes(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, _json_text(value))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one step: a reader sees the old content or the new, never half."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise CannotContinue(f"{path}: could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # of a disk that refuses; the next start sweeps it
            temporary.unlink(missing_ok=True)


def keep_to_oneself() -> None:
    """From here on nothing is made that others may write: what a run reads later decides it."""
    os.umask(os.umask(0o077) | 0o022)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Makes a folder and what it lies in, so that a power cut does not take a new one away.

    Args:
        mode: who may open it, less what the umask takes; of this folder alone.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode, exist_ok=True)
    _fsync(path.parent)


@dataclass(frozen=True)
class Place:
    """A folder as it was once: this one, not another that took its name.

    Attributes:
        path: its name.
        identity: device and inode.
    """

    path: Path
    identity: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> Place:
        """The folder that has the name now."""
        found = path.stat()
        return cls(path, (found.st_dev, found.st_ino))

    def refuse_another(self) -> None:
        """Compares the folder with what it was.

        Raises:
            CannotContinue: it is gone, or another one is in its place.
        """
        try:
            if Place.of(self.path) == self:
                return
            found = "is another folder than the run began in"
        except OSError:
            found = "is gone"
        raise CannotContinue(
            f"{self.path}: {found}; nothing is written there. Put the folder back and start again: "
            "the run goes on from its last checkpoint"
        )


def refuse_special(path: Path) -> None:
    """Refuses a pipe or a device before it is opened: it may never end.

    Raises:
        InputError: it is there, and no regular file.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no regular file")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    refuse_special(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


@contextlib.contextmanager
def staged(
    final: Path,
    facts: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """A temporary folder beside `final` that becomes `final` when the block ends well.

    On the way out every file is fsynced and hashed into `manifest.json`, the folder is renamed
    to `final` and the parent is fsynced. If the block raises, the folder is removed.

    Args:
        final: the name to publish under; must not exist.
        facts: what else the manifest says, under "facts".
        hashes: sha256 by name of files that were hashed as they were written, read when the
            block has ended; the others are read back.

    Raises:
        InputError: `final` exists.
        CannotContinue: the disk refused.
    """
    if final.exists() or final.is_symlink():
        raise InputError(f"{final}: exists already; choose another name or remove it first")
    stage = final.parent / f".{final.name}.tmp-{secrets.token_hex(4)}"
    try:
        make_folder(final.parent)
        stage.mkdir()
        yield stage
        _write_manifest(stage, dict(facts or {}), hashes or {})
        os.rename(stage, final)
        _fsync(final.parent)
    except Exception as error:
        if not is_of_the_system(error):
            raise
        raise CannotContinue(
            f"{final}: could not be written: {error}; nothing published"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def sweep(folder: Path) -> list[str]:
    """Removes what killed processes left of stagings in `folder`; returns the names removed."""
    if not folder.is_dir():
        return []
    stale = sorted(p for p in folder.iterdir() if p.name.startswith(".") and ".tmp-" in p.name)
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in stale]


def remove(folder: Path) -> None:
    """Deletes a published folder, un-publishing it first: a half-deleted one has no name left.

    Raises:
        FileNotFoundError: there is none; another process may have been faster.
        CannotContinue: the disk refused.
    """
    trash = folder.parent / f".{folder.name}.tmp-trash-{secrets.token_hex(4)}"
    try:
        os.rename(folder, trash)
        _fsync(folder.parent)  # or a power cut could bring the name back over half of the files
        shutil.rmtree(trash)
        _fsync(folder.parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CannotContinue(f"{folder}: could not be removed: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder.

    Raises:
        CheckFailed: there is none, it is not one of ours, or it is not as it was written.
    """
    path = folder / MANIFEST
    try:
        refuse_special(path)
        text = path.read_bytes().decode()
        manifest = json.loads(text)
    except (InputError, OSError, ValueError, RecursionError) as error:
        raise CheckFailed(f"{path}: no readable manifest ({error})") from None
    is_ours = isinstance(manifest, dict) and manifest.keys() == {"facts", "files", "sha256"}
    if not is_ours or not all(isinstance(manifest[key], dict) for key in ("facts", "files")):
        raise CheckFailed(f"{path}: not a manifest of this toolkit")
    # Any other text than the one that was written is damaged, were it by a space.
    if text != _json_text(manifest) or manifest["sha256"] != _own_hash(manifest):
        raise CheckFailed(f"{path}: its content differs from what was published (sha256)")
    return manifest


def findings_of(folder: Path, hash_of: Callable[[Path], str] = sha256_of) -> list[str]:
    """Compares a published folder with its manifest; an empty list means that all is well.

    Args:
        hash_of: gives the sha256 of a file; one that remembers need not read it.
    """
    try:
        files = read_manifest(folder)["files"]
    except CheckFailed as error:
        return [str(error)]
    found = [_file_finding(folder, name, entry, hash_of) for name, entry in files.items()]
    findings = [finding for finding in found if finding]
    extra = sorted(set(_file_names(folder)) - set(files) - {MANIFEST})
    return findings + [f"{folder / name}: is not in the manifest" for name in extra]


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose every file has been compared with it.

    Raises:
        CheckFailed: something differs; the message names every file.
    """
    findings = findings_of(folder)
    if findings:
        raise CheckFailed("\n".join(findings))
    return read_manifest(folder)


def _file_finding(
    folder: Path, name: str, entry: Any, hash_of: Callable[[Path], str]
) -> str | None:
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        return f"{path}: a manifest may not point outside its folder"
    if not isinstance(entry, Mapping) or entry.keys() != {"bytes", "sha256"}:
        return f"{path}: the manifest does not say what it holds"
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
    if hash_of(path) != entry["sha256"]:
        return f"{path}: its content differs from what was published (sha256)"
    return None


def _write_manifest(
    folder: Path, facts: dict[str, Any], hashes: Mapping[str, str] | None = None
) -> None:
    files = {}
    for name in _file_names(folder):
        path = folder / name
        _fsync(path)
        digest = (hashes or {}).get(name) or sha256_of(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    for path in folder.rglob("*"):
        if path.is_dir():
            _fsync(path)  # or a crash could lose a name in it, though not its bytes
    manifest = {"facts": json.loads(json.dumps(facts)), "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": _own_hash(manifest)})


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return sha256_of_json({key: manifest[key] for key in ("facts", "files")})


def _file_names(folder: Path) -> list[str]:
    """Everything but folders, links to nowhere included."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(folder).as_posix() for p in found)


def _fsync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
