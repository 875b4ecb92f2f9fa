"""Which checkpoint a run goes on from, and whether it was trained on what this run trains on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from finetune import artifact, checkpoint
from finetune.errors import CheckFailed, InputError
from finetune.recipes import Parts
from finetune.run_folder import RunFolder


def choose_checkpoint(
    parts: Parts, run: RunFolder, first: bool, allowed: Sequence[str] = ()
) -> Path | None:
    """What to go on from: the first rank verifies and sets aside, the others take its answer.

    Args:
        allowed: settings that may have changed; one of `data` may change the rows.

    Raises:
        InputError: it was written by another number of ranks.
        CheckFailed: it was trained on something else; or see `checkpoint.find_resumable`.
    """
    answer: list[Path | None] = [None]
    if first:
        answer = [checkpoint.find_resumable(run.checkpoints, parts.config.run.resume)]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[0] is None:
        return None
    facts = artifact.read_manifest(answer[0])["facts"]
    ranks, before = facts.get("num_ranks"), facts.get("trained_on")
    if not isinstance(before, dict) or not isinstance(before.get("libraries"), dict):
        raise CheckFailed(f"{answer[0]}: its manifest does not say what it was trained on")
    if first:
        _compare_with(before, parts, answer[0], allowed)
    if ranks != parts.num_ranks:
        raise InputError(
            f"{answer[0]}: was written by {ranks} ranks, this launch has {parts.num_ranks}: its "
            f"steps would hold other rows. Launch {ranks}, or choose another run.name"
        )
    if first:
        print(f"resume   from {answer[0]}", file=sys.stderr)
    return answer[0]


def _compare_with(
    before: Mapping[str, Any], parts: Parts, folder: Path, allowed: Sequence[str]
) -> None:
    """Base, tokenizer, prompt format and rows are those of the checkpoint; libraries may differ."""
    may = {"libraries", "config_sha256"}  # the settings themselves were compared one by one
    if any(key.startswith("data.") for key in allowed):
        may.add("documents_sha256")
    now = parts.trained_on
    if other := sorted(key for key in now if key not in may and before.get(key) != now[key]):
        raise CheckFailed(
            f"{folder}: was trained on something else: {', '.join(other)} differ. Put back what "
            "it was trained on, or choose another run.name"
        )
    then = {"threads": now["libraries"].get("threads"), **before["libraries"]}  # new in manifests
    changed = {name: new for name, new in now["libraries"].items() if then.get(name) != new}
    if changed:
        pairs = [f"{name} {then.get(name)}, now {new}" for name, new in sorted(changed.items())]
        print(
            f"warning: {folder.name} was written with {'; '.join(pairs)}: the run goes on, and "
            "need not end bit for bit where it would have",
            file=sys.stderr,
        )
