"""What may change between two starts of one run.

A run that goes on with another setting is another run: its numbers have no one config that made
them. A few settings only say when something is shown or kept; those may change. Every other one is
refused with both values, unless it is named with --allow-change; then it acts from here on, and the
run folder remembers what was changed, when, and after which step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.config import RunConfig
from finetune.errors import InputError

FREE = frozenset(
    {
        *("run.resume", "train.logging_steps", "train.report_to", "train.activation_offloading"),
        *("train.save_steps", "train.save_total_limit", "train.eval_steps", "train.eval_on_start"),
        *("eval.per_device_eval_batch_size", "eval.max_new_tokens", "eval.tasks"),
    }
)
"""Settings without a say in what is trained."""

ACTING_WHERE_EVALUATION_DOES = frozenset({"train.eval_steps"})
"""Free unless held-out losses decide which weights are published, or when the run stops."""

FIXED = ("base", "adapter", "recipe", "run.name", "run.dir")
"""What no flag changes: other weights would be trained, or in another place."""


@dataclass(frozen=True)
class Change:
    """A setting with another value than the run began with.

    Attributes:
        key: `section.key`.
        before: the run's value.
        after: the config's.
    """

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: the folder has {self.before!r}, the config {self.after!r}"


def changes_between(old: RunConfig, new: RunConfig) -> list[Change]:
    """Every setting that differs, by its key."""
    before, after = _flat(old.model_dump()), _flat(new.model_dump())
    return [
        Change(key, before.get(key), after.get(key))
        for key in sorted(set(before) | set(after))
        if before.get(key) != after.get(key)
    ]


def free_settings(*configs: RunConfig) -> frozenset[str]:
    """The settings without a say in what any of these configs trains and publishes."""
    trains = [config.train for config in configs]
    if any(t.load_best_model_at_end or t.early_stopping_patience is not None for t in trains):
        return FREE - ACTING_WHERE_EVALUATION_DOES
    return FREE


def acting_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting with a say in what is trained, by its key; the place of the run has none."""
    silent = free_settings(config) | {"run.name", "run.dir"}
    return {key: value for key, value in _flat(config.model_dump()).items() if key not in silent}


def refused(
    changes: Iterable[Change], allowed: Sequence[str], free: frozenset[str] = FREE
) -> list[Change]:
    """The changes that are neither free nor allowed.

    Args:
        free: what may change unnamed.

    Raises:
        InputError: an allowed key that cannot change.
    """
    never = [key for key in allowed if key in FIXED or key.split(".")[0] in FIXED]
    if never:
        raise InputError(
            f"--allow-change {', '.join(never)}: cannot change within a run; the checkpoints hold "
            "other weights. Choose another run.name"
        )
    return [change for change in changes if change.key not in free | set(allowed)]


def remember(changes: Sequence[Change], folder: Path, step: int | None) -> None:
    """Adds the changes to the run folder's list, `changes.jsonl`."""
    with (folder / "changes.jsonl").open("a", encoding="utf-8") as file:
        for change in changes:
            line = {"time": int(time.time()), "after_step": step, **asdict(change)}
            file.write(json.dumps(line, default=str) + "\n")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = [_flat(item, f"{prefix}{key}.") for key, item in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    return {prefix.rstrip("."): value}
