"""Every documented way to write a message, a call or a tool; all others refused by name."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from row_samples import (
    ALPACA,
    ASSISTANT,
    CALL,
    CHAT,
    ROWS,
    SCHEMA,
    SHAREGPT,
    SYSTEM,
    TOOL,
    USER,
    only,
    refusal,
)

from finetune.shapes import iter_answers


@pytest.fixture
def file(tmp_path):
    """`file("rows.jsonl", rows)`."""

    def write(name: str, rows: list[Any]) -> Path:
        lines = name.endswith("l")
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


CALLING = ASSISTANT | {"content": "", "tool_calls": [CALL]}
OPENAI = {
    "id": "c1",
    "type": "function",
    "function": CALL | {"arguments": '{"a": 1, "b": [2, "é"]}'},
}
MESSAGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SYSTEM | {"content": "x"}, SYSTEM | {"content": "x"}),
    (USER | {"content": " x\n", "name": None, "tool_calls": None}, USER | {"content": " x\n"}),
    (USER | {"content": "x", "name": "Bo", "id": 3}, USER | {"content": "x"}),
    ({"role": "ipython", "content": "x"}, TOOL | {"content": "x"}),
    ({"role": "function", "content": {"a": None}}, TOOL | {"content": {"a": None}}),
    (TOOL | {"content": [1, {}], "tool_call_id": "c1"}, TOOL | {"content": [1, {}]}),
    (TOOL | {"content": None}, TOOL | {"content": None}),
    (TOOL | {"content": [{"type": "text", "text": "x"}]}, TOOL | {"content": "x"}),
    (USER | {"content": [{"type": "text", "text": t} for t in "ab"]}, USER | {"content": "ab"}),
    (ASSISTANT | {"content": None, "tool_calls": [OPENAI]}, CALLING),
    (ASSISTANT | {"tool_calls": [{"function": CALL}]}, CALLING),
    (ASSISTANT | {"content": "", "tool_calls": [CALL | {"id": "c1", "type": "function"}]}, CALLING),
    (ASSISTANT | {"content": None, "function_call": OPENAI["function"]}, CALLING),
    (
        ASSISTANT | {"content": "Wait", "tool_calls": [OPENAI, OPENAI]},
        ASSISTANT | {"content": "Wait", "tool_calls": [CALL, CALL]},
    ),
    (ASSISTANT | {"content": "x", "tool_calls": []}, ASSISTANT | {"content": "x"}),
    (ASSISTANT | {"content": "x", "train": False}, ASSISTANT | {"content": "x", "train": False}),
    (ASSISTANT | {"content": "x", "weight": 1}, ASSISTANT | {"content": "x", "train": True}),
    (ASSISTANT | {"content": "x", "weight": 0.0}, ASSISTANT | {"content": "x", "train": False}),
    (USER | {"content": "x", "train": False}, USER | {"content": "x", "train": False}),
]


@pytest.mark.parametrize(("written", "expected"), MESSAGES)
def test_every_way_to_write_a_message_is_read(file, written, expected):
    assert only(file("rows.json", [{"messages": [written]}])).messages == (expected,)


def test_every_sharegpt_role_is_read(file):
    value = json.dumps(CALL)
    ours = {
        "user": ["human", "user"],
        "assistant": ["gpt", "assistant", "chatgpt", "bing"],
        "tool": ["observation", "tool", "function_response"],
        "system": ["system"],
    }
    for role, names in ours.items():
        for name in names:
            row = {"conversations": [{"from": name, "value": "x", "weight": None}]}
            assert only(file("rows.json", [row])).messages == ({"role": role, "content": "x"},)
    for written in (
        value,
        CALL,
        json.dumps([CALL]),
        json.dumps(CALL | {"arguments": json.dumps(CALL["arguments"])}),
    ):
        row = {"conversations": [{"from": "function_call", "value": written}]}
        assert only(file("rows.json", [row])).messages == (CALLING,)
    row = {"conversation": SHAREGPT, "system": "Be brief.", "id": 1}
    example = only(file("rows.json", [row]))
    assert list(example.messages) == [SYSTEM | {"content": "Be brief."}, *CHAT]
    assert example.extra == {"id": 1}


@pytest.mark.parametrize("shape", ["sharegpt", "messages", "prompt_completion"])
@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (None, ()),
        ("", ()),
        ("[]", ()),
        ([], ()),
        ([SCHEMA], (SCHEMA,)),
        (json.dumps([SCHEMA, "brave_search"]), (SCHEMA, "brave_search")),
        ([{"type": "function", "function": SCHEMA}], ({"type": "function", "function": SCHEMA},)),
    ],
)
def test_tools_are_read_as_they_stand(file, shape, tools, expected):
    example = only(file("rows.json", [ROWS[shape] | {"tools": tools}]))
    assert (example.tools, list(example.messages)) == (expected, CHAT)
    assert example.extra == {}


def test_answers_inside_a_prompt_are_context(file):
    more = [*CHAT, USER | {"content": "More"}]
    row = {"prompt": more, "completion": [CHAT[1]]}
    marked = [CHAT[0], CHAT[1] | {"train": False}, more[2], CHAT[1]]
    assert list(only(file("rows.json", [row])).messages) == marked
    for prompt, completion in (("Hi", CHAT[1]), (CHAT[0], "Hello"), (SHAREGPT[:1], SHAREGPT[1])):
        row = {"prompt": prompt, "completion": completion}
        assert list(only(file("rows.json", [row])).messages) == CHAT


def test_answers_are_the_assistants_texts():
    assert list(iter_answers([*CHAT, CALLING, TOOL | {"content": {"a": 1}}])) == ["Hello", ""]


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": [*messages]}


def gpt(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"conversations": [*messages], **columns}


def calls(*entries: Any) -> dict[str, Any]:
    return chat(CHAT[0], ASSISTANT | {"content": None, "tool_calls": [*entries]})


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": "Hi"}, "messages is text; expected a list of {role, content}"),
    ({"messages": []}, "messages is an empty list; expected a list of {role, content}"),
    (chat(CHAT[0], "Hello"), "messages[1] is text; expected an object with role and content"),
    (chat(CHAT[0], ASSISTANT), "messages[1].content is missing; expected text"),
    (chat(CHAT[0], {"content": "x"}), "messages[1].role is missing"),
    (chat(USER | {"content": None}), "messages[0].content is null; expected text"),
    (chat(USER | {"content": []}), "messages[0].content is a list; expected text"),
    (chat(USER | {"content": {"a": 1}}), "messages[0].content is an object; expected text"),
    (chat(USER | {"content": [IMAGE]}), "messages[0].content[0] is of type image_url; only parts"),
    (chat(USER | {"content": ["x"]}), "messages[0].content[0] is text; expected an object"),
    (
        chat(CHAT[0] | {"audio": 1, "refusal": "x"}),
        "messages[0] has audio, refusal, which is not r",
    ),
    (
        chat({"role": "narrator", "content": "x"}),
        "the role 'narrator'; allowed: system, user, assist",
    ),
    (
        chat({"role": "developer", "content": "x"}),
        "'developer', which Llama does not have; write sy",
    ),
    (
        chat({"role": "Hi, you", "content": "user"}),
        "has 'Hi, you' in role and 'user' in content: they",
    ),
    (
        chat({"role": "How are you?", "content": "x"}),
        "has text in role, 'How are you?'; allowed: sys",
    ),
    (
        chat(*SHAREGPT),
        "messages[0] has from and value, not role and content; that is format: sharegpt, ",
    ),
    (
        chat(USER | {"content": "x", "tool_calls": [CALL]}),
        "messages[0] has tool calls; only an assis",
    ),
    (
        chat(USER | {"content": "x", "python_tag": True}),
        "messages[0] has python_tag; only an assistant's",
    ),
    (chat(ASSISTANT | {"content": "x", "python_tag": 1}), "messages[0].python_tag is a number"),
    (chat(ASSISTANT | {"content": "x", "end": "eos"}), 'end is "eos"; allowed: eot or eom'),
    (
        chat(ASSISTANT | {"content": "x", "train": "no"}),
        "messages[0].train is text; allowed: true or",
    ),
    (
        chat(ASSISTANT | {"content": "x", "weight": 0.5}),
        "messages[0].weight is 0.5; allowed: 0 or 1",
    ),
    (chat(CHAT[1] | {"weight": 1, "train": True}), "messages[0] has train and weight"),
    (calls("add"), "messages[1].tool_calls[0] is text; expected {"),
    (calls({"name": "add"}), "tool_calls[0].arguments is missing; expected an object"),
    (
        calls({"name": "", "arguments": {}}),
        "tool_calls[0].name is text; expected the function's name",
    ),
    (calls(CALL | {"arguments": "a=1"}), "tool_calls[0].arguments is text that is not JSON"),
    (calls(CALL | {"arguments": "[1]"}), "tool_calls[0].arguments is a list; expected an object"),
    (calls(CALL | {"arguments": '{"a":1,"a":2}'}), "arguments is text that has the key 'a' twice"),
    (calls(CALL | {"parameters": {}}), "tool_calls[0] has parameters, which is not read"),
    (calls({"type": "code", "function": CALL}), "tool_calls[0].type is 'code'; allowed: function"),
    (chat(CALLING | {"function_call": CALL}), "messages[0] has function_call and tool_calls"),
    (chat(*CHAT) | {"tools": {"a": 1}}, "tools is an object; expected a list of tools"),
    (chat(*CHAT) | {"tools": "none"}, "tools is text that is not JSON"),
    (chat(*CHAT) | {"tools": [5]}, "tools[0] is a number; expected a name or"),
    (chat(*CHAT) | {"tools": ["add two numbers"]}, "tools[0] is text that is no tool's name"),
    (
        chat(*CHAT) | {"tools": [{"type": "function"}]},
        "tools[0] has no name; expected a function's",
    ),
    (
        gpt(*CHAT),
        "conversations[0] has role and content, not from and value; that is format: messages",
    ),
    (gpt({"from": "human", "value": 5}), "conversations[0].value is a number; expected text"),
    (
        gpt({"from": "narrator", "value": "x"}),
        "the role 'narrator'; allowed: system, human, user, gpt",
    ),
    (
        gpt({"from": "Hi", "value": "human"}),
        "has 'Hi' in from and 'human' in value: they are swapped",
    ),
    (
        gpt({"from": "gpt", "value": "x", "markdown": "y"}),
        "conversations[0] has markdown, which is no",
    ),
    (
        gpt({"from": "function_call", "value": "add(1)"}),
        "conversations[0].value is text that is not J",
    ),
    (gpt({"from": "function_call", "value": "[]"}), "conversations[0].value calls nothing"),
    (gpt({"from": "function_call", "value": '{"name": "f"}'}), ".value.arguments is missing"),
    (gpt({"from": "system", "value": "x"}, system="y"), "has a system column and a system message"),
    (gpt(*SHAREGPT, system=5), "system is a number; expected text"),
    ({"instruction": 5, "output": "x"}, "instruction is a number; expected text"),
    ({"instruction": "x", "output": ["y"]}, "output is a list; expected text"),
    ({"instruction": "x", "input": 0, "output": "y"}, "input is a number; expected text"),
    ({"instruction": "x", "system": False, "output": "y"}, "system is a bool; expected text"),
    (ALPACA | {"history": "x"}, "history is text; expected a list of [user, assistant]"),
    (ALPACA | {"history": [["x"]]}, "history[0] is not a pair of texts [user, assistant]"),
    ({"prompt": "x", "completion": 1.5}, "completion is a number; expected text"),
    (
        {"prompt": CHAT, "completion": CHAT},
        "completion begins with a user message, not an assistant's",
    ),
    ({"question": "x", "answer": {"text": ["y"]}}, "answer is an object; expected text"),
    (
        {"instruction": "x", "instances": []},
        "instances is a list; expected a list of {input, output}",
    ),
    ({"instruction": "x", "instances": [{"input": "y"}]}, "instances[0].output is missing"),
    ({"instruction": "x", "instances": [{"output": "y", "z": 1}]}, "instances[0] has z; it holds"),
    ({"text": {"a": 1}}, "text is an object; expected text"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=[says for _, says in BAD_ROWS])
def test_rows_that_hold_something_else_are_refused_with_their_place(file, row, says):
    path = file("rows.jsonl", [row])
    (finding,) = refusal(path)
    assert finding.startswith(f"{path}:1: ")
    assert says in finding


NO_JSON = [
    datetime.date(2026, 1, 2),
    datetime.datetime(2026, 1, 2, 3, 4),
    decimal.Decimal("1.50"),
    b"bytes",
    float("nan"),
]


@pytest.mark.parametrize("value", NO_JSON, ids=lambda value: type(value).__name__)
def test_what_a_table_holds_and_json_cannot_say_is_no_tool_and_no_call(tmp_path, value):
    """The model reads them as JSON; which text is meant is for the person to say."""
    tool = {"name": "add", "parameters": {"since": {"default": value}}}
    call = CALLING | {"tool_calls": [CALL | {"arguments": {"since": value}}]}
    for messages, tools, where in (
        (CHAT, [tool], "tools[0].parameters.since.default is"),
        ([USER | {"content": "x"}, call], [], "messages[1].tool_calls[0].arguments.since is"),
    ):
        rows = {"messages": [messages], **({"tools": [tools]} if tools else {})}
        parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
        (finding,) = refusal(tmp_path / "rows.parquet")
        assert where in finding and "write it as text" in finding
