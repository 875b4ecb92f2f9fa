"""Regular expressions: groups, matches, and patterns that would never end."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.scorers import make


@pytest.mark.parametrize(
    ("kwargs", "written", "expected", "score"),
    [
        ({"pattern": r"answer: (\w+)"}, "The answer: blue .", "blue", 1),
        ({"pattern": r"answer: (\w+)"}, "The answer: red, answer: blue", "blue", 0),
        ({"pattern": r"answer: (\w+)"}, "blue", "blue", 0),
        ({"pattern": r"(?i)ANSWER:(.*)"}, "answer: blue \nred", "blue", 1),
        ({"pattern": r"(\d)(?P<unit>\w+)", "group": "unit"}, "5kg", "kg", 1),
        ({"pattern": r"(\d)(\w+)", "group": 2}, "5kg", "kg", 1),
        ({"pattern": r"(\d)(\w+)"}, "5kg", "kg", 0),
        ({"pattern": r"\d\w+", "group": 0}, "it is 5kg", "5kg", 1),
        ({"pattern": r"\d\w+", "group": 0}, "it is 6kg", "5kg", 0),
        ({"pattern": r"(a)|b"}, "b", "b", 0),
    ],
)
def test_the_group_is_compared(kwargs, written, expected, score):
    scorer = make("regex", kwargs)
    assert scorer.needs_expected
    assert scorer.score(written, [expected]) == score
    assert scorer.score(written, ["another", expected]) == score


def test_a_match_alone_counts_where_there_is_no_group():
    scorer = make("regex", {"pattern": r"^\w+, \w+$"})
    assert not scorer.needs_expected
    assert scorer.score("Hello, world", []) == 1
    assert scorer.score("Hello world", ["Hello world"]) == 0
    assert scorer.total(["a, b", "a b"], [[], []]) == 0.5


@given(st.text("ab1 ", max_size=12), st.sampled_from([r"(\w+) ", r"a(b*)", r"(?:a|b)(\d?)$"]))
def test_as_the_standard_library_finds_it(text, pattern):
    match = re.search(pattern, text)
    assert make("regex", {"pattern": pattern}).extract(text) == (match[1] if match else None)


def test_a_pattern_that_takes_too_long_is_an_error_and_no_score():
    scorer = make("regex", {"pattern": r"^(?:a|aa|b?a)+$"})
    assert scorer.score("aaa", []) == 1
    with pytest.raises(InputError, match="took longer than 1 s on the answer 'aaa"):
        scorer.score("a" * 60 + "!", [])
    with pytest.raises(InputError, match="^answer 2: regex: the pattern"):
        scorer.total(["a", "a" * 60 + "!"], [[], []])
