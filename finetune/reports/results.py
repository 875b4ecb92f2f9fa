"""eval/*.json as numbers of models on the same rows. Older files lack some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.reports.reading import Problems, count, listing, mapping, number, read_object, text
from finetune.reports.samples import Samples, read_samples
from finetune.sharing import shared, shared_name, shared_text

SAME_LOSS = 1e-4  # nats a token; as in the comparison itself (docs/evaluation.md)
LEVEL = 0.05
HELDOUT = "heldout"


@dataclass(frozen=True)
class TaskScore:
    """One model's answers in one task.

    Attributes:
        score: mean over the answers; higher is better.
        num_answers: answers scored.
        num_errors: answers that could not be scored.
        groups: column -> value -> (right, of).
        answers_file: relative to eval/.
    """

    score: float | None
    num_answers: int | None = None
    num_errors: int = 0
    groups: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    answers_file: str | None = None


@dataclass(frozen=True)
class ModelScores:
    """One model on the rows.

    Attributes:
        name: adapter, model, merged, base, or a folder's last part.
        numbers: loss, perplexity, token_accuracy, bits_per_byte, tokens, rows, kl_from_trained.
        by_source: file -> the same numbers.
        by_turn: place of the answer in its row -> the same numbers.
        tasks: name -> score.
    """

    name: str
    numbers: Mapping[str, float]
    by_source: Mapping[str, Mapping[str, float]]
    by_turn: Mapping[str, Mapping[str, float]]
    tasks: Mapping[str, TaskScore]


@dataclass(frozen=True)
class Difference:
    """The model asked about minus another, in one metric.

    Attributes:
        metric: loss, or a task.
        other: the other model.
        difference: first minus other.
        low: of the 95 % interval.
        high: of it.
        p_value: chance of so large a difference between equal models.
        num_better: rows on which the first is better.
        num_worse: rows on which it is worse.
        num_same: rows on which both are the same.
    """

    metric: str
    other: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    num_better: int
    num_worse: int
    num_same: int

    @property
    def verdict(self) -> str:
        """better, worse, or level: no more than chance, or than rounding."""
        same = abs(self.difference) <= SAME_LOSS if self.metric == "loss" else not self.difference
        if same or self.p_value is None or self.p_value >= LEVEL:
            return "level"
        return "better" if (self.difference < 0) == (self.metric == "loss") else "worse"


@dataclass(frozen=True)
class Result:
    """One evaluation.

    Attributes:
        name: of its file: heldout, or that of the data.
        data: the rows' file, where it is said.
        created: when, where it is said.
        models: the one asked about, then the others.
        differences: of the first from each other one.
        most_changed: other model -> rows whose loss differs most.
        same_text: other model -> answers that are the same to the letter.
        samples: task -> answers side by side.
    """

    name: str
    data: str | None
    created: str | None
    models: tuple[ModelScores, ...]
    differences: tuple[Difference, ...]
    most_changed: Mapping[str, tuple[tuple[str, float, float], ...]]
    same_text: Mapping[str, int]
    samples: Mapping[str, Samples]

    def against(self, other: str) -> tuple[Difference, ...]:
        """The differences from one other model."""
        return tuple(d for d in self.differences if d.other == other)

    @property
    def tasks(self) -> list[str]:
        """Every task that some model was asked."""
        return list(dict.fromkeys(name for model in self.models for name in model.tasks))


def read_results(folder: Path, problems: Problems) -> Iterator[Result]:
    """Every evaluation of a run, the one on its own held-out rows first."""
    files = sorted(folder.glob("*.json"), key=lambda path: (path.stem != HELDOUT, path.name))
    for path in files:
        found = read_object(path, problems)
        if not found:
            continue
        models = tuple(_model(one) for one in (found, *listing(found.get("against"))))
        if not any(model.numbers or model.tasks for model in models):
            problems.append(shared_text(f"{path}: holds no numbers of an evaluation"))
            continue
        yield _result(path, found, models, problems)


def _result(
    path: Path, found: Mapping[str, Any], models: tuple[ModelScores, ...], problems: Problems
) -> Result:
    compared = mapping(found.get("compared"))
    data, created = text(found.get("data") or found.get("text")), text(found.get("created"))
    return Result(
        name=shared_text(path.stem),
        data=shared_text(data) if data else None,
        created=created,
        models=models,
        differences=tuple(d for other in compared for d in _differences(other, compared[other])),
        most_changed={
            shared_name(other): rows
            for other in compared
            if (rows := tuple(_changed(mapping(compared[other]).get("most_changed"))))
        },
        same_text={
            shared_name(other): same
            for other, value in mapping(found.get("same_text")).items()
            if (same := count(value)) is not None
        },
        samples=read_samples(path, models, problems),
    )


def _model(found: Any) -> ModelScores:
    found = mapping(found)
    name = text(found.get("model")) or "model"
    tasks = {task: _task(value) for task, value in mapping(found.get("tasks")).items()}
    if "exact_match" in found and "exact_match" not in tasks:  # of before there were more tasks
        same = {"score": found["exact_match"], **{k: found.get(k) for k in ("answers", "groups")}}
        tasks["exact_match"] = _task(same)
    return ModelScores(
        name=shared_name(name) if name else "model",
        numbers=_numbers(found),
        by_source=_parts(found.get("by_source")),
        by_turn=_parts(found.get("by_turn")),
        tasks=tasks,
    )


_METRICS = (
    *("loss", "perplexity", "token_accuracy", "bits_per_byte", "tokens", "rows"),
    "kl_from_trained",
)


def _numbers(found: Any) -> dict[str, float]:
    values = {key: number(mapping(found).get(key)) for key in _METRICS}
    return {key: value for key, value in values.items() if value is not None}


def _parts(found: Any) -> dict[str, dict[str, float]]:
    parts = {key: _numbers(value) for key, value in shared(mapping(found)).items()}
    return {key: numbers for key, numbers in parts.items() if numbers}


def _task(found: Any) -> TaskScore:
    found = mapping(found)
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for column, values in shared(mapping(found.get("groups"))).items():
        for value, pair in mapping(values).items():
            right, of = ([number(x) for x in listing(pair)] + [None, None])[:2]
            if right is not None and of:
                groups.setdefault(column, {})[value] = (right, of)
    return TaskScore(
        score=number(found.get("score")),
        num_answers=count(found.get("answers")),
        num_errors=count(found.get("errors")) or 0,
        groups=groups,
        answers_file=text(found.get("answers_file")),
    )


def _differences(other: str, compared: Any) -> Iterator[Difference]:
    for metric, found in mapping(compared).items():
        difference = number(mapping(found).get("difference"))
        if difference is None:
            continue
        higher, lower, same = (
            count(found.get(f"num_{name}")) or 0 for name in ("higher", "lower", "same")
        )
        better, worse = (lower, higher) if metric == "loss" else (higher, lower)
        low, high, p_value = (number(found.get(key)) for key in ("low", "high", "p_value"))
        yield Difference(
            metric, shared_name(other), difference, low, high, p_value, better, worse, same
        )


def _changed(found: Any) -> Iterator[tuple[str, float, float]]:
    for row in listing(found):
        row = mapping(row)
        ours, theirs = number(row.get("loss")), number(row.get("loss_of_other"))
        if ours is not None and theirs is not None:
            yield shared_text(str(row.get("where"))), ours, theirs
