"""BLEU: precision of word n-grams with a brevity penalty, over a whole set of answers.

Source: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation";
computed by sacrebleu (Post 2018, "A Call for Clarity in Reporting BLEU Scores"), divided by 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finetune.scorers.sacrebleu_scorer import SacrebleuScorer


@dataclass(frozen=True)
class Bleu(SacrebleuScorer):
    """sacrebleu's BLEU: of the set as a corpus, of one answer with effective order.

    A set whose answers all have fewer tokens than `max_ngram_order` has a BLEU of 0, as the measure
    is defined; chrf suits short answers.

    Attributes:
        tokenize: how words are cut: 13a (WMT's), intl (Unicode's punctuation), char, zh (Chinese
            characters one by one) or none (at spaces).
        lowercase: without case.
        max_ngram_order: longest n-gram, 4 in the paper.
        smooth_method: for n-grams of which none is found: exp (halved each time), floor (0.1),
            add-k (1 is added from n = 2 on) or none.
    """

    name: ClassVar[str] = "bleu"
    version: ClassVar[int] = 1

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    lowercase: bool = False
    max_ngram_order: int = 4
    smooth_method: Literal["exp", "floor", "add-k", "none"] = "exp"

    def findings(self) -> list[str]:
        """The order."""
        order = self.max_ngram_order
        if 1 <= order <= 20:
            return []
        return [f"max_ngram_order: found {order}; allowed: a whole number from 1 to 20"]

    def _metric(self, effective_order: bool) -> Any:
        from sacrebleu.metrics import BLEU

        return BLEU(**self.settings(), effective_order=effective_order)
