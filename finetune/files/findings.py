"""What is wrong with a file, collected so that one run shows all of it."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import InputError

MAX_FINDINGS = 20


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

    def refuse(self) -> None:
        """Raises what was found, if anything was.

        Raises:
            InputError: there are findings.
        """
        if not self.total:
            return
        rest = self.total - len(self.named)
        more = [f"and {rest} more rows"] if rest else []
        raise InputError([*self.named, *more])


def refuse(findings: Sequence[str]) -> None:
    """Raises the findings, one a row, if there are any: the first 20, and how many more.

    Raises:
        InputError: there are findings.
    """
    collected = Findings()
    for finding in findings:
        collected.add(finding)
    collected.refuse()
