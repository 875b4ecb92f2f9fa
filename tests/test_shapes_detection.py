"""What is not plain is asked for, and what is proposed works; the real files beside the clone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from row_samples import ALPACA, CHAT, ROWS, SHAREGPT, proposed, read, refusal

from finetune.config.data import Source
from finetune.files import find_files

GPT, BAD = SHAREGPT[1], {"from": "gpt", "value": "Go away"}
TAIL, REJECTED = CHAT[1], {"role": "assistant", "content": "Go away"}


@pytest.fixture
def file(tmp_path):
    def write(rows: list[dict[str, Any]]) -> Path:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return tmp_path / "rows.json"

    return write


PREFERENCES: dict[str, dict[str, Any]] = {
    "message after conversations": {"conversations": SHAREGPT[:1], "chosen": GPT, "rejected": BAD},
    "messages after messages": {"messages": CHAT[:1], "chosen": [TAIL], "rejected": [REJECTED]},
    "whole conversations": {"chosen": CHAT, "rejected": [CHAT[0], REJECTED]},
    "whole beside a prompt": {"prompt": "Hi", "chosen": CHAT, "rejected": [CHAT[0], REJECTED]},
    "whole from/value": {"chosen": SHAREGPT, "rejected": [SHAREGPT[0], BAD]},
    "texts": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "messages after a text": {"prompt": "Hi", "chosen": [TAIL], "rejected": [REJECTED]},
    "message after a text": {"prompt": "Hi", "chosen": TAIL, "rejected": REJECTED},
    "message after messages": {"prompt": CHAT[:1], "chosen": TAIL, "rejected": REJECTED},
    "text after messages": {"prompt": CHAT[:1], "chosen": "Hello", "rejected": "Go away"},
    "alpaca": {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go away"},
    "question": {"system": "", "question": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "KTO": {"messages": CHAT, "label": False},
    "KTO tag": {"conversations": SHAREGPT, "kto_tag": True},
    "KTO of texts": {"prompt": "Hi", "completion": "Hello", "label": True},
    "KTO of a table": {"prompt": "Hi", "completion": "Hello", "label": "False"},
}


@pytest.mark.parametrize("layout", PREFERENCES)
def test_preference_data_is_refused_and_the_proposed_reading_works(file, layout):
    path = file([PREFERENCES[layout]] * 2)
    (finding,) = refusal(path)
    assert finding.startswith(f"{path}:1: is preference data (")
    shape, columns = proposed(finding)
    Source(path="x", format=shape, columns=columns or None)
    found, examples = read(path, shape, columns)
    assert found == shape
    assert [list(e.messages) for e in examples] == [CHAT] * 2
    assert set(examples[0].extra) & {"rejected", "label", "kto_tag"}


def test_preference_data_further_down_is_refused_too(file):
    path = file([{"messages": CHAT}, PREFERENCES["KTO"], {"messages": CHAT}])
    (finding,) = refusal(path)
    assert finding.startswith(f"{path}:2: is preference data (KTO)")
    assert len(read(path, "messages")[1]) == 3


def test_preferences_that_are_no_conversation_are_refused_without_a_proposal(file):
    for chosen in ("\n\nHuman: Hi\n\nAssistant: Hello", [{"role": []}], 5, ["x"], {}):
        (finding,) = refusal(file([{"chosen": chosen, "rejected": "x"}]))
        assert "preference data (chosen, rejected); to train on the chosen answer, " in finding
        is_list_of_messages = chosen == [{"role": []}]
        assert ("its chosen column is no conversation" in finding) != is_list_of_messages


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (ALPACA | {"text": "x"}, "columns instruction, input, output, text fit alpaca and text"),
        (ROWS["messages"] | ROWS["prompt_completion"], "fit messages and prompt_completion"),
        (ALPACA | {"response": "x"}, "fit alpaca and question_answer"),
        (ROWS["sharegpt"] | ROWS["messages"], "fit sharegpt and messages"),
    ],
)
def test_a_row_of_several_shapes_is_asked_for(file, row, says):
    path = file([row])
    (finding,) = refusal(path)
    assert says in finding
    shapes = says.partition("fit ")[2].split(" and ")
    for shape in shapes:
        assert f"format: {shape} reads" in finding
        assert len(read(path, shape)[1]) == 1


def test_two_pairs_of_question_and_answer_are_asked_for(file):
    path = file([{"question": "a", "answer": "b", "query": "c", "response": "d"}])
    assert "has question/answer and query/response; say which is meant" in refusal(path)[0]
    _, (example,) = read(path, "question_answer", {"question": "query", "answer": "response"})
    assert [m["content"] for m in example.messages] == ["c", "d"]
    path = file([{"question": "a", "prompt": "c", "response": "d"}])
    assert "has prompt and question; say by columns" in refusal(path)[0]


UNKNOWN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "other names": ({"Question": "Hi", "reply": "Hello", "id": 7}, ["Hi", "Hello"]),
    "with system": (
        {"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"},
        ["Be brief.", "Hi", "Hello"],
    ),
    "with context": ({"problem": "Add", "context": "1 2", "solution": "3"}, ["Add\n\n1 2", "3"]),
    "input and output": ({"input": "Hi", "output": "Hello"}, ["Hi", "Hello"]),
    "turns": ({"dialogue": CHAT, "id": 7}, ["Hi", "Hello"]),
    "from and value": ({"turns": SHAREGPT}, ["Hi", "Hello"]),
    "one text": ({"poem": "Hi"}, ["Hi"]),
    "document": ({"content": "Hi", "url": "x"}, ["Hi"]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_row_of_no_shape_is_refused_and_the_proposed_reading_works(file, name):
    row, texts = UNKNOWN[name]
    path = file([row])
    (finding,) = refusal(path)
    assert f"{path}:1: columns {', '.join(row)} fit no format that is read; format: " in finding
    assert "would make it one. Formats: alpaca (instruction, input (optional), output); " in finding
    _, (example,) = read(path, *proposed(finding))
    assert [m["content"] for m in example.messages] + [example.text] * bool(example.text) == texts


def test_a_row_that_says_nothing_gets_no_guess(file):
    (finding,) = refusal(file([{"a": "x", "b": 5}]))
    assert "name its columns, as in columns: {instruction: …, output: …}" in finding
    assert "columns none fit no format" in refusal(file([{}]))[0]


def test_a_column_that_the_shape_would_lose_is_asked_for(file):
    dolly = {"instruction": "Add", "context": "1 2", "response": "3", "category": "qa"}
    path = file([dolly | {"context": ""}, dolly])
    (finding,) = refusal(path)
    assert finding.startswith(
        f"{path}:2: fits question_answer, which does not read its column conte"
    )
    shape, columns = proposed(finding.partition("; format: question_answer")[2])
    assert (shape, columns) == ("alpaca", {"output": "response", "input": "context"})
    _, examples = read(path, shape, columns)
    assert [e.messages[0]["content"] for e in examples] == ["Add", "Add\n\n1 2"]
    _, examples = read(path, "question_answer")
    assert examples[1].extra == {"context": "1 2", "category": "qa"}


REAL: dict[str, tuple[str, dict[str, str], int]] = {
    "alpaca_en_demo.json": ("alpaca", {}, 999),
    "c4_demo.jsonl": ("text", {}, 300),
    "dpo_en_demo.json": (
        "prompt_completion",
        {"prompt": "conversations", "completion": "chosen"},
        300,
    ),
    "glaive_toolcall_en_demo.json": ("sharegpt", {}, 300),
    "gsm8k_train.jsonl": ("question_answer", {}, 7473),
    "instructions_1100.json": ("alpaca", {}, 1100),
    "kto_en_demo.json": ("messages", {}, 300),
    "seed_tasks.jsonl": ("seed_tasks", {}, 175),
    "sharegpt_dummy_conversation.json": ("sharegpt", {}, 500),
    "tinyshakespeare.txt": ("text", {}, 1),
    "torchtune_chat_tiny.json": ("sharegpt", {}, 1),
    "torchtune_hh_rlhf_tiny.json": ("messages", {"messages": "chosen"}, 1),
    "torchtune_instruct_tiny.json": ("question_answer", {}, 2),
}
PREFERENCE_FILES = {"dpo_en_demo.json", "kto_en_demo.json", "torchtune_hh_rlhf_tiny.json"}
ONE_OBJECT = "axolotl_conversation.json"


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(shared, name):
    path, (shape, columns, num_rows) = shared(f"data/{name}"), REAL[name]
    if name in PREFERENCE_FILES:
        assert proposed(refusal(path)[0]) == (shape, columns)
        found, examples = read(path, shape, columns)
    else:
        found, examples = read(path)
    text = path.read_bytes().decode()
    independent = {
        ".json": lambda: json.loads(text),
        ".jsonl": lambda: [json.loads(line) for line in text.split("\n") if line],
        ".txt": lambda: [{"text": text}],
    }[path.suffix]()
    assert (found, len(examples), len(independent)) == (shape, num_rows, num_rows)
    for example, row in zip(examples, independent, strict=True):
        written = [m["content"] for m in example.messages]
        ours = {text for text in written if isinstance(text, str)} | {example.text}
        theirs = set(texts_in(row))
        joined = {f"{row.get('instruction')}\n\n{row.get('input')}"}
        joined |= {f"{row.get('instruction')}\n\n{i['input']}" for i in row.get("instances", [])}
        assert ours - {""} <= theirs | joined


@pytest.mark.shared
def test_no_real_file_is_left_out(shared):
    found = find_files(str(shared("data")))
    assert {path.name for path in found} == {*REAL, ONE_OBJECT}


@pytest.mark.shared
def test_a_real_conversation_that_is_one_object_is_one_row(shared):
    path = shared(f"data/{ONE_OBJECT}")
    row = json.loads(path.read_text())
    _, (example,) = read(path)
    assert example.where == f"{path}:1"
    assert [m["content"] for m in example.messages] == [m["value"] for m in row["conversations"]]


@pytest.mark.shared
def test_real_tool_calls_are_the_files_own(shared):
    path = shared("data/glaive_toolcall_en_demo.json")
    rows = json.loads(path.read_text())
    _, examples = read(path)
    for example, row in zip(examples, rows, strict=True):
        assert list(example.tools) == json.loads(row["tools"])
        values = [m["value"] for m in row["conversations"] if m["from"] == "function_call"]
        calls = [call for m in example.messages for call in m.get("tool_calls", [])]
        assert calls == [json.loads(value) for value in values]
        values = [m["value"] for m in row["conversations"] if m["from"] == "observation"]
        results = [m["content"] for m in example.messages if m["role"] == "tool"]
        assert results == [json.loads(value) for value in values]
