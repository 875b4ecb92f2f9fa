"""Two models on the same rows: how far apart, and whether that is more than chance.

    difference = Σ first_i / Σ weight_i - Σ other_i / Σ weight_i

A row is the unit of chance. The interval draws rows anew with replacement, the same for both models
(paired bootstrap), and takes the quantiles of the studentised difference, which cover better than
plain percentiles where rows differ much in size. The test exchanges the two models' names row by
row: p is the share of exchanges whose difference is at least as large, the found one among them.
Coverage, measured (`tests/test_comparison.py`): docs/evaluation.md.

Sources: Efron and Tibshirani 1993, chapters 12 (bootstrap-t) and 15 (permutations); Cochran 1977,
chapter 6 (variance of a ratio); Phipson and Smyth 2010 (p of a sampled test is never 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

COVERAGE = 0.95
_NUM_DRAWS = 10_000
_LEAST_DRAWS = 1000
_NUM_ENTRIES = 100_000_000  # of all draws together; fewer draws where there are very many rows
_BLOCK_ENTRIES = 4_000_000
_ALL_EXCHANGES = 12  # rows up to which every exchange is tried
_SAME = 1e-9  # relative: sums in another order
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What two models' numbers on the same rows say.

    Attributes:
        difference: first minus other, per unit of weight.
        low: of the 95 % interval; nan with fewer than two rows.
        high: of the 95 % interval.
        p_value: chance of a difference at least as far from 0 if the models were equal.
        p_higher: chance of one at least as high.
        p_lower: chance of one at least as low.
        num_higher: rows on which the first model's number is higher.
        num_lower: rows on which it is lower.
        num_same: rows on which it is the same, within what was given as that.
    """

    difference: float
    low: float
    high: float
    p_value: float
    p_higher: float
    p_lower: float
    num_higher: int
    num_lower: int
    num_same: int

    def as_json(self) -> dict[str, Any]:
        """Of the result's files; what is not a number is null."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def compare(
    first: Sequence[float],
    other: Sequence[float],
    weights: Sequence[float] | None = None,
    same: float = 0.0,
    seed: int = 0,
) -> Comparison:
    """Compares two models row by row.

    Args:
        first: a number for each row (a loss sum, a score).
        other: of the other model, the same rows in the same order.
        weights: what each row's number is a sum over (its trained tokens); None: one each.
        same: a difference per unit of weight that counts as none in the counts of rows.
        seed: of the draws.
    """
    assert len(first) == len(other) > 0, "the same rows, and at least one"
    sizes = np.ones(len(first)) if weights is None else np.asarray(weights, np.float64)
    apart = np.asarray(first, np.float64) - np.asarray(other, np.float64)
    low, high = _interval(apart, sizes, np.random.default_rng([seed, 0]))
    p_value, p_higher, p_lower = _p_values(apart, np.random.default_rng([seed, 1]))
    higher, lower = int((apart > same * sizes).sum()), int((apart < -same * sizes).sum())
    counts = (higher, lower, len(apart) - higher - lower)
    difference = float(apart.sum() / sizes.sum())
    return Comparison(difference, low, high, p_value, p_higher, p_lower, *counts)


def smallest_p(num_rows: int) -> float:
    """The least p of one side that so many rows can give: every one of them on that side."""
    return 0.5**num_rows if num_rows <= _ALL_EXCHANGES else max(0.5**num_rows, 1 / (_NUM_DRAWS + 1))


def _interval(apart: Numbers, sizes: Numbers, chance: np.random.Generator) -> tuple[float, float]:
    if len(apart) < 2:
        return math.nan, math.nan
    found, error = _ratio(apart, sizes)
    if error == 0.0:  # every row has the same difference
        return float(found), float(found)
    pivots = []
    for count in _blocks(len(apart)):
        rows = chance.integers(0, len(apart), (count, len(apart)))
        drawn, its_error = _ratio(apart[rows], sizes[rows])
        # Draws without any spread say nothing of how far a difference lies from its mean.
        spread = its_error > 0
        pivots.append((drawn - found)[spread] / its_error[spread])
    pivot = np.concatenate(pivots)
    tails = [(1 + COVERAGE) / 2, (1 - COVERAGE) / 2]
    upper, lower = np.quantile(pivot, tails, method="weibull")
    return float(found - upper * error), float(found - lower * error)


def _ratio(apart: Numbers, sizes: Numbers) -> tuple[Any, Any]:
    """Σ apart / Σ sizes along the last axis, and its standard error."""
    total, count = sizes.sum(-1), apart.shape[-1]
    ratio = apart.sum(-1) / total
    squares, crossed, sizes_squared = (
        np.einsum("...i,...i->...", one, other)
        for one, other in ((apart, apart), (apart, sizes), (sizes, sizes))
    )
    # Σ (apart - ratio · sizes)²; what is left of equal rows is rounding, and none.
    rest = squares - 2 * ratio * crossed + ratio**2 * sizes_squared
    rest = np.where(rest > _SAME * squares, rest, 0.0)
    return ratio, np.sqrt(rest * count / (count - 1)) / total


def _p_values(apart: Numbers, chance: np.random.Generator) -> tuple[float, float, float]:
    """Of both sides, the higher and the lower; weights are the same in every exchange."""
    apart = apart[apart != 0]  # exchanging equals changes nothing
    if not len(apart):
        return 1.0, 1.0, 1.0
    found, slack = apart.sum(), _SAME * np.abs(apart).sum()
    counts, num_draws = np.zeros(3), 0
    for signs in _exchanges(len(apart), chance):
        sums = signs @ apart
        beyond = [abs(sums) >= abs(found) - slack, sums >= found - slack, sums <= found + slack]
        counts += [side.sum() for side in beyond]
        num_draws += len(sums)
    if len(apart) > _ALL_EXCHANGES:  # what was found is one of the exchanges
        counts, num_draws = counts + 1, num_draws + 1
    both, higher, lower = counts / num_draws
    return float(both), float(higher), float(lower)


def _exchanges(num_rows: int, chance: np.random.Generator) -> Iterator[Numbers]:
    """Rows of +1 and -1: every one there is, or drawn."""
    if num_rows <= _ALL_EXCHANGES:
        numbers = np.arange(2**num_rows)[:, None] >> np.arange(num_rows)
        yield (1 - 2 * (numbers & 1)).astype(np.float64)
        return
    for count in _blocks(num_rows):
        drawn = chance.integers(0, 2, (count, num_rows), dtype=np.int8)
        yield (1 - 2 * drawn).astype(np.float64)


def _blocks(num_rows: int) -> Iterator[int]:
    """How many draws at a time, so that memory stays small."""
    left = max(min(_NUM_DRAWS, _NUM_ENTRIES // num_rows), _LEAST_DRAWS)
    while left:
        block = min(left, max(_BLOCK_ENTRIES // num_rows, 1))
        yield block
        left -= block
