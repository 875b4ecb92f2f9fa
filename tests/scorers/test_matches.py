"""Exact and normalised match."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.scorers import make
from finetune.scorers.normalized_match import normalize


@given(st.text(" ab\n\t", max_size=4), st.text(" ab\n\t", max_size=4))
def test_exact_match_is_equality_but_for_white_space_around(written, expected):
    is_right = written.strip() == expected.strip()
    assert make("exact_match", {}).score(written, [expected]) == is_right


# By the rules of SQuAD's script, worked out by hand.
NORMALIZED = [
    ("The Eiffel Tower!", "eiffel tower"),
    ("an  apple, a day.", "apple day"),
    ("U.S.A.", "usa"),
    ("well-known", "wellknown"),
    ("the\tquick\n fox", "quick fox"),
    ("Theatre of Athens", "theatre of athens"),  # articles only as whole words
    ("A theory", "theory"),
    ("$1,000.50", "100050"),
    ("“Émile”", "“émile”"),  # punctuation is ASCII's alone
    ("the", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), NORMALIZED)
def test_known_normalisations(text, expected):
    assert normalize(text) == expected


WORDS = st.lists(
    st.sampled_from(["a", "an", "the", "The", "an-t", "hat's", "A.", "...", "the,", "THEN"])
)


@given(WORDS, st.sampled_from([" ", "  ", "\n", "\t "]))
def test_normalisation_word_by_word(words, space):
    stripped = ["".join(c for c in word.lower() if c not in string.punctuation) for word in words]
    kept = [word for word in stripped if word not in ("", "a", "an", "the")]
    assert normalize(space.join(words)) == " ".join(kept)


def test_the_best_over_the_accepted_answers():
    scorer = make("normalized_match", {})
    assert scorer.score("The Beatles.", ["Beatles band", "the beatles"]) == 1
    assert scorer.score("Beatles members", ["Beatles band", "the beatles"]) == 0
