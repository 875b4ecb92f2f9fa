"""Rows that are the same or nearly so: inside one side of the data, and across its two sides.

A held-out row that the model was trained on measures memory, not learning. For each held-out row
the gravest kind that holds is reported:

| kind | what the training side has | blocks |
|---|---|---|
| exact | the same prompt and answer, to the character | yes |
| folded | the same prompt and answer after `fold` | yes |
| near | most 13-grams of the answer; if it is too short to have any: the same answer after `fold` \
and most 13-grams of the prompt, in one row | yes |
| same prompt | the same prompt after `fold`, with another answer | no |

The answer decides, since rows may share a passage, a template or a system prompt and still ask
different things. 13-grams that more than ten training rows have are boilerplate: they count neither
as found nor as missing. Source: Brown et al. 2020 (GPT-3), arXiv:2005.14165, appendix C: grams are
lower-case words without punctuation, 13 of them for texts long enough, and those in more than ten
training documents are ignored. There one shared gram is enough; here a share of them is asked for,
as one common sentence is no leak.

What this does not see: one changed word hides up to 13 grams, so at a share of 1/2 a text with k
changed words is sure to be found from 12 + 26 k words on, and one of under 13 words is compared
whole. A template with more than ten variants in the training side is boilerplate, its next variant
included. A short text quoted in a long one, a paraphrase and a translation are not near.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.errors import InputError
from finetune.ngrams import GramHasher, Hashes, digest, fold

EXACT, FOLDED, NEAR, SAME_PROMPT = "exact", "folded", "near", "same prompt"
BLOCKING = frozenset({EXACT, FOLDED, NEAR})

MAX_ROWS_WITH_IT = 10  # an n-gram in more training rows is boilerplate
DEFAULT_SHARE = 0.5


@dataclass(frozen=True)
class RowText:
    """The texts of one row.

    Attributes:
        where: `file:row`.
        prompt: what the model reads: system and user messages, joined; empty for plain text.
        answer: what it learns to write: the assistant's messages, joined; or the plain text.
    """

    where: str
    prompt: str
    answer: str

    @functools.cached_property
    def folded_prompt(self) -> str:
        """`fold` of the prompt; every check asks for it."""
        return fold(self.prompt)

    @functools.cached_property
    def folded_answer(self) -> str:
        """`fold` of the answer."""
        return fold(self.answer)

    def digests(self) -> TextDigests:
        """What equal rows have in common."""
        return TextDigests(
            digest(self.prompt, self.answer), digest(self.folded_prompt, self.folded_answer)
        )


class TextDigests(NamedTuple):
    """Hashes of a row's texts: as they are, and after `fold`."""

    exact: bytes
    folded: bytes


@dataclass(frozen=True)
class DuplicateGroup:
    """Rows of one side that are equal.

    Attributes:
        kind: exact or folded.
        first: place of the row that comes first.
        others: places of the rows that repeat it. A surplus row is in one group only: the others
            of all groups are the rows to take out so that none is there twice.
    """

    kind: str
    first: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """A held-out row that the training side has too, or almost.

    Attributes:
        kind: exact, folded, near or same prompt.
        where: place of the held-out row.
        other: place of the training row: the first that is equal, or shares most n-grams.
        share: 1 if equal; else the part (0 to 1) of the held-out answer's n-grams that the training
            side has. Near by a short answer: of the prompt's n-grams that the row `other` has.
    """

    kind: str
    where: str
    other: str
    share: float

    @property
    def blocks(self) -> bool:
        """Whether scores on the held-out side mean little until the row is gone."""
        return self.kind in BLOCKING


def duplicates(rows: Iterable[RowText]) -> list[DuplicateGroup]:
    """Exact and folded duplicates inside one side, in the order of their first rows."""
    finder = DuplicateFinder()
    for row in rows:
        finder.add(row.where, row.digests())
    return finder.groups()


class DuplicateFinder:
    """`duplicates`, one row after the other; keeps two hashes and the place of each row."""

    def __init__(self) -> None:
        self._exact: dict[bytes, int] = {}
        self._folded: dict[bytes, int] = {}
        self._places: list[str] = []
        self._others: dict[tuple[int, str], list[str]] = {}

    def add(self, where: str, digests: TextDigests) -> None:
        """Looks the row up among those before it."""
        index = len(self._places)
        self._places.append(where)
        first_exact = self._exact.setdefault(digests.exact, index)
        first_folded = self._folded.setdefault(digests.folded, index)
        if first_exact != index:
            self._others.setdefault((first_exact, EXACT), []).append(where)
        elif first_folded != index:
            self._others.setdefault((first_folded, FOLDED), []).append(where)

    def groups(self) -> list[DuplicateGroup]:
        """The groups so far, in the order of their first rows."""
        return [
            DuplicateGroup(kind, self._places[first], tuple(others))
            for (first, kind), others in sorted(self._others.items())
        ]


def overlap(
    train: Iterable[RowText],
    heldout: Sequence[RowText],
    share: float = DEFAULT_SHARE,
    max_rows_with_it: int = MAX_ROWS_WITH_IT,
) -> list[Overlap]:
    """Held-out rows that the training side has too: at most one finding a row, in held-out order.

    The training side is read once, one row after the other. Time is linear in the words of both
    sides; memory some 100 bytes a word of the held-out side, and of a training row.

    Args:
        share: part of the n-grams (over 0, up to 1) from which on a row is near.
        max_rows_with_it: n-grams that more training rows have are boilerplate. In small data so
            are those that more than half of the rows have. Equal rows count as one.

    Raises:
        InputError: one of them is outside its range.
    """
    if not 0 < share <= 1 or max_rows_with_it < 1:
        raise InputError(
            f"share {share}, max_rows_with_it {max_rows_with_it}; "
            "allowed: over 0 up to 1, and 1 or more"
        )
    hasher = GramHasher()
    held = [_row(row, hasher) for row in heldout]
    side = _TrainSide(held, max_rows_with_it)
    for row in train:
        side.add(row.where, _row(row, hasher))
    side.finish()
    findings = []
    for row, hashes in zip(heldout, held, strict=True):
        kind, other, found = side.find(hashes, share)
        if other is not None:
            findings.append(Overlap(kind, row.where, other, found))
    return findings


