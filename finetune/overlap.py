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

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from finetune.errors import InputError
from finetune.ngrams import GramHasher, Hashes, digest, fold

EXACT, FOLDED, NEAR, SAME_PROMPT = "exact", "folded", "near", "same prompt"
BLOCKING = frozenset({EXACT, FOLDED, NEAR})

MAX_ROWS_WITH_IT = 10  # an n-gram in more training rows is boilerplate
DEFAULT_SHARE = 0.5

Key = TypeVar("Key", bound=Hashable)


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


def duplicates(rows: Sequence[RowText]) -> list[DuplicateGroup]:
    """Exact and folded duplicates inside one side, in the order of their first rows."""
    exact = [digest(row.prompt, row.answer) for row in rows]
    folded = [digest(fold(row.prompt), fold(row.answer)) for row in rows]
    first_exact, first_folded = _first_of(exact), _first_of(folded)
    groups: dict[tuple[int, str], list[str]] = {}
    for index, row in enumerate(rows):
        if (first := first_exact[exact[index]]) != index:
            groups.setdefault((first, EXACT), []).append(row.where)
        elif (first := first_folded[folded[index]]) != index:
            groups.setdefault((first, FOLDED), []).append(row.where)
    return [
        DuplicateGroup(kind, rows[first].where, tuple(others))
        for (first, kind), others in sorted(groups.items())
    ]


def overlap(
    train: Sequence[RowText],
    heldout: Sequence[RowText],
    share: float = DEFAULT_SHARE,
    max_rows_with_it: int = MAX_ROWS_WITH_IT,
) -> list[Overlap]:
    """Held-out rows that the training side has too: at most one finding a row, in held-out order.

    Time is linear in the words of both sides; memory some 100 bytes a word of the training side.

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
    side = _TrainSide([_row(row, hasher) for row in train], max_rows_with_it)
    findings = []
    for row in heldout:
        kind, other, found = side.find(_row(row, hasher), share)
        if other is not None:
            findings.append(Overlap(kind, row.where, train[other].where, found))
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
    prompt, answer = fold(row.prompt), fold(row.answer)
    return _Row(
        digest(row.prompt, row.answer),
        digest(prompt, answer),
        digest(prompt) if prompt else b"",
        digest(answer),
        hasher(prompt),
        hasher(answer),
    )


class _TrainSide:
    """The training side, to look held-out rows up in.

    Rows equal to an earlier one are left out, so that copies do not make a text boilerplate.
    """

    def __init__(self, rows: Sequence[_Row], max_rows_with_it: int) -> None:
        self._exact = _first_of(row.exact for row in rows)
        self._folded = _first_of(row.folded for row in rows)
        self._prompts = _first_of(row.prompt for row in rows)
        distinct = np.array(sorted(self._folded.values()), np.int64)
        self._limit = min(max_rows_with_it, max(2, len(distinct) // 2))
        grams = [np.union1d(rows[i].prompt_grams, rows[i].answer_grams) for i in distinct]
        holders = np.repeat(distinct, [len(held) for held in grams])
        flat = np.concatenate([np.zeros(0, np.uint64), *grams])
        order = np.argsort(flat)
        self._holders = holders[order]
        self._grams, self._starts, self._counts = np.unique(
            flat[order], return_index=True, return_counts=True
        )
        self._answers = [row.answer for row in rows]

    def find(self, row: _Row, share: float) -> tuple[str, int | None, float]:
        """Kind, index of the training row or None, and share."""
        if (other := self._exact.get(row.exact)) is not None:
            return EXACT, other, 1.0
        if (other := self._folded.get(row.folded)) is not None:
            return FOLDED, other, 1.0
        is_long = len(row.answer_grams) > 0
        other, found = self._by_long_answer(row) if is_long else self._by_short_answer(row)
        if other is not None and found >= share:
            return NEAR, other, found
        same = self._prompts.get(row.prompt) if row.prompt else None
        return SAME_PROMPT, same, found if is_long else 0.0

    def _by_long_answer(self, row: _Row) -> tuple[int | None, float]:
        num_counted, num_found, holders = self._look_up(row.answer_grams)
        if not num_found:
            return None, 0.0
        return _most_frequent(holders)[0], num_found / num_counted

    def _by_short_answer(self, row: _Row) -> tuple[int | None, float]:
        num_counted, _, holders = self._look_up(row.prompt_grams)
        holders = np.array([i for i in holders if self._answers[i] == row.answer], np.int64)
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


def _first_of(keys: Iterable[Key]) -> dict[Key, int]:
    """For each key the first index it has."""
    firsts: dict[Key, int] = {}
    for index, key in enumerate(keys):
        firsts.setdefault(key, index)
    return firsts
