"""Differences between two models: intervals that cover, tests that keep their promise."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from finetune import comparison
from finetune.comparison import compare, smallest_p


def drawn(kind: str, chance: np.random.Generator, num_rows: int):
    """(first minus other for each row, weights, the true difference per unit of weight)."""
    weights = np.ceil(chance.lognormal(3, 0.8, num_rows))  # tokens of a row
    if kind == "losses":
        return weights * 0.05 + chance.normal(0, 1, num_rows) * np.sqrt(weights), weights, 0.05
    if kind == "heavy tails":
        rest = chance.standard_t(3, num_rows) * np.sqrt(weights)
        return weights * 0.05 + rest, weights, 0.05
    if kind == "skewed":
        each = chance.gamma(2, 1, num_rows) - 2 + 0.1
        return weights * each, weights, 0.1
    places = chance.random(num_rows)  # right or wrong: one model alone is right on a few rows
    apart = np.where(places < 0.2, 1.0, np.where(places < 0.32, -1.0, 0.0))
    return apart, np.ones(num_rows), 0.08


@pytest.fixture
def few_draws(monkeypatch):
    """400 draws for each of very many comparisons."""
    monkeypatch.setattr(comparison, "_LEAST_DRAWS", 400)
    monkeypatch.setattr(comparison, "_NUM_ENTRIES", 1)


# Rows: where few of them carry most of the difference, 200 are too few for any such interval.
KINDS = {"losses": 200, "right or wrong": 200, "heavy tails": 500, "skewed": 500}


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_95_percent_cover_as_often_as_they_say(kind, few_draws, monkeypatch):
    """1,000 comparisons; 93 to 97 of 100 intervals hold the true difference."""
    monkeypatch.setattr(comparison, "_p_values", lambda *_: (1.0, 1.0, 1.0))
    chance, held = np.random.default_rng(1), 0
    for number in range(1000):
        apart, weights, true = drawn(kind, chance, KINDS[kind])
        found = compare(apart, np.zeros(len(apart)), weights, seed=number)
        held += found.low <= true <= found.high
    assert 930 <= held <= 970


@pytest.mark.parametrize("kind", ["equal losses", "equal answers"])
def test_equal_models_are_told_apart_as_rarely_as_the_level_says(kind, few_draws, monkeypatch):
    """1,000 comparisons of 200 rows at 5 %: binomial, 36 to 65 false alarms in 99 of 100 cases."""
    monkeypatch.setattr(comparison, "_interval", lambda *_: (0.0, 0.0))
    chance, alarms, one_sided = np.random.default_rng(2), 0, 0
    for number in range(1000):
        if kind == "equal losses":
            weights = np.ceil(chance.lognormal(3, 0.8, 200))
            apart = chance.standard_t(3, 200) * np.sqrt(weights)
        else:
            weights = None
            apart = chance.choice([-1.0, 0.0, 1.0], 200, p=[0.15, 0.7, 0.15])
        found = compare(apart, np.zeros(200), weights, seed=number)
        alarms, one_sided = alarms + (found.p_value < 0.05), one_sided + (found.p_higher < 0.05)
    fewest = 36 if kind == "equal losses" else 20  # answers come in whole numbers: p is coarser
    assert fewest <= alarms <= 65
    assert fewest <= one_sided <= 65


def test_the_difference_is_of_sums_over_sums():
    found = compare([10.0, 1.0], [8.0, 2.0], [100, 1])
    assert found.difference == pytest.approx(1 / 101, rel=1e-12)
    assert (found.num_higher, found.num_lower, found.num_same) == (1, 1, 0)


def test_every_exchange_of_few_rows_is_counted():
    apart = [3.0, -1.0, 2.0, 0.5, 2.5]
    sums = [np.dot(signs, apart) for signs in itertools.product([1, -1], repeat=5)]
    found = compare(apart, [0.0] * 5)
    assert found.p_higher == sum(s >= 7.0 for s in sums) / 32
    assert found.p_lower == sum(s <= 7.0 for s in sums) / 32
    assert found.p_value == sum(abs(s) >= 7.0 for s in sums) / 32


def test_drawn_exchanges_agree_with_the_exact_test(monkeypatch):
    chance = np.random.default_rng(3)
    apart = chance.normal(0.4, 1, 12)
    exact = compare(apart, np.zeros(12))
    monkeypatch.setattr(comparison, "_ALL_EXCHANGES", 0)
    sampled = compare(apart, np.zeros(12))
    for side in ("p_value", "p_higher", "p_lower"):
        assert getattr(sampled, side) == pytest.approx(getattr(exact, side), abs=0.02)


def test_exchanged_models_have_the_opposite_difference():
    chance = np.random.default_rng(4)
    first, other, weights = chance.normal(1, 1, 300), chance.normal(0.9, 1, 300), np.full(300, 2)
    there, back = compare(first, other, weights), compare(other, first, weights)
    assert back.difference == -there.difference
    assert (back.num_higher, back.num_lower) == (there.num_lower, there.num_higher)
    assert (back.p_higher, back.p_lower) == pytest.approx((there.p_lower, there.p_higher), abs=0.02)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=0.01)


def test_a_model_is_not_told_apart_from_itself():
    found = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [4, 5, 6])
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert (found.p_value, found.p_higher, found.p_lower, found.num_same) == (1.0, 1.0, 1.0, 3)


def test_rounding_is_no_win():
    found = compare([10.0 + 1e-4, 20.0], [10.0, 20.0 + 1e-4], [10, 10], same=1e-4)
    assert (found.num_higher, found.num_lower, found.num_same) == (0, 0, 2)


def test_one_row_has_no_interval_and_json_says_null():
    found = compare([2.0], [1.0])
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.p_higher == 0.5 == smallest_p(1)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["low"] is None


@pytest.mark.parametrize("num_rows", [3, 12, 13, 500])
def test_the_least_p_is_reached(num_rows):
    found = compare([1.0] * num_rows, [0.0] * num_rows).p_higher
    assert smallest_p(num_rows) <= found <= 4 * smallest_p(num_rows)


def test_many_rows_take_little_memory_and_the_same_seed_gives_the_same():
    chance = np.random.default_rng(5)
    apart = chance.normal(0.01, 1, 20_000)
    assert compare(apart, np.zeros(20_000)) == compare(apart, np.zeros(20_000))