class _Row(NamedTuple):
    """What is kept of a row's texts; the grams of each text are sorted and distinct."""

    exact: bytes
    folded: bytes
    prompt: bytes
    answer: bytes
    prompt_grams: Hashes
    answer_grams: Hashes


def _row(row: RowText, hasher: GramHasher) -> _Row:
    prompt, answer = row.folded_prompt, row.folded_answer
    return _Row(
        *row.digests(),
        digest(prompt) if prompt else b"",
        digest(answer),
        hasher(prompt),
        hasher(answer),
    )


class _TrainSide:
    """What the training side has of the held-out rows.

    Rows equal to an earlier one are left out of the n-grams, so that copies do not make a text
    boilerplate.
    """

    def __init__(self, heldout: Sequence[_Row], max_rows_with_it: int) -> None:
        self._max_rows = max_rows_with_it
        grams = [np.union1d(row.prompt_grams, row.answer_grams) for row in heldout]
        self._wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]))
        keys = ("exact", "folded", "prompt")
        self._firsts: dict[str, dict[bytes, str | None]] = {
            key: {getattr(row, key): None for row in heldout} for key in keys
        }
        self._seen: set[bytes] = set()  # folded hashes of all rows
        self._hits: list[Hashes] = []
        self._hit_places: list[str] = []
        self._hit_answers: list[bytes] = []

    def add(self, where: str, row: _Row) -> None:
        """One more training row."""
        for key, firsts in self._firsts.items():
            value = getattr(row, key)
            if value in firsts and firsts[value] is None:
                firsts[value] = where
        if row.folded in self._seen:
            return
        self._seen.add(row.folded)
        grams = np.union1d(row.prompt_grams, row.answer_grams)
        hits = grams[_is_in(grams, self._wanted)]
        if len(hits):
            self._hits.append(hits)
            self._hit_places.append(where)
            self._hit_answers.append(row.answer)

    def finish(self) -> None:
        """To be called after the last row and before `find`."""
        self._limit = min(self._max_rows, max(2, len(self._seen) // 2))
        holders = np.repeat(np.arange(len(self._hits)), [len(hits) for hits in self._hits])
        flat = np.concatenate([np.zeros(0, np.uint64), *self._hits])
        order = np.argsort(flat, kind="stable")  # stable: the rows of a gram stay in order
        self._holders = holders[order]
        self._grams, self._starts, self._counts = np.unique(
            flat[order], return_index=True, return_counts=True
        )

    def find(self, row: _Row, share: float) -> tuple[str, str | None, float]:
        """Kind, place of the training row or None, and share."""
        if (where := self._firsts["exact"][row.exact]) is not None:
            return EXACT, where, 1.0
        if (where := self._firsts["folded"][row.folded]) is not None:
            return FOLDED, where, 1.0
        is_long = len(row.answer_grams) > 0
        other, found = self._by_long_answer(row) if is_long else self._by_short_answer(row)
        if other is not None and found >= share:
            return NEAR, self._hit_places[other], found
        same = self._firsts["prompt"][row.prompt] if row.prompt else None
        return SAME_PROMPT, same, found if is_long else 0.0

    def _by_long_answer(self, row: _Row) -> tuple[int | None, float]:
        num_counted, num_found, holders = self._look_up(row.answer_grams)
        if not num_found:
            return None, 0.0
        return _most_frequent(holders)[0], num_found / num_counted

    def _by_short_answer(self, row: _Row) -> tuple[int | None, float]:
        num_counted, _, holders = self._look_up(row.prompt_grams)
        holders = np.array([i for i in holders if self._hit_answers[i] == row.answer], np.int64)
        if not len(holders):
            return None, 0.0
        other, num_shared = _most_frequent(holders)
        return other, num_shared / num_counted

    def _look_up(self, grams: Hashes) -> tuple[int, int, npt.NDArray[np.int64]]:
        """Of grams that are no boilerplate: how many, how many found, and the rows of those."""
        if not len(self._grams):
            return len(grams), 0, np.zeros(0, np.int64)
        places = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        places = places[self._grams[places] == grams]
        rare = places[self._counts[places] <= self._limit]
        ranges = [slice(self._starts[p], self._starts[p] + self._counts[p]) for p in rare]
        holders = [self._holders[held] for held in ranges]
        num_counted = len(grams) - len(places) + len(rare)
        return num_counted, len(rare), np.concatenate([np.zeros(0, np.int64), *holders])


def _most_frequent(values: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The value that occurs most (of several the smallest), and how often."""
    distinct, counts = np.unique(values, return_counts=True)
    best = int(counts.argmax())
    return int(distinct[best]), int(counts[best])


def _is_in(values: Hashes, wanted: Hashes) -> npt.NDArray[np.bool_]:
    """Which values occur in the sorted `wanted`."""
    if not len(wanted):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
    found: npt.NDArray[np.bool_] = wanted[places] == values
    return found
