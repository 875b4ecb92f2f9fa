"""What BLEU and chrF share: sacrebleu's scores of one answer and of a whole set."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from finetune.errors import InputError
from finetune.scorers.scorer import Scorer, for_each_row


class SacrebleuScorer(Scorer):
    """A metric of sacrebleu, whose scores go to 100 there and to 1 here."""

    @abc.abstractmethod
    def _metric(self, effective_order: bool) -> Any:
        """sacrebleu's metric object with these settings.

        Args:
            effective_order: count only the n-grams that a short text has room for.
        """

    @cached_property
    def _of_one(self) -> Any:
        return self._metric(effective_order=True)

    @cached_property
    def _of_sets(self) -> Any:
        return self._metric(effective_order=False)

    def score_one(self, written: str, answer: str) -> float:
        """sacrebleu's sentence score, 0 to 1."""
        return _share(self._of_one.sentence_score(written, [answer]))

    def score(self, written: str, expected: Sequence[str]) -> float:
        """sacrebleu's sentence score, with the metric's own way to take several references.

        BLEU finds an n-gram in any of them, which can be more than the best alone; chrF takes the
        best.

        Raises:
            InputError: there is no accepted answer, or an empty one.
        """
        self.check_expected(expected)
        return _share(self._of_one.sentence_score(written, list(expected)))

    def total(self, written: Sequence[str], expected: Sequence[Sequence[str]]) -> float:
        """sacrebleu's corpus score, 0 to 1: counts are added over all answers, not their scores.

        Raises:
            InputError: no rows, or accepted answers that are empty or missing.
        """
        for_each_row(self.check_expected, ((answers,) for answers in expected))
        if not written:
            raise InputError(f"{self.name}: there are no answers to score")
        assert len(written) == len(expected), "accepted answers for each row"
        return _share(self._of_sets.corpus_score(list(written), _streams(expected)))

    def why_unusable(self, answer: str) -> str | None:
        """An empty one."""
        return None if answer.strip() else "is empty"


def _streams(expected: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The first answer of every row, the second of every row …; None where a row has fewer.

    An empty text would count as one more reference, of length 0.
    """
    most = max(map(len, expected))
    return [[row[i] if i < len(row) else None for row in expected] for i in range(most)]


def _share(score: Any) -> float:
    """Of 100; rounding must not lift a perfect answer above 1."""
    return min(float(score.score) / 100, 1.0)
