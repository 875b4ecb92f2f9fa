"""The number an answer ends in: every row of GSM8K, many ways to write a number, what is none."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.scorers import make
from finetune.scorers.numeric import extract

WAYS = [
    "{grouped}",
    "${grouped}",
    "{plain}.",
    "The answer is {grouped}.",
    "the answer is: ${grouped}.00.",
    "So 3 + 4 of them. Final answer: **{plain}**",
    "**Answer:** {plain} dollars, that is in 7 days.",
    "We get $\\boxed{{{plain}}}$",
    "\\boxed{{\\${latex}}}",
    "2 and 3 make {plain}.00",
    "In 2 days __{grouped}__",
    "I think it is {grouped} apples",
    "First 5, then 6.\n#### {grouped}\n\nQuestion: and 9?",
    "#### ${plain}",
    "####{plain} eggs",
    "#### **{plain}**",
]


def written_as(way: str, value: Decimal) -> str:
    grouped = f"{value:,f}"
    return way.format(plain=f"{value:f}", grouped=grouped, latex=grouped.replace(",", "{,}"))


@pytest.mark.shared
def test_every_gold_answer_of_gsm8k_is_found_however_it_is_written(shared):
    scorer = make("numeric", {})
    rows = [json.loads(line) for line in shared("data/gsm8k_train.jsonl").open(encoding="utf-8")]
    assert len(rows) > 7000
    for number, row in enumerate(rows):
        gold = Decimal(row["answer"].split("####")[1].strip().replace(",", ""))
        assert extract(row["answer"]) == gold
        whole = gold == gold.to_integral_value()
        ways = [way for way in WAYS if whole or ".00" not in way]
        for way in ways:
            assert scorer.score(written_as(way, gold), [row["answer"]]) == 1, (row, way)
        way = ways[number % len(ways)]
        assert scorer.score(written_as(way, gold + 1), [row["answer"]]) == 0, (row, way)


@given(st.integers(-(10**12), 10**12), st.sampled_from([w for w in WAYS if "$" not in w]))
def test_whole_numbers_of_any_size_and_sign(value, way):
    text = written_as(way, Decimal(value))
    assert extract(text) == value
    assert extract(text.replace("-", "−")) == value


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=3))
def test_decimals(value):
    assert extract(f"{value:f}") == value
    assert extract(f"It costs ${abs(value):,f}.") == abs(value)


@given(st.integers(1, 999), st.integers(1, 999), st.integers(1, 20))
def test_equal_fractions_are_equal(above, below, factor):
    scorer = make("numeric", {})
    same = f"\\boxed{{\\frac{{{above * factor}}}{{{below * factor}}}}}"
    assert scorer.score(same, [f"{above}/{below}"]) == 1
    assert scorer.score(same, [f"{above + 1}/{below}"]) == 0
    assert extract(f"{above}/8") == Decimal(above) / 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-$5", -5),
        ("$-5", -5),
        ("(-5)", -5),
        ("10-5", 5),
        ("x=-7", -7),
        ("- 5 apples", 5),
        ("between 3-4", 4),
        ("25%", 25),
        ("12\\%", 12),
        ("€1,234.50", "1234.5"),
        (".5", "0.5"),
        ("$.75", "0.75"),
        ("1e6", 1000000),
        ("1.5E-3", "0.0015"),
        ("2 1/2 hours", "2.5"),
        ("3/4", "0.75"),
        ("5/0", 0),
        ("1\\frac{1}{2}", "1.5"),
        ("-\\frac{1}{2}", "-0.5"),
        ("1,\\!234", 1234),
        ("1\\,234", 1234),
        ("1\u202f234\u00a0567", 1234567),
        ("12,34", 34),
        ("1,2,3", 3),
        ("5 m2", 5),
        ("about 7 CO2", 7),
        ("60km", 60),
        ("3rd", 3),
        ("It is 5... really", 5),
        ("٤٢", 42),
        ("#### Step 1: add 2\n5", 5),
        ("#### Step one\nThe answer is 8. I used 3 steps.", 8),
        ("the answer is 3. No: the answer is 4. Done in 2 steps", 4),
        ("the answer is \\boxed{6}, not 7", 6),
        ("7. The answer is unknown", 7),
        ("#### five\n6", 6),
        ("#### 1\n#### 2", 1),
    ],
)
def test_what_a_number_is(text, value):
    assert extract(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "x2", "CO2", "####", "the answer is", "v", "²"])
def test_what_has_no_number(text):
    assert extract(text) is None
    assert make("numeric", {}).score(text, ["2"]) == 0


def test_the_tolerance_is_as_written_and_has_no_rounding():
    close = make("numeric", {"tolerance": 0.1})
    assert close.score("1.3", ["1.2"]) == 1  # in floats 1.3 - 1.2 is more than 0.1
    assert close.score("1.30000000000000000000001", ["1.2"]) == 0
    exact = make("numeric", {})
    assert exact.score("72.00", ["72"]) == 1
    assert exact.score("0.1" + "0" * 40 + "1", ["0.1"]) == 0
    assert exact.score("9" * 6000, ["9" * 6000]) == 1
    assert make("numeric", {"tolerance": 1}).score("7", ["6"]) == 1


@pytest.mark.timeout(60)  # a search from every mark to the end would take minutes
def test_long_texts_take_time_that_grows_with_their_length():
    for piece in ("#", "answer:", "1,", "1 ", "\\boxed{", "####1/", "- "):
        extract(piece * (60_000 // len(piece)))
