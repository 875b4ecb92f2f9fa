"""The numbers of several models on the same rows, side by side: JSON, table, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.comparison import Comparison, compare, smallest_p
from finetune.errors import CheckFailed, InputError
from finetune.scoring import Scores, TaskScore
from finetune.tasks import GROUP_COLUMNS

SAME_LOSS = 1e-4  # nats a token: two ways to compute one model's loss differ by less
LEVEL = 0.05  # chance of a false alarm of `--fail-if-worse` where the models are equal
LOSS = "loss"  # the one measure that is better the lower it is, and no share
_NUM_CHANGED = 10
Changed = tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Paired:
    """The first model beside another, row by row.

    Attributes:
        first: name of the model asked about.
        other: name of the one it is compared with.
        metrics: loss (lower is better), and every task by its name (higher is better; the mean of
            the rows' scores).
        changed: the rows whose loss differs most: place, nats a token of the first and the other.
        num_same_text: answers that are the same to the letter; None where none were asked for.
        amounts: of the metrics, those that are no shares.
    """

    first: str
    other: str
    metrics: dict[str, Comparison]
    changed: Changed
    num_same_text: int | None
    amounts: frozenset[str] = frozenset({LOSS})

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
        counts = [row.num_tokens for row in ours]
        assert counts == [row.num_tokens for row in theirs], "the same rows, the same tokens"
        sums = [[row.loss_sum for row in rows] for rows in (ours, theirs)]
        metrics[LOSS] = compare(sums[0], sums[1], counts, SAME_LOSS)
        changed = _most_changed(first, other)
    for name, task in first.tasks.items():
        weights = task.weights or (1.0,) * len(task.answers)
        scored = [
            [a.score * weight for a, weight in zip(answers, weights, strict=True)]
            for answers in (task.answers, other.tasks[name].answers)
        ]
        metrics[name] = compare(scored[0], scored[1], weights)
    same_text = None
    if asked := _written(first):
        pairs = zip(asked.answers, other.tasks[asked.task.name].answers, strict=True)
        same_text = sum(a.written == b.written for a, b in pairs)
    amounts = {LOSS, *(name for name, task in first.tasks.items() if not task.is_share)}
    return Paired(first.name, other.name, metrics, changed, same_text, frozenset(amounts))


def _written(scores: Scores) -> TaskScore | None:
    """The first task in which the model writes."""
    return next((task for task in scores.tasks.values() if task.generates), None)


def _most_changed(first: Scores, other: Scores) -> Changed:
    assert first.heldout is not None
    assert other.heldout is not None
    rows = [
        (where, ours.loss_sum / ours.num_tokens, theirs.loss_sum / ours.num_tokens)
        for where, ours, theirs in zip(
            first.places, first.heldout.rows, other.heldout.rows, strict=True
        )
        if ours.num_tokens
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
        is_worse = found.difference > SAME_LOSS if name == LOSS else found.difference < 0
        p_value = found.p_higher if name == LOSS else found.p_lower
        if is_worse and p_value < level:
            worse.append(f"{pair.first} is worse than {pair.other}: {_sentence(pair, name)}")
    if worse:
        raise CheckFailed("\n".join(worse))


def _sentence(pair: Paired, name: str) -> str:
    """One comparison in words."""
    found = pair.metrics[name]
    numbers = (found.difference, found.low, found.high)
    is_amount = name in pair.amounts
    amounts = [f"{x:+.4f}" if is_amount else f"{100 * x:+.1f} %" for x in numbers]
    better, worse = found.num_higher, found.num_lower
    if name == LOSS:
        better, worse = worse, better
    return (
        f"{_words(name)} {amounts[0]} (95 %: {amounts[1]} to {amounts[2]}), "
        f"p {found.p_value:.2g}; better on {better:,} rows, worse on {worse:,}, "
        f"same on {found.num_same:,}"
    )


def line(scores: Scores) -> str:
    """One model's numbers, while others are still being asked."""
    parts = []
    if scores.heldout:
        result = scores.heldout
        parts.append(f"loss {result.loss:.4f}, perplexity {result.perplexity:.2f}")
    for name, task in scores.tasks.items():
        total = f"{100 * task.score:.1f} %" if task.is_share else f"{task.score:.4f}"
        parts.append(f"{_words(name)} {total} of {len(task.answers):,}")
    return ", ".join(parts)


def as_json(scores: Sequence[Scores], against: Sequence[Paired]) -> dict[str, Any]:
    """The asked-about model's numbers at the top, the others under `against`."""
    result = scores[0].as_json()
    if against:
        result["against"] = [other.as_json() for other in scores[1:]]
        result["compared"] = {pair.other: pair.as_json() for pair in against}
        if _written(scores[0]):
            result["same_text"] = {pair.other: pair.num_same_text for pair in against}
    return result


def table(scores: Sequence[Scores], against: Sequence[Paired] = ()) -> str:
    """Models as columns, overall and by group; below, each difference with its interval."""
    has_loss = all(s.heldout for s in scores)
    rows: list[list[str]] = [["", *(s.name for s in scores)]]
    rows += _loss_rows(scores) if has_loss else []
    if (asked := _written(scores[0])) and against:
        same = [f"{pair.num_same_text}/{len(asked.answers)}" for pair in against]
        rows.append([f"same text as {scores[0].name}", "", *same])
    for name in scores[0].tasks:
        rows += _task_rows(name, [s.tasks[name] for s in scores])
    rows += _detail_rows(scores) if has_loss else []
    lines = _aligned(rows)
    for pair in against:
        lines += ["", f"{pair.first} against {pair.other}"]
        lines += [f"  {_sentence(pair, name)}" for name in pair.metrics]
    return "\n".join(lines)


def _loss_rows(scores: Sequence[Scores]) -> list[list[str]]:
    losses = [s.heldout for s in scores if s.heldout]
    return [
        ["loss", *(f"{loss.loss:.4f}" for loss in losses)],
        ["perplexity", *(f"{loss.perplexity:.2f}" for loss in losses)],
    ]


def _detail_rows(scores: Sequence[Scores]) -> list[list[str]]:
    """Other ways to see the loss, and the loss of parts."""
    accuracies = [s.heldout.token_accuracy for s in scores if s.heldout]
    rows = [
        ["bits per byte", *(_or_none(s.bits_per_byte, ".4f") for s in scores)],
        ["token accuracy", *(f"{100 * share:.1f} %" for share in accuracies)],
    ]
    if any(s.divergence for s in scores):
        found = [_or_none(s.divergence[0] if s.divergence else None, ".2g") for s in scores]
        rows.append(["KL from the trained", *found])
    for name, groups in (("source", "by_source"), ("answer", "by_turn")):
        parts = [getattr(s, groups)() for s in scores]
        if len(parts[0]) > 1:
            rows += [[f"  {name} {k}", *(f"{p[k].loss:.4f}" for p in parts)] for k in parts[0]]
    return rows


def _task_rows(name: str, found: Sequence[TaskScore]) -> list[list[str]]:
    rows = [[_words(name), *(_total(task) for task in found)]]
    for column in GROUP_COLUMNS:
        groups = [task.by_group(column) for task in found]
        for value in groups[0]:
            rows.append([f"  {column} {value}", *(_share(*group[value]) for group in groups)])
    return rows


def _words(name: str) -> str:
    return name.replace("_", " ")


def _or_none(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _total(task: TaskScore) -> str:
    """The score; with the count of right answers where every one is right or wrong."""
    if not task.is_share:
        return f"{task.score:.4f}"
    if all(answer.score in (0.0, 1.0) for answer in task.answers):
        right = sum(int(answer.score) for answer in task.answers)
        return _share(right, len(task.answers))
    return f"{100 * task.score:5.1f} %"


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


def _share(right: float, count: int) -> str:
    amount = f"{right:.0f}" if right == int(right) else f"{right:.1f}"
    return f"{100 * right / count:5.1f} % ({amount}/{count})"
