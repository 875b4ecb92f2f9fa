"""Models and datasets from the hub: the one place that uses the network, and only for an id that a
config names."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune import OFFLINE_BY_CHOICE
from finetune.cache import remembered_sha256
from finetune.config.base import is_commit
from finetune.errors import CheckFailed, InputError

_TEXT_FILES = ("*.json", "*.model", "*.jinja")
_WEIGHT_FILES = ("*.safetensors",)
_KEPT = re.compile(r"(.+)@([0-9a-f]{40})-[^/]*\.parquet")


def download(hub_id: str, revision: str | None, with_weights: bool = True) -> Path:
    """A snapshot of a hub id; its folder's name is the commit hash.

    Args:
        revision: branch, tag or commit hash; None is the hub's `main`.
        with_weights: False leaves the safetensors out.

    Raises:
        InputError: unknown id, no access, no network.
        CheckFailed: a file of it is not what the hub has.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_TEXT_FILES, *(_WEIGHT_FILES if with_weights else ())]
    go_online("base", hub_id)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"base.path {hub_id}: {_unavailable(error)}; "
            "give a local folder, or ask for access to the model on its page"
        ) from None
    if is_commit(revision) and folder.name != revision:
        raise CheckFailed(
            f"base.path {hub_id}: commit {revision} was asked for, {folder.name} came"
        )
    _refuse_changed(folder)
    return folder


def _refuse_changed(folder: Path) -> None:
    """Compares a snapshot's files with the hashes that the hub gave when they were fetched.

    The library compares sizes alone (huggingface_hub 2.4). In its cache every file is a link to one
    whose name is the hub's hash: sha256 of large files, git's own of small ones.
    """
    found = [
        f"{path}: its content is not what the hub has under its hash; delete {path.resolve()}, and "
        "it is fetched again"
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() and path.is_file() and not _is_as_named(path.resolve())
    ]
    if found:
        raise CheckFailed("\n".join(found))


def _is_as_named(blob: Path) -> bool:
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return remembered_sha256(blob) == blob.name
    if not is_commit(blob.name):  # git names contents as it names commits
        return True  # named by something else: nothing to compare with
    content = blob.read_bytes()
    named = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return named.hexdigest() == blob.name


def download_dataset(hub_id: str, split: str, revision: str | None, root: Path) -> Path:
    """A split of a dataset as one parquet file, which is kept.

    Args:
        hub_id: `owner/name`, or a local folder that `datasets` reads.
        split: as `datasets` writes it: train, train[:1000] …
        revision: branch, tag or commit hash; None is the hub's `main`.
        root: of the cache; the file's name holds commit and fingerprint of the rows.

    Raises:
        InputError: unknown id or split, no access, no network.
        CheckFailed: another commit than the one asked for.
    """
    go_online("data", hub_id)  # before `datasets` is imported, which reads the setting
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub_id, split=split, revision=revision)
    except Exception as error:  # `datasets` raises many kinds, most of them its own
        raise InputError(
            f"data: hf://datasets/{hub_id}, split {split}: {_unavailable(error)}; "
            "give local files, or ask for access to the dataset on its page"
        ) from None
    commit = _commit_of(rows)
    if is_commit(revision) and commit != revision:
        # `datasets` takes what it has, of any commit, where the one asked for is not to be had.
        raise CheckFailed(
            f"data: hf://datasets/{hub_id}: commit {revision} was asked for, "
            f"{commit or 'a local folder'} was read; it is not in the cache, or not on the hub"
        )
    name = kept_name(hub_id, split) + (f"@{commit}" if commit else "")
    file = root / "datasets" / f"{name}-{rows._fingerprint}.parquet"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp-{secrets.token_hex(4)}")
        rows.to_parquet(str(temporary))
        os.replace(temporary, file)
    return file


def kept_name(hub_id: str, split: str) -> str:
    """What the files kept of a dataset's split begin with."""
    return f"{hub_id}-{split}".translate({ord(c): "_" for c in "/[]:%+@"})


def commits_of(files: Iterable[str]) -> dict[str, str]:
    """`kept_name` -> commit, of those files that are kept of the hub's datasets."""
    found = (_KEPT.fullmatch(Path(file).name) for file in files)
    return {match.group(1): match.group(2) for match in found if match}


def _commit_of(rows: Any) -> str | None:
    """The folder that `datasets` keeps a dataset of the hub in is named by its commit."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    return next((name for name in folders if is_commit(name)), None)


def go_online(what: str, hub_id: str) -> None:
    """Lifts the offline mode that the package sets, unless the user set it."""
    if OFFLINE_BY_CHOICE:
        return
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = False
    os.environ["HF_DATASETS_OFFLINE"] = "0"
    print(f"{what:<8} {hub_id}: from the hub, or the cache of an earlier download", file=sys.stderr)


def _unavailable(error: Exception) -> str:
    offline = " (HF_HUB_OFFLINE is set)" if OFFLINE_BY_CHOICE else ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"not to be had from the hub{offline}: {lines[0]}"
