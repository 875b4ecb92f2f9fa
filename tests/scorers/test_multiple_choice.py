"""The choice with the lowest loss: as lm-evaluation-harness takes it, and divided by lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import CannotContinue, InputError
from finetune.scorers import make

LOSSES = st.floats(0, 100)
CHOICES = st.lists(st.tuples(LOSSES, st.text("abc ", min_size=1, max_size=9)), min_size=1)


def test_each_way_takes_another():
    losses, num_bytes, num_tokens = [6.0, 10.0, 9.0], [4, 20, 12], [2, 4, 6]
    chosen = {
        way: make("multiple_choice", {"normalize": way}).choose(losses, num_bytes, num_tokens)
        for way in ("none", "bytes", "tokens")
    }
    assert chosen == {"none": 0, "bytes": 1, "tokens": 2}


@given(CHOICES)
def test_as_the_harness_takes_them(choices):
    """acc: argmax of the log-likelihoods; acc_norm: of them divided by characters, here ASCII's."""
    log_likelihoods = np.array([-loss for loss, _ in choices])
    lengths = np.array([float(len(text)) for _, text in choices])
    losses = [loss for loss, _ in choices]
    num_bytes = [len(text.encode()) for _, text in choices]
    for way, scaled in (("none", log_likelihoods), ("bytes", log_likelihoods / lengths)):
        scorer = make("multiple_choice", {"normalize": way})
        assert scorer.choose(losses, num_bytes, [1] * len(choices)) == np.argmax(scaled)


def test_a_choice_that_cannot_be_made_is_not_made():
    scorer = make("multiple_choice", {"normalize": "tokens"})
    with pytest.raises(CannotContinue, match="loss is nan for choice 2, inf for choice 3"):
        scorer.choose([1.0, float("nan"), float("inf")], [1, 1, 1], [1, 1, 1])
    with pytest.raises(InputError, match="choice 2 is empty: it has no tokens"):
        scorer.choose([1.0, 2.0], [1, 0], [1, 0])
    with pytest.raises(InputError, match="the row has no choices"):
        scorer.choose([], [], [])


def test_choices_are_compared_as_texts():
    scorer = make("multiple_choice", {})
    assert scorer.score(" Paris", ["Paris"]) == 1
    assert scorer.score("paris", ["Paris"]) == 0
