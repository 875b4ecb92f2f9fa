"""The numbers of several models on the same rows, side by side: JSON, table, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.comparison import Comparison, compare, smallest_p
from finetune.errors import CheckFailed, InputError
from finetune.scoring import GROUP_COLUMNS, Scores

SAME_LOSS = 1e-4  # nats a token: two ways to compute one model's loss differ by less
LEVEL = 0.05  # chance of a false alarm of `--fail-if-worse` where the models are equal
_NUM_CHANGED = 10
Changed = tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Paired:
    """The first model beside another, row by row.

    Attributes:
        first: name of the model asked about.
        other: name of the one it is compared with.
        metrics: loss (lower is better) and exact_match (higher is better), where both have it.
        changed: the rows whose loss differs most: place, nats a token of the first and the other.
        num_same_text: answers that are the same to the letter; None where none were asked for.
    """

    first: str
    other: str
    metrics: dict[str, Comparison]
    changed: Changed
    num_same_text: int | None

    def as_json(self) -> dict[str, Any]:
        """For the result's file."""
        found: dict[str, Any] = {name: c.as_json() for name, c in self.metrics.items()}
        keys = ("where", "loss", "loss_of_other")
        found["most_changed"] = [dict(zip(keys, row, strict=True)) for row in self.changed]
        return found


def paired(first: Scores, other: Scores) -> Paired:
    """Compares two models that were scored on the same rows."""
    metrics: dict[str, Comparison] = {}
    changed: Changed = ()
    if first.heldout and other.heldout:
        ours, theirs = first.heldout.rows, other.heldout.rows
        counts = [count for _, count in ours]
        assert counts == [count for _, count in theirs], "the same rows, the same tokens"
        sums = [[loss for loss, _ in rows] for rows in (ours, theirs)]
        metrics["loss"] = compare(sums[0], sums[1], counts, SAME_LOSS)
        changed = _most_changed(first, other)
    same_text = None
    if first.answers and other.answers:
        right = [[float(a.is_right) for a in scores.answers] for scores in (first, other)]
        metrics["exact_match"] = compare(right[0], right[1])
        pairs = zip(first.answers, other.answers, strict=True)
        same_text = sum(a.written == b.written for a, b in pairs)
    return Paired(first.name, other.name, metrics, changed, same_text)


def _most_changed(first: Scores, other: Scores) -> Changed:
    assert first.heldout is not None
    assert other.heldout is not None
    rows = [
        (where, ours / count, theirs / count)
        for where, (ours, count), (theirs, _) in zip(
            first.places, first.heldout.rows, other.heldout.rows, strict=True
        )
        if count
    ]
    rows.sort(key=lambda row: -abs(row[1] - row[2]))
    return tuple(row for row in rows[:_NUM_CHANGED] if abs(row[1] - row[2]) > SAME_LOSS)


def refuse_worse(against: Sequence[Paired]) -> None:
    """Fails where the first model is worse by more than chance.

    One model that is equal to all others fails in at most `LEVEL` of all cases: the level is
    divided among the metrics and models. A loss within `SAME_LOSS` is no difference.

    Raises:
        CheckFailed: it is; the message has every difference.
        InputError: so few rows that nothing could fail.
    """
    judged = [(p, name, c) for p in against for name, c in p.metrics.items()]
    level = LEVEL / len(judged)
    worse = []
    for pair, name, found in judged:
        num_rows = found.num_higher + found.num_lower + found.num_same
        if smallest_p(num_rows) >= level:
            raise InputError(
                f"--fail-if-worse: {num_rows} rows are too few: even if all of them were worse, "
                f"that would be chance in {100 * smallest_p(num_rows):.1f} % of all cases, and "
                f"{100 * level:.1f} % are the limit"
            )
        is_worse = found.difference > SAME_LOSS if name == "loss" else found.difference < 0
        p_value = found.p_higher if name == "loss" else found.p_lower
        if is_worse and p_value < level:
            worse.append(f"{pair.first} is worse than {pair.other}: {_sentence(name, found)}")
    if worse:
        raise CheckFailed("\n".join(worse))


def _sentence(name: str, found: Comparison) -> str:
    """One comparison in words."""
    if name == "loss":
        amounts = [f"{x:+.4f}" for x in (found.difference, found.low, found.high)]
        better, worse = found.num_lower, found.num_higher
    else:
        amounts = [f"{100 * x:+.1f} %" for x in (found.difference, found.low, found.high)]
        better, worse = found.num_higher, found.num_lower
    return (
        f"{name.replace('_', ' ')} {amounts[0]} (95 %: {amounts[1]} to {amounts[2]}), "
        f"p {found.p_value:.2g}; better on {better:,} rows, worse on {worse:,}, "
        f"same on {found.num_same:,}"
    )


def line(scores: Scores) -> str:
    """One model's numbers, while others are still being asked."""
    parts = []
    if scores.heldout:
        result = scores.heldout
        parts.append(f"loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
    if scores.exact_match is not None:
        parts.append(f"exact match {100 * scores.exact_match:.1f} % of {len(scores.answers)}")
    return ", ".join(parts)


def as_json(scores: Sequence[Scores], against: Sequence[Paired]) -> dict[str, Any]:
    """The asked-about model's numbers at the top, the others under `against`."""
    result = scores[0].as_json()
    if against:
        result["against"] = [other.as_json() for other in scores[1:]]
        result["compared"] = {pair.other: pair.as_json() for pair in against}
        if scores[0].answers:
            result["same_text"] = {pair.other: pair.num_same_text for pair in against}
    return result


def table(scores: Sequence[Scores], against: Sequence[Paired] = ()) -> str:
    """Models as columns, overall and by group; below, each difference with its interval."""
    rows: list[list[str]] = [["", *(s.name for s in scores)]]
    if all(s.heldout for s in scores):
        rows.append(["loss", *(f"{s.heldout.loss:.4f}" for s in scores if s.heldout)])
        rows.append(["perplexity", *(f"{s.heldout.perplexity:.2f}" for s in scores if s.heldout)])
    if all(s.answers for s in scores):
        count = len(scores[0].answers)
        if against:
            same = [f"{pair.num_same_text}/{count}" for pair in against]
            rows.append([f"same text as {scores[0].name}", "", *same])
        rows.append(["exact match", *(_share(_overall(s)) for s in scores)])
        for column in GROUP_COLUMNS:
            groups = [s.by_group(column) for s in scores]
            for value in groups[0]:
                rows.append([f"  {column} {value}", *(_share(g[value]) for g in groups)])
    lines = _aligned(rows)
    for pair in against:
        lines += ["", f"{pair.first} against {pair.other}"]
        lines += [f"  {_sentence(name, found)}" for name, found in pair.metrics.items()]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _overall(scores: Scores) -> tuple[int, int]:
    return sum(a.is_right for a in scores.answers), len(scores.answers)


def _share(right_of: tuple[int, int]) -> str:
    right, count = right_of
    return f"{100 * right / count:5.1f} % ({right}/{count})"
