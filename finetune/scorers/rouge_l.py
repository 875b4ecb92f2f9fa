"""ROUGE-L: F1 of the longest common subsequence of words.

    P = LCS / words written,  R = LCS / words expected,  F1 = 2 P R / (P + R)

Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1; computed by
the package rouge-score, sentence level (`rougeL`). It lowers the case and keeps a to z and 0 to 9
alone: other letters split words and are lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from finetune.scorers.scorer import Scorer


@dataclass(frozen=True)
class RougeL(Scorer):
    """rouge-score's F1; the best over several accepted answers.

    Attributes:
        use_stemmer: compare the stems of words of more than three letters (Porter's, English).
    """

    name: ClassVar[str] = "rouge_l"
    version: ClassVar[int] = 1

    use_stemmer: bool = False

    def score_one(self, written: str, answer: str) -> float:
        """0 to 1."""
        return float(self._rouge.score(answer, written)["rougeL"].fmeasure)

    def why_unusable(self, answer: str) -> str | None:
        """A text in another script has no word left."""
        if any(character in _KEPT for character in answer.lower()):
            return None
        return (
            "has no letter a to z and no digit, and rouge-score sees nothing else: every answer "
            "would score 0; chrf reads any script"
        )

    @cached_property
    def _rouge(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], use_stemmer=self.use_stemmer)


_KEPT = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
