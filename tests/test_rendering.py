"""Which answers may be empty; the rest of rendering: tests/llama/test_chat_masks.py."""

from __future__ import annotations

import pytest
from data_cache import chat

from finetune.config.data import DataSection
from finetune.llama.chat import FORMATS
from finetune.rendering import Renderer
from finetune.shapes import Example


@pytest.fixture
def outcome_of(nano_tokenizer):
    def render(messages, train_on: str):
        renderer = Renderer(DataSection(train_on=train_on), nano_tokenizer, FORMATS["nano"])
        (outcome,) = renderer([Example("a:1", tuple(messages))])
        return outcome

    return render


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("own", [None, True, False])
def test_an_empty_answer_may_be_context_and_is_never_trained(outcome_of, train_on, own):
    """A message's own choice goes before the config's here too."""
    messages = chat("Hi", " ", "Hello")["messages"]
    if own is not None:
        messages[1]["train"] = own
    outcome = outcome_of(messages, train_on)
    if own or (own is None and train_on != "last"):
        assert outcome.dropped == "with an empty answer among its answers"
        assert outcome.documents == []
    else:
        assert outcome.dropped is None and len(outcome.documents) == 1


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("answers", [[], [""], ["x", "\n"]])
def test_a_row_whose_last_answer_is_empty_is_dropped(outcome_of, train_on, answers):
    assert outcome_of(chat("Hi", *answers)["messages"], train_on).dropped == "without an answer"


@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_a_row_that_trains_nothing_is_dropped_with_its_tokens(outcome_of, train_on):
    messages = chat("Hi", "Hello", "More")["messages"]
    for message in messages[1::2]:
        message["train"] = False
    outcome = outcome_of(messages, train_on)
    assert outcome.dropped == "without a trained token"
    whole = outcome_of(chat("Hi", "Hello", "More")["messages"], train_on).documents[0]
    assert outcome.num_tokens_lost == len(whole.input_ids)
