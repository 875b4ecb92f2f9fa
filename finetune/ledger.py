"""The token ledger: what became of every row and token, by reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NAMED_ROWS = 10


@dataclass
class Ledger:
    """Counts over one side (train or heldout) of the data.

    Attributes:
        name: train or heldout.
        num_rows_read: rows in the files.
        num_rows_kept: rows that became documents: one each, or, split, several.
        num_tokens_trained: tokens that count in the loss.
        num_tokens_context: tokens that are read but not trained.
        num_tokens_dropped: tokens of dropped rows.
        dropped: reason -> places of the rows.
        notes: what a person should know (detected formats, duplicates …).
        lengths: tokens of every kept document.
    """

    name: str
    num_rows_read: int = 0
    num_rows_kept: int = 0
    num_tokens_trained: int = 0
    num_tokens_context: int = 0
    num_tokens_dropped: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def keep(self, *train_masks: Sequence[bool]) -> None:
        """Counts one row that stays, by the masks of its documents.

        The first token of a document is never trained.
        """
        self.num_rows_kept += 1
        for train_mask in train_masks:
            trained = sum(train_mask[1:])
            self.num_tokens_trained += trained
            self.num_tokens_context += len(train_mask) - trained
            self.lengths.append(len(train_mask))

    def drop(self, reason: str, where: str, num_tokens: int = 0) -> None:
        """Counts one row that goes, with the reason."""
        self.dropped.setdefault(reason, []).append(where)
        self.num_tokens_dropped += num_tokens

    @property
    def num_rows_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(len(rows) for rows in self.dropped.values())

    def as_json(self) -> dict[str, Any]:
        """The ledger for data.json."""
        ordered = sorted(self.lengths)
        return {
            "rows_read": self.num_rows_read,
            "rows_kept": self.num_rows_kept,
            "rows_dropped": self.num_rows_dropped,
            "documents": len(self.lengths),
            "tokens": self.num_tokens_trained + self.num_tokens_context,
            "tokens_trained": self.num_tokens_trained,
            "tokens_context": self.num_tokens_context,
            "tokens_dropped": self.num_tokens_dropped,
            "dropped": self.dropped,
            "length_median": ordered[len(ordered) // 2] if ordered else 0,
            "length_max": ordered[-1] if ordered else 0,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """The ledger for the terminal."""
        counts = self.as_json()
        rows = f"{self.num_rows_kept:,} of {self.num_rows_read:,} rows"
        tokens = f"{counts['tokens']:,} tokens: {self.num_tokens_trained:,} trained"
        result = [
            f"{self.name:<8} {rows}, {tokens}, {self.num_tokens_context:,} context; "
            f"longest {counts['length_max']}, median {counts['length_median']}"
        ]
        for reason, places in self.dropped.items():
            named = ", ".join(places[:NAMED_ROWS]) + (" …" if len(places) > NAMED_ROWS else "")
            result.append(f"         dropped {len(places):,}: {reason} ({named})")
        return result + [f"         note: {note}" for note in self.notes]
