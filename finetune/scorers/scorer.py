"""What every measure of written answers has in common."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

from finetune.errors import InputError

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Scorer(abc.ABC):
    """A measure: a frozen dataclass whose fields are its settings.

    Attributes:
        name: what a task calls it.
        version: raised whenever any score may change, so that old results are not compared with
            new ones.
        is_text: whether the model writes the answer; False where it chooses among given ones.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    is_text: ClassVar[bool] = True

    @property
    def needs_expected(self) -> bool:
        """Whether rows must bring an accepted answer; False where the answer's form is enough."""
        return True

    @abc.abstractmethod
    def score_one(self, written: str, answer: str) -> float:
        """0 to 1, higher is better, against one accepted answer.

        Args:
            written: what the model wrote.
            answer: an accepted answer; "" where none is needed.
        """

    def score(self, written: str, expected: Sequence[str]) -> float:
        """0 to 1, higher is better: the best over the accepted answers.

        Raises:
            InputError: there is none, or one that no written answer could ever match.
        """
        self.check_expected(expected)
        answers = expected if self.needs_expected else [""]
        return max(self.score_one(written, answer) for answer in answers)

    def total(self, written: Sequence[str], expected: Sequence[Sequence[str]]) -> float:
        """The score of a whole set, 0 to 1: the mean, unless the measure is one of whole sets.

        Args:
            written: the answers of the model, one for each row.
            expected: the accepted answers of each row.

        Raises:
            InputError: no rows, or rows that cannot be scored, all of them together.
        """
        scores = for_each_row(self.score, zip(written, expected, strict=True))
        if not scores:
            raise InputError(f"{self.name}: there are no answers to score")
        return math.fsum(scores) / len(scores)

    def check_expected(self, expected: Sequence[str]) -> None:
        """Accepted answers under which no score could be right are refused, never scored 0.

        Raises:
            InputError: with every such answer.
        """
        if not self.needs_expected:
            return
        if not expected:
            raise InputError(f"{self.name}: the row has no accepted answer")
        reasons = [(answer, self.why_unusable(answer)) for answer in expected]
        findings = [
            f"{self.name}: the accepted answer {shorten(answer)} {reason}"
            for answer, reason in reasons
            if reason
        ]
        if findings:
            raise InputError(findings)

    def why_unusable(self, answer: str) -> str | None:
        """Why this accepted answer can never be matched; None where it can."""
        return None

    def findings(self) -> list[str]:
        """What is wrong with the settings beyond their types, as `setting: …`."""
        return []

    def settings(self) -> dict[str, Any]:
        """The settings as they belong into the record of a result."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def for_each_row(call: Callable[..., Result], rows: Iterable[tuple[Any, ...]]) -> list[Result]:
    """What a call returns for each row.

    Raises:
        InputError: the findings about all rows together, each with the number of its row.
    """
    results, findings = [], []
    for number, row in enumerate(rows, 1):
        try:
            results.append(call(*row))
        except InputError as error:
            findings += [f"answer {number}: {finding}" for finding in error.findings]
    if findings:
        raise InputError(findings)
    return results


def shorten(text: str, length: int = 60) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")
