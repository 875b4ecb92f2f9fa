"""Answers of several models side by side, chosen by rule and not by taste.

The first rows of the file, whatever they show; then rows where the model is right and the base is
not; then rows where the model is wrong. The last two are spread evenly over the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.reports.reading import Problems, listing, number, read_lines, text
from finetune.sharing import shared_text, without_secrets

if TYPE_CHECKING:
    from finetune.reports.results import ModelScores

NUM_EACH = 3
MAX_CHARACTERS = 1500  # of one text; what is left out is said
FULL_MARKS = 1.0


@dataclass(frozen=True)
class Clipped:
    """A text as it is shown.

    Attributes:
        text: at most MAX_CHARACTERS of it.
        num_left_out: characters after them.
    """

    text: str
    num_left_out: int


@dataclass(frozen=True)
class Written:
    """What one model wrote.

    Attributes:
        model: its name.
        text: the answer.
        score: 1 is right.
    """

    model: str
    text: Clipped
    score: float | None

    @property
    def is_right(self) -> bool:
        """Whether it has full marks."""
        return self.score is not None and self.score >= FULL_MARKS


@dataclass(frozen=True)
class Sample:
    """One question with every model's answer.

    Attributes:
        where: the row.
        why: which rule chose it.
        prompt: the question as rendered.
        expected: the answers of the data.
        written: base, then the model asked about; merged only where it differs from it.
    """

    where: str
    why: str
    prompt: Clipped
    expected: tuple[Clipped, ...]
    written: tuple[Written, ...]


@dataclass(frozen=True)
class Samples:
    """The rows of one task that a page shows.

    Attributes:
        chosen: in the order of the rules.
        num_rows: rows with an answer of the model asked about.
        counts: for each rule how many rows it fits.
    """

    chosen: tuple[Sample, ...] = ()
    num_rows: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)


def read_samples(
    result: Path, models: Sequence[ModelScores], problems: Problems
) -> dict[str, Samples]:
    """For each task with kept answers of the first model: the rows to show."""
    found = {}
    for task in models[0].tasks:
        answers: dict[str, list[dict[str, Any]]] = {}
        for model in models:
            file = _answers_file(result, task, model)
            if file is not None:
                answers[model.name] = list(read_lines(file, problems))
        if answers.get(models[0].name):
            found[task] = _choose(models[0].name, answers)
    return found


def _answers_file(result: Path, task: str, model: ModelScores) -> Path | None:
    """The file that a model's score names; it must lie in the folder of results."""
    score = model.tasks.get(task)
    if score is None:
        return None
    name = score.answers_file or f"answers/{result.stem}.{task}.{model.name}.jsonl"
    try:
        file, folder = (result.parent / name).resolve(), result.parent.resolve()
        return file if file.is_relative_to(folder) and file.is_file() else None
    except (OSError, ValueError):  # no name that a file can have
        return None


def _choose(first: str, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Samples:
    lines = answers[first]
    others = {name: _by_place(given) for name, given in answers.items() if name != first}
    keys = list(_keys(lines))
    base = [others["base"].get(key) for key in keys] if "base" in others else []
    rules = [("one of the first rows", list(range(len(lines)))), *_rules(first, lines, base)]
    chosen: dict[int, str] = {}
    for why, fitting in rules:
        free = [i for i in fitting if i not in chosen]
        for i in free[:NUM_EACH] if not chosen else _spread(free):
            chosen[i] = why
    samples = (_sample(first, lines[i], keys[i], others, why) for i, why in chosen.items())
    return Samples(tuple(samples), len(lines), {why: len(fitting) for why, fitting in rules[1:]})


def _rules(
    first: str, lines: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any] | None]
) -> Iterator[tuple[str, list[int]]]:
    """Rows that speak for the model, then rows that speak against it.

    Args:
        base: the base's line for each line; empty where it has none.
    """
    scores = [number(line.get("score")) or 0.0 for line in lines]
    theirs = [None if line is None else number(line.get("score")) or 0.0 for line in base]
    if {*scores, *theirs} <= {0.0, FULL_MARKS, None}:
        for_it, against_it = f"{first} right, base wrong", f"{first} wrong"
    else:
        for_it, against_it = f"{first} scores higher than base", f"{first} below full marks"
    if theirs:
        pairs = enumerate(zip(scores, theirs, strict=True))
        yield for_it, [i for i, (ours, other) in pairs if other is not None and ours > other]
    yield against_it, [i for i, ours in enumerate(scores) if ours < FULL_MARKS]


def _spread(rows: Sequence[int]) -> list[int]:
    """Some rows, evenly over all of them."""
    if len(rows) <= NUM_EACH:
        return list(rows)
    return [rows[(2 * part + 1) * len(rows) // (2 * NUM_EACH)] for part in range(NUM_EACH)]


def _keys(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """Place of each line and which one of that place it is."""
    seen: dict[str, int] = {}
    for line in lines:
        where = str(line.get("where"))
        seen[where] = seen.get(where, -1) + 1
        yield where, seen[where]


def _by_place(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    return dict(zip(_keys(lines), lines, strict=True))


def _sample(
    first: str,
    line: Mapping[str, Any],
    key: tuple[str, int],
    others: Mapping[str, Mapping[tuple[str, int], Mapping[str, Any]]],
    why: str,
) -> Sample:
    written = [_written(first, line)]
    for name, given in others.items():
        other = given.get(key)
        if other is None:
            continue
        if name == "merged" and other.get("written") == line.get("written"):
            continue
        written.append(_written(name, other))
    written.sort(key=lambda answer: answer.model != "base")
    expected = line.get("expected")
    texts = listing(expected) if isinstance(expected, list) else [expected]
    return Sample(
        where=shared_text(key[0]),
        why=why,
        prompt=_clipped(line.get("prompt")),
        expected=tuple(_clipped(one) for one in texts),
        written=tuple(written),
    )


def _written(model: str, line: Mapping[str, Any]) -> Written:
    return Written(model, _clipped(line.get("written")), number(line.get("score")))


def _clipped(value: Any) -> Clipped:
    whole = without_secrets(text(value) or ("" if value is None else str(value)))
    return Clipped(whole[:MAX_CHARACTERS], max(0, len(whole) - MAX_CHARACTERS))
