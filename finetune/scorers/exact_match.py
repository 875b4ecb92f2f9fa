"""Exact match: the written answer is the accepted one, character by character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finetune.scorers.scorer import Scorer


@dataclass(frozen=True)
class ExactMatch(Scorer):
    """1 where the texts are equal but for white space around them, else 0."""

    name: ClassVar[str] = "exact_match"
    version: ClassVar[int] = 1

    def score_one(self, written: str, answer: str) -> float:
        """1 or 0."""
        return float(written.strip() == answer.strip())
