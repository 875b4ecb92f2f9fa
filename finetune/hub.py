"""Models from the hub: the one place that uses the network, and only for an id a config names."""

from __future__ import annotations

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
    if not OFFLINE_BY_CHOICE:
        huggingface_hub.constants.HF_HUB_OFFLINE = False
        print(
            f"base     {hub_id}: from the hub, or the cache of an earlier download", file=sys.stderr
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        offline = " (HF_HUB_OFFLINE is set)" if OFFLINE_BY_CHOICE else ""
        raise InputError(
            f"base.path {hub_id}: not to be had from the hub{offline}: {reason}; "
            "give a local folder, or ask for access to the model on its page"
        ) from None
