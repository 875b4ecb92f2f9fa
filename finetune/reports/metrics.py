"""metrics.jsonl as series of numbers, smoothed and thinned for drawing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.reports.reading import Problems, count, listing, number, read_lines
from finetune.sharing import shared_text

Numbers = npt.NDArray[np.float64]
Series = tuple[Numbers, Numbers]
MOST_BINS = 400  # of one drawn line; each gives its smallest and its largest value


@dataclass(frozen=True)
class Training:
    """What a run wrote while it trained.

    Attributes:
        steps: the lines of steps, each step once, in order.
        heldout: (step, held-out loss in nats a token), in order.
    """

    steps: tuple[dict[str, Any], ...] = ()
    heldout: tuple[tuple[int, float], ...] = ()

    @property
    def last_step(self) -> int:
        """The last step with a line; 0 without any."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def epoch(self) -> float | None:
        """Passes over the data at the last step."""
        return number(self.steps[-1].get("epoch")) if self.steps else None

    def series(self, name: str) -> Series:
        """(steps, values) of one column; what is no finite number is left out."""
        found = ((line["step"], number(line.get(name))) for line in self.steps)
        return _arrays([(step, value) for step, value in found if value is not None])

    def total(self, name: str) -> float:
        """The sum of a column."""
        return float(self.series(name)[1].sum())

    @property
    def speed(self) -> Series:
        """Tokens a second of each step: all it read, over the time it took."""
        pairs = []
        for line in self.steps:
            tokens, seconds = number(line.get("tokens")), number(line.get("seconds"))
            if tokens is not None and seconds:
                pairs.append((line["step"], tokens / seconds))
        return _arrays(pairs)

    @property
    def memory(self) -> tuple[str, Series] | None:
        """Name and values of the column that holds memory, where the run recorded one."""
        names = {key for line in self.steps[-1:] for key in line if "memory" in key}
        for name in sorted(names):
            series = self.series(name)
            if len(series[0]):
                return name, series
        return None

    @property
    def spikes(self) -> list[tuple[int, str]]:
        """(step, what spiked) of every spike."""
        return [
            (line["step"], shared_text(str(spike)))
            for line in self.steps
            for spike in listing(line.get("spikes"))
        ]

    @property
    def num_not_finite(self) -> int:
        """Steps whose loss is no finite number."""
        return sum("loss" in line and number(line["loss"]) is None for line in self.steps)


def read_training(path: Path, problems: Problems) -> Training:
    """Reads metrics.jsonl; of a step that was done again, what it gave the last time."""
    steps: dict[int, dict[str, Any]] = {}
    heldout: dict[int, float] = {}
    for line in read_lines(path, problems):
        step = count(line.get("step"))
        if step is None:
            continue
        if (loss := number(line.get("heldout_loss"))) is not None:
            heldout[step] = loss
        if "loss" in line:
            steps[step] = {**line, "step": step}
    return Training(
        tuple(steps[step] for step in sorted(steps)),
        tuple((step, heldout[step]) for step in sorted(heldout)),
    )


def _arrays(pairs: Sequence[tuple[float, float]]) -> Series:
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smoothed(values: Numbers, span: int) -> Numbers:
    """Each value with the ones before it, of which those `span` steps ago count 1/e as much.

    Weights are divided by their sum, so that the first values are not pulled to 0.
    """
    keep = float(np.exp(-1 / max(span, 1)))
    total = weight = 0.0
    result = np.empty_like(values)
    for place, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        result[place] = total / weight
    return result


def span_of(num_steps: int) -> int:
    """Over how many steps a curve of so many is smoothed: a fiftieth, at least 5."""
    return max(5, num_steps // 50)


def thinned(series: Series, most: int = MOST_BINS) -> Series:
    """A line that looks the same with fewer points: smallest and largest value of each bin."""
    steps, values = series
    if len(values) <= 2 * most:
        return series
    chosen = sorted({place for pair in _extremes(values, most) for place in pair})
    return steps[chosen], values[chosen]


def _extremes(values: Numbers, most: int) -> Iterator[tuple[int, int]]:
    edges = np.linspace(0, len(values), most + 1).astype(int)
    yield 0, len(values) - 1  # where the line begins and ends
    for start, end in itertools.pairwise(edges):
        part = values[start:end]
        yield start + int(part.argmin()), start + int(part.argmax())
