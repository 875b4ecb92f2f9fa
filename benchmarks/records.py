"""What a benchmark notes of its runs: the day, and the steps a run wrote down."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The steps of a run folder, in order."""
    return [line for line in _lines(run) if "grad_norm" in line]


def last_heldout_loss(run: Path) -> float | None:
    """None where the run evaluated nothing."""
    losses = [line["heldout_loss"] for line in _lines(run) if "heldout_loss" in line]
    return losses[-1] if losses else None


def _lines(run: Path) -> list[dict[str, Any]]:
    from finetune.monitor import read_metrics  # seconds, which a table or a date need not wait for

    return read_metrics(run / "metrics.jsonl")
