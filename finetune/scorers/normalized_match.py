"""Exact match of what is left without case, punctuation, articles and white space.

Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text",
section 6.1: punctuation and the articles a, an and the are left out; the published evaluation
script of SQuAD 1.1 also lowers the case first and joins words by single spaces. As there,
punctuation is ASCII's, and is removed without a space in its place ("well-known" is "wellknown").
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import ClassVar

from finetune.scorers.scorer import Scorer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", plain).split())


@dataclass(frozen=True)
class NormalizedMatch(Scorer):
    """1 where the normalised texts are equal, else 0."""

    name: ClassVar[str] = "normalized_match"
    version: ClassVar[int] = 1

    def score_one(self, written: str, answer: str) -> float:
        """1 or 0."""
        return float(normalize(written) == normalize(answer))

    def why_unusable(self, answer: str) -> str | None:
        """An article alone, the option letter A among them, or punctuation alone: nothing stays."""
        if normalize(answer):
            return None
        return (
            "is nothing but articles and punctuation, which this measure leaves out, so an empty "
            "answer would be right; exact_match keeps them"
        )
