"""Regular expression: what a pattern takes out of the answer, or that it matches at all.

Patterns are those of the package `regex` (Python's `re` and more: `(?i)` for any case, named
groups), searched anywhere, the first match counts. Some patterns take time that doubles with each
character; a search that takes longer than a second ends in an error, never in a score.

Source: the filter `regex` of lm-evaluation-harness, `lm_eval/filters/extraction.py`, with its
`group_select: 0` (the first match).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from finetune.errors import InputError
from finetune.scorers.scorer import Scorer, shorten

TIME_LIMIT_SECONDS = 1.0


@dataclass(frozen=True)
class Regex(Scorer):
    """1 where the text in the pattern's group is the accepted answer, else 0.

    Without a group in the pattern, a match alone is 1, and rows need no accepted answers.

    Attributes:
        pattern: the regular expression.
        group: number or name of the group that is compared, white space around left out; 0 is the
            whole match; null: the first group, if the pattern has one.
    """

    name: ClassVar[str] = "regex"
    version: ClassVar[int] = 1

    pattern: str
    group: str | int | None = None

    @property
    def needs_expected(self) -> bool:
        """Whether there is a group to compare."""
        return self._compared is not None

    def extract(self, text: str) -> str | None:
        """The text of the group, or of the match where none is compared; None without a match.

        Raises:
            InputError: the search took too long.
        """
        try:
            match = self._compiled.search(text, timeout=TIME_LIMIT_SECONDS)
        except TimeoutError:
            raise InputError(
                f"{self.name}: the pattern {shorten(self.pattern)} took longer than "
                f"{TIME_LIMIT_SECONDS:g} s on the answer {shorten(text)}; make its repetitions "
                "unambiguous, as in [^,]*, or possessive, as in (?:a|b)*+"
            ) from None
        return match[self._compared or 0] if match else None

    def score_one(self, written: str, answer: str) -> float:
        """1 or 0."""
        found = self.extract(written)
        if found is None or self._compared is None:
            return float(found is not None)
        return float(found.strip() == answer.strip())

    def findings(self) -> list[str]:
        """A pattern that does not compile, a group that it does not have."""
        import regex

        try:
            compiled = self._compiled
        except (regex.error, OverflowError, RecursionError) as error:
            return [f"pattern: found {shorten(self.pattern)}; not a regular expression: {error}"]
        if self.group is None or self._has_group(compiled):
            return []
        allowed = [f"0 to {compiled.groups}", *compiled.groupindex]
        return [f"group: found {self.group!r}; allowed: null, {', '.join(allowed)}"]

    def _has_group(self, compiled: Any) -> bool:
        if isinstance(self.group, str):
            return self.group in compiled.groupindex
        return self.group is not None and 0 <= self.group <= compiled.groups

    @cached_property
    def _compiled(self) -> Any:
        import regex

        return regex.compile(self.pattern)

    @cached_property
    def _compared(self) -> str | int | None:
        if self.group is None:
            return 1 if self._compiled.groups else None
        return self.group
