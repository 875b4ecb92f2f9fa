"""chrF: F-score of character n-grams, and of words with `word_order` (chrF++).

Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation", and 2017,
"chrF++: words helping character n-grams"; computed by sacrebleu, divided by 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from finetune.scorers.sacrebleu_scorer import SacrebleuScorer


@dataclass(frozen=True)
class Chrf(SacrebleuScorer):
    """sacrebleu's chrF: of the set as a corpus, of one answer by itself.

    Attributes:
        char_order: longest n-gram of characters.
        word_order: longest n-gram of words: 0 for chrF, 2 for chrF++.
        beta: recall counts beta times as much as precision.
        lowercase: without case.
        whitespace: white space counts as characters.
        eps_smoothing: orders that a text is too short for count as almost 0 (the first chrF++.py,
            NLTK), not as absent.
    """

    name: ClassVar[str] = "chrf"
    version: ClassVar[int] = 1

    char_order: int = 6
    word_order: int = 0
    beta: int = 2
    lowercase: bool = False
    whitespace: bool = False
    eps_smoothing: bool = False

    def findings(self) -> list[str]:
        """The orders and beta."""
        bounds = {"char_order": (1, 20), "word_order": (0, 20), "beta": (1, 100)}
        return [
            f"{key}: found {getattr(self, key)}; allowed: a whole number from {low} to {high}"
            for key, (low, high) in bounds.items()
            if not low <= getattr(self, key) <= high
        ]

    def _metric(self, effective_order: bool) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF(**self.settings())
