"""What is wrong with a file, collected so that one run shows all of it."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import InputError

MAX_FINDINGS = 20


class RowsRefused(InputError):
    """Rows that are refused: the first of them by name, and how many there are.

    Args:
        named: a finding each.
        total: how many there are, named or not.
    """

    def __init__(self, named: Sequence[str], total: int) -> None:
        self.named, self.total = list(named), total
        rest = total - len(self.named)
        super().__init__([*self.named, *([f"and {rest} more rows"] if rest else [])])


class Findings:
    """Findings of one file: the first 20 as sentences, the others as a number.

    A file of a million bad lines therefore costs no more memory than one of twenty.

    Attributes:
        named: the first findings.
        total: how many there are.
    """

    def __init__(self) -> None:
        self.named: list[str] = []
        self.total = 0

    def add(self, finding: str) -> None:
        """Notes one more; it says where, what was found and what is allowed."""
        self.total += 1
        if len(self.named) < MAX_FINDINGS:
            self.named.append(finding)

    def absorb(self, error: InputError) -> None:
        """Notes the findings of an error, those that it only counts included."""
        named = error.named if isinstance(error, RowsRefused) else error.findings
        for finding in named:
            self.add(finding)
        if isinstance(error, RowsRefused):
            self.total += error.total - len(error.named)

    def refuse(self) -> None:
        """Raises what was found, if anything was.

        Raises:
            InputError: there are findings.
        """
        if self.total:
            raise RowsRefused(self.named, self.total)


def refuse(findings: Sequence[str]) -> None:
    """Raises the findings, one a row, if there are any: the first 20, and how many more.

    Raises:
        InputError: there are findings.
    """
    collected = Findings()
    for finding in findings:
        collected.add(finding)
    collected.refuse()
