"""Models and datasets from the hub: the one place that uses the network, and only for an id that a
config names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune import OFFLINE_BY_CHOICE
from finetune.errors import InputError

_TEXT_FILES = ("*.json", "*.model", "*.jinja")
_WEIGHT_FILES = ("*.safetensors",)


def download(hub_id: str, revision: str | None, with_weights: bool = True) -> Path:
    """A snapshot of a hub id; its folder's name is the commit hash.

    Args:
        revision: branch, tag or commit hash; None is the hub's `main`.
        with_weights: False leaves the safetensors out.

    Raises:
        InputError: unknown id, no access, no network.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_TEXT_FILES, *(_WEIGHT_FILES if with_weights else ())]
    _go_online("base", hub_id)
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"base.path {hub_id}: {_unavailable(error)}; "
            "give a local folder, or ask for access to the model on its page"
        ) from None


def download_dataset(hub_id: str, split: str, revision: str | None, root: Path) -> Path:
    """A split of a dataset as one parquet file, which is kept.

    Args:
        hub_id: `owner/name`, or a local folder that `datasets` reads.
        split: as `datasets` writes it: train, train[:1000] …
        revision: branch, tag or commit hash; None is the hub's `main`.
        root: of the cache; the file's name holds the fingerprint of the rows.

    Raises:
        InputError: unknown id or split, no access, no network.
    """
    _go_online("data", hub_id)  # before `datasets` is imported, which reads the setting
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub_id, split=split, revision=revision)
    except Exception as error:  # `datasets` raises many kinds, most of them its own
        raise InputError(
            f"data: hf://datasets/{hub_id}, split {split}: {_unavailable(error)}; "
            "give local files, or ask for access to the dataset on its page"
        ) from None
    name = f"{Path(hub_id).name}-{split}".translate({ord(c): "_" for c in "/[]:%+"})
    file = root / "datasets" / f"{name}-{rows._fingerprint}.parquet"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
        rows.to_parquet(str(temporary))
        os.replace(temporary, file)
    return file


def _go_online(what: str, hub_id: str) -> None:
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
