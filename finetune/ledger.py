"""The token ledger: what became of every row and token, by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
        num_tokens_dropped: tokens of dropped rows, and of turns that were left out.
        dropped: reason -> places of the rows.
        shortened: places of the rows that lost their oldest turns.
        num_turns_lost: turns that those rows lost.
        num_rows_split: rows that became several documents.
        suspicious: reason -> places of rows that are probably not what their owner wants.
        duplicates: groups of equal rows: kind, first place, the others' places.
        notes: what a person should know (detected formats …).
        lengths: number of tokens -> number of kept documents that have it.
    """

    name: str
    num_rows_read: int = 0
    num_rows_kept: int = 0
    num_tokens_trained: int = 0
    num_tokens_context: int = 0
    num_tokens_dropped: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    shortened: list[str] = field(default_factory=list)
    num_turns_lost: int = 0
    num_rows_split: int = 0
    suspicious: dict[str, list[str]] = field(default_factory=dict)
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)

    def keep(self, *documents: tuple[int, int]) -> None:
        """Counts one row that stays, by (tokens, trained tokens) of each of its documents."""
        self.num_rows_kept += 1
        for length, trained in documents:
            self.num_tokens_trained += trained
            self.num_tokens_context += length - trained
            self.lengths[length] = self.lengths.get(length, 0) + 1

    def drop(self, reason: str, where: str, num_tokens: int = 0) -> None:
        """Counts one row that goes, with the reason."""
        self.dropped.setdefault(reason, []).append(where)
        self.num_tokens_dropped += num_tokens

    def take_back(self, reason: str, where: str, *documents: tuple[int, int]) -> None:
        """Turns a row that was kept, with its documents as in `keep`, into a dropped one."""
        self.num_rows_kept -= 1
        for length, trained in documents:
            self.num_tokens_trained -= trained
            self.num_tokens_context -= length - trained
            self.lengths[length] -= 1
            if not self.lengths[length]:
                del self.lengths[length]
        self.drop(reason, where, sum(length for length, _ in documents))

    def shorten(self, where: str, num_turns: int, num_tokens: int) -> None:
        """Counts the turns that a row lost."""
        self.shortened.append(where)
        self.num_turns_lost += num_turns
        self.num_tokens_dropped += num_tokens

    def suspect(self, reason: str, where: str) -> None:
        """Notes a row that is probably not what its owner wants."""
        self.suspicious.setdefault(reason, []).append(where)

    @property
    def num_rows_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(len(rows) for rows in self.dropped.values())

    @property
    def num_documents(self) -> int:
        """Documents of the kept rows."""
        return sum(self.lengths.values())

    def length_at(self, share: float) -> int:
        """The length that so large a share of the documents does not exceed; 0 without any."""
        rank, seen = share * (self.num_documents - 1), 0
        for length in sorted(self.lengths):
            seen += self.lengths[length]
            if seen > rank:
                return length
        return 0

    def histogram(self) -> list[tuple[int, int]]:
        """(longest length of the bin, documents in it); a bin ends at each power of two."""
        bins: dict[int, int] = {}
        for length, count in self.lengths.items():
            end = 1 << max(0, length - 1).bit_length()
            bins[end] = bins.get(end, 0) + count
        if not bins:
            return []
        ends = [1 << n for n in range(min(bins).bit_length() - 1, max(bins).bit_length())]
        return [(end, bins.get(end, 0)) for end in ends]

    def as_json(self) -> dict[str, Any]:
        """The ledger for data.json."""
        return {
            "rows_read": self.num_rows_read,
            "rows_kept": self.num_rows_kept,
            "rows_dropped": self.num_rows_dropped,
            "documents": self.num_documents,
            "tokens": self.num_tokens_trained + self.num_tokens_context,
            "tokens_trained": self.num_tokens_trained,
            "tokens_context": self.num_tokens_context,
            "tokens_dropped": self.num_tokens_dropped,
            "dropped": self.dropped,
            "rows_shortened": len(self.shortened),
            "turns_lost": self.num_turns_lost,
            "shortened": self.shortened,
            "suspicious": self.suspicious,
            "duplicates": self.duplicates,
            "length_median": self.length_at(0.5),
            "length_max": self.length_at(1.0),
            "length_histogram": self.histogram(),
            "notes": self.notes,
        }

    def state(self) -> dict[str, Any]:
        """Everything, so that `from_state` gives the same ledger."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Ledger:
        """The ledger that `state` described, through JSON or not."""
        lengths = {int(length): count for length, count in state["lengths"].items()}
        return cls(**{**state, "lengths": lengths})

    def lines(self) -> list[str]:
        """The ledger for the terminal."""
        counts = self.as_json()
        rows = f"{self.num_rows_kept:,} of {self.num_rows_read:,} rows"
        tokens = f"{counts['tokens']:,} tokens: {self.num_tokens_trained:,} trained"
        result = [
            f"{self.name:<8} {rows}, {tokens}, {self.num_tokens_context:,} context; "
            f"longest {counts['length_max']}, median {counts['length_median']}"
        ]
        result += _named("dropped", self.dropped)
        if self.shortened:
            result += _named("shortened", {f"{self.num_turns_lost:,} turns lost": self.shortened})
        result += _named("suspect", self.suspicious)
        if self.duplicates:
            places = [place for group in self.duplicates for place in group["others"]]
            result += _named("repeated", {"the same as an earlier row": places})
        return result + [f"         note: {note}" for note in self.notes]


def _named(what: str, reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason, with the first places."""
    return [
        f"         {what} {len(places):,}: {reason} ({', '.join(places[:NAMED_ROWS])}"
        f"{' …' if len(places) > NAMED_ROWS else ''})"
        for reason, places in reasons.items()
    ]
