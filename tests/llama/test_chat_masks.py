"""Ids and masks where tools, a message's own choice and control tokens as text come together.

All texts hold what looks like control tokens: names and arguments of calls, results, schemas and
every role's words. The reference encodes them with libraries that know no control tokens, so that
equal ids mean: control ids stand where the format puts them, and nowhere else.
"""

from __future__ import annotations

import functools

import pytest
from chat_reference import DATE, Case, case_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tool_reference import CODE, conversations, reference, schemas, transcripts

from finetune.config.data import DataSection
from finetune.llama.chat import FORMATS
from finetune.rendering import Renderer
from finetune.shapes import Example

EXAMPLES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
train_on = st.sampled_from(["assistant", "last", "all"])
functions = st.lists(schemas, max_size=2)


@pytest.fixture(scope="module")
def case_of(shared, tmp_path_factory):
    """The small tokenizer of a format's kind."""

    @functools.cache
    def find(name: str) -> Case:
        kind = {"nano": "nano", "llama2": "llama2-small", "llama3": "llama3-small"}
        return case_files(kind.get(name, "llama3.1-small"), shared, tmp_path_factory.mktemp("case"))

    return find


def check(case: Case, name: str, messages, tools, chosen: str) -> None:
    rendered = FORMATS[name].render(case.tokenizer, messages, chosen, DATE, tools)
    ids, mask = reference(case, name, messages, tools, chosen)
    assert rendered.input_ids == ids
    assert rendered.train_mask == mask


@pytest.mark.parametrize("name", ["nano", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3"])
@EXAMPLES
@given(messages=conversations(), chosen=train_on)
def test_every_role_may_say_anything_and_choose(case_of, name, messages, chosen):
    check(case_of(name), name, messages, (), chosen)


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2", "llama3.3"])
@EXAMPLES
@given(messages=conversations(with_calls=True), tools=functions, chosen=train_on)
def test_calls_results_and_schemas_of_functions(case_of, name, messages, tools, chosen):
    check(case_of(name), name, messages, tools, chosen)


BUILTIN = ["brave_search", CODE]


@EXAMPLES
@given(messages=conversations(with_calls=True, builtin=BUILTIN), tools=functions, chosen=train_on)
def test_calls_of_built_in_tools(case_of, messages, tools, chosen):
    check(case_of("llama3.1"), "llama3.1", messages, [*BUILTIN, *tools], chosen)


@EXAMPLES
@given(messages=transcripts(), chosen=train_on)
def test_transcripts(case_of, messages, chosen):
    check(case_of("llama3.1"), "llama3.1-verbatim", messages, (), chosen)


@pytest.mark.parametrize("name", ["nano", "llama3", "llama3.1", "llama3.2"])
def test_a_system_message_that_is_not_to_be_trained_is_not(case_of, name):
    """Under `all` alone it makes a difference; the headers are no message's words."""
    case, messages = (
        case_of(name),
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ],
    )
    plain = FORMATS[name].render(case.tokenizer, messages, "all", DATE)
    messages[0]["train"] = False
    chosen = FORMATS[name].render(case.tokenizer, messages, "all", DATE)
    assert chosen.input_ids == plain.input_ids
    words = case.oracle("Be brief.")
    assert sum(plain.train_mask) - sum(chosen.train_mask) >= len(words) + 1  # and its end of turn


def exchanges_of(messages) -> tuple[list, list[list]]:
    """The system message, and what each user's message begins."""
    system, found = [], []
    for message in messages:
        if message["role"] == "system":
            system.append(message)
        elif message["role"] == "user":
            found.append([message])
        else:
            found[-1].append(message)
    return system, found


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.1", "llama3.2"])
@EXAMPLES
@given(data=st.data(), chosen=train_on)
def test_history_is_cut_to_the_longest_that_fits(case_of, name, data, chosen):
    """Every suffix of whole exchanges is rendered, and the first that fits is the one."""
    case, has_tools = case_of(name), name in ("llama3.1", "llama3.2")
    messages = data.draw(conversations(with_calls=has_tools))
    tools = tuple(data.draw(functions)) if has_tools else ()
    messages[-1]["content"] += "so"  # an answer that is empty is another reason
    system, exchanges = exchanges_of(messages)

    def render(rest):
        turns = [*system, *(m for exchange in rest for m in exchange)]
        return FORMATS[name].render(case.tokenizer, turns, chosen, None, tools)

    suffixes = [render(exchanges[n:]) for n in range(len(exchanges))]
    lengths = [len(row.input_ids) for row in suffixes]
    limit = data.draw(
        st.sampled_from([8, *lengths, *(n - 1 for n in lengths)]).filter(lambda n: n > 7)
    )
    section = DataSection(max_length=limit, on_overflow="truncate_history", train_on=chosen)
    row = Example("a:1", tuple(messages), tools=tools)
    (outcome,) = Renderer(section, case.tokenizer, FORMATS[name])([row])
    empty = [m for m in messages if m["role"] == "assistant" and not m.get("tool_calls")]
    empty = [m for m in empty if not m["content"].strip()]
    if any(m.get("train", chosen != "last") for m in empty):
        assert outcome.dropped == "with an empty answer among its answers"
        return
    fitting = next((n for n, length in enumerate(lengths) if length <= limit), None)
    if fitting is None:
        assert outcome.dropped == f"longer than data.max_length ({limit} tokens)"
        assert (outcome.documents, outcome.num_tokens_lost) == ([], lengths[0])
    elif not any(suffixes[fitting].train_mask[1:]):
        assert outcome.dropped == "without a trained token"
        assert (outcome.documents, outcome.num_tokens_lost) == ([], lengths[0])
    else:
        (document,) = outcome.documents
        assert document.input_ids == suffixes[fitting].input_ids
        assert document.train_mask == suffixes[fitting].train_mask
        assert outcome.num_tokens_lost == lengths[0] - lengths[fitting]
        assert outcome.num_turns_lost == sum(map(len, exchanges[:fitting]))
        kept = [*system, *(m for exchange in exchanges[fitting:] for m in exchange)]
        assert list(document.example.messages) == kept
