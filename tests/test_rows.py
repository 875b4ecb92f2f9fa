"""Rows of every documented shape, and everything that is refused, by its message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.rows import Example, read_examples, read_rows

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))
CHAT = [USER | {"content": "Hi"}, ASSISTANT | {"content": "Hello"}]
ALPACA = {"instruction": "Hi", "input": "", "output": "Hello"}


@pytest.fixture
def file(tmp_path):
    """`file("rows.jsonl", content)`: bytes as they are, text in UTF-8, anything else as JSON."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        if not isinstance(content, (bytes, str)):
            lines = path.suffix == ".jsonl" and isinstance(content, list)
            content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path: Path, *args: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_examples(path, *args)
    return caught.value.findings


def only(path: Path, *args: Any) -> Example:
    _, (example,) = read_examples(path, *args)
    return example


SHAPES = {
    "messages": {"messages": CHAT},
    "alpaca": ALPACA,
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "text": {"text": "Hi"},
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_found_and_read(file, name, shape):
    path = file(name, [SHAPES[shape] | {"family": "greeting"}] * 3)
    found, examples = read_examples(path)
    assert found == shape
    assert [e.where for e in examples] == [f"{path}:{n}" for n in (1, 2, 3)]
    for example in examples:
        assert example.extra == {"family": "greeting"}
        assert example.text == ("Hi" if shape == "text" else "")
        assert list(example.messages) == ([] if shape == "text" else CHAT)
    assert read_examples(path, shape) == (found, examples)


@pytest.mark.parametrize(
    ("row", "user"),
    [
        ({"instruction": "Add", "output": "3"}, "Add"),
        ({"instruction": "Add", "input": None, "output": "3"}, "Add"),
        ({"instruction": "Add", "input": " \n", "output": "3"}, "Add"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2"),
        ({"instruction": "Add", "input": " 1 2", "output": "3", "system": ""}, "Add\n\n 1 2"),
    ],
)
def test_alpacas_input_follows_the_instruction(file, row, user):
    expected = [USER | {"content": user}, ASSISTANT | {"content": "3"}]
    assert list(only(file("rows.json", [row])).messages) == expected
    with_system = only(file("rows.json", [row | {"system": "Be brief."}]))
    assert list(with_system.messages) == [SYSTEM | {"content": "Be brief."}, *expected]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=10), min_size=1, max_size=5))
def test_text_comes_back_as_it_was_written(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": text} for text in texts]
    for ensure_ascii in (True, False):
        lines = [json.dumps(row, ensure_ascii=ensure_ascii) for row in rows]
        (folder / "rows.jsonl").write_bytes("\n".join(lines).encode())
        (folder / "rows.json").write_bytes(json.dumps(rows, ensure_ascii=ensure_ascii).encode())
        for name in ("rows.jsonl", "rows.json"):
            assert [row["text"] for _, row in read_rows(folder / name)] == texts


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}',  # BOM
        b'{"text": "a"}\r\n{"text": "b"}\r\n',  # CRLF
        b'{"text": "a"}\n\n  \n{"text": "b"}\n\n',  # blank lines
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}',
    ],
)
def test_marks_and_line_ends_are_no_part_of_a_row(file, content):
    path = file("rows.jsonl", content)
    rows = read_rows(path)
    assert [row for _, row in rows] == [{"text": "a"}, {"text": "b"}]
    last_line = content.replace(b"\r", b"").split(b"\n").index(b'{"text": "b"}') + 1
    assert rows[1][0] == f"{path}:{last_line}"


def test_a_line_separator_inside_a_text_ends_no_line(file):
    text = "one\u2028two\u2029three\x85four\x0cfive"
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for _ in range(2))
    assert [e.text for e in read_examples(file("rows.jsonl", content))[1]] == [text, text]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", b"", "is empty; expected at least one row"),
        ("rows.json", b" \n\t\n", "is empty; expected at least one row"),
        ("rows.jsonl", b"\xef\xbb\xbf", "is empty"),
        ("rows.csv", b"a,b", "files of type .csv are not read; use .json or .jsonl"),
        ("rows.parquet", b"PAR1\xff\xfe", "files of type .parquet are not read"),
        ("rows.jsonl.gz", b"\x1f\x8b", "files of type .gz are not read"),
        ("rows", b'{"text": "a"}', "files of type none are not read"),
        ("rows.jsonl", '{"text": "é"}'.encode("latin-1"), "is not UTF-8"),
        ("rows.json", '[{"text": "é"}]'.encode("utf-16"), "is not UTF-8"),
        ("rows.json", b"[]", "found an empty array; expected an array of objects"),
        ("rows.json", b'{"text": "a"}', "found a single dict"),
        ("rows.json", b'"a"', "found a single str"),
        ("rows.json", b'{"text": "a"}\n{"text": "b"}', "one object a line is .jsonl"),
        ("rows.json", b'[{"text": "a"}, {"te', "not readable as JSON"),
        ("rows.json", b'[{"text": "a"},]', "not readable as JSON"),
        ("rows.json", b'[{"text": "a", "x": NaN}]', "NaN is not JSON"),
        ("rows.json", b'[{"text": "a"}, 5]', ":2: found a int; expected an object with columns"),
        ("rows.jsonl", b'[{"text": "a"}]', ":1: found a list; expected an object"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b', ":2: Unterminated string"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b"', ":2: Expecting"),
        ("rows.jsonl", b'{"text": "a", "x": -Infinity}', ":1: -Infinity is not JSON"),
        ("rows.jsonl", b'{"text": "a"} {"text": "b"}', ":1: Extra data"),
        ("rows.jsonl", b"[" * 100_000, ":1: nested too deeply"),
        ("rows.json", b"[" * 100_000, "nested too deeply"),
        ("rows.jsonl", b"{'text': 'a'}", ":1: Expecting property name"),
    ],
)
def test_files_that_hold_no_rows_are_refused(file, name, content, says):
    path = file(name, content)
    (finding,) = refusal(path)
    assert finding.startswith(str(path))
    assert says in finding


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (finding,) = refusal(tmp_path / "none.jsonl")
    assert (
        finding
        == f"{tmp_path}/none.jsonl: no such file (relative paths start at the current folder)"
    )
    assert refusal(tmp_path)


def test_every_bad_line_is_named_up_to_twenty(file):
    content = "\n".join(['{"text": "a"}', *["{"] * 33])
    path = file("rows.jsonl", content)
    findings = refusal(path)
    assert [f.split(": ")[0] for f in findings[:20]] == [f"{path}:{n}" for n in range(2, 22)]
    assert findings[20:] == ["and 13 more rows"]


def messages_with(*changed: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*changed]}


BAD_ROWS = [
    ({"messages": "Hi"}, "messages is not a list of {role, content}"),
    ({"messages": []}, "messages is not a list of {role, content}"),
    ({"messages": None}, "messages is not a list of {role, content}"),
    (messages_with(CHAT[0], "Hello"), "messages[1] is not an object with role and content"),
    (messages_with(CHAT[0], ASSISTANT), "messages[1].content is missing; expected text"),
    (messages_with(CHAT[0], {"content": "x"}), "messages[1].role is missing"),
    (messages_with(USER | {"content": None}), "messages[0].content is null; expected text"),
    (messages_with(USER | {"content": [{"type": "text"}]}), "messages[0].content is a list"),
    (messages_with(CHAT[0] | {"name": "Bo"}), "messages[0] has name, not read yet"),
    (messages_with(CHAT[0] | {"tool_calls": [], "id": 0}), "messages[0] has id, tool_calls"),
    ({"instruction": 5, "output": "x"}, "instruction is a int; expected text"),
    ({"instruction": None, "output": "x"}, "instruction is null; expected text"),
    ({"instruction": "x", "output": None}, "output is null; expected text"),
    ({"instruction": "x", "output": ["y"]}, "output is a list; expected text"),
    ({"instruction": "x", "input": 0, "output": "y"}, "input is a int; expected text"),
    ({"instruction": "x", "input": [], "output": "y"}, "input is a list; expected text"),
    ({"instruction": "x", "system": False, "output": "y"}, "system is a bool; expected text"),
    ({"prompt": "x", "completion": 1.5}, "completion is a float; expected text"),
    ({"prompt": CHAT, "completion": CHAT}, "prompt is a list; expected text"),
    ({"text": {"a": 1}}, "text is a dict; expected text"),
    ({"text": "\ud800"}, "text holds a lone surrogate"),
    (messages_with(USER | {"content": "a\udfff"}), "messages[0].content holds a lone surrogate"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=[says for _, says in BAD_ROWS])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_that_hold_something_else_are_refused_with_their_place(file, name, row, says):
    path = file(name, [row])
    (finding,) = refusal(path)
    assert finding.startswith(f"{path}:1: ")
    assert says in finding


def test_null_keys_of_a_message_are_as_good_as_absent(file):
    rows = [messages_with(CHAT[0] | {"tool_calls": None}, CHAT[1] | {"name": None})]
    assert list(only(file("rows.json", rows)).messages) == CHAT


def test_all_bad_rows_are_reported_together(file):
    good = [ALPACA] * 2
    path = file("rows.json", [*good, {"instruction": "x"}, *good, ALPACA | {"output": 3}])
    assert refusal(path) == [
        f"{path}:3: has no output; "
        "a row of format alpaca has instruction, input (optional), output",
        f"{path}:6: output is a int; expected text",
    ]


def test_a_file_has_one_shape(file):
    path = file("rows.jsonl", [SHAPES["alpaca"], SHAPES["messages"], SHAPES["alpaca"]])
    (finding,) = refusal(path)
    assert finding.startswith(f"{path}:2: has no instruction, output; a row of format alpaca")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "x", "answer": "y"}, "columns question, answer fits no format that is read"),
        ({"conversations": []}, "fits no format that is read"),
        (ALPACA | {"text": "x"}, "fits alpaca and text"),
        (SHAPES["messages"] | SHAPES["prompt_completion"], "fits messages and prompt_completion"),
    ],
)
def test_a_shape_that_is_not_plain_is_asked_for(file, row, says):
    (finding,) = refusal(file("rows.json", [row]))
    assert says in finding
    assert "give data.train[].format or columns" in finding


def test_a_named_shape_decides_between_two(file):
    row = ALPACA | {"text": "Below is an instruction"}
    path = file("rows.json", [row])
    assert list(only(path, "alpaca").messages) == CHAT
    assert only(path, "alpaca").extra == {"text": "Below is an instruction"}
    assert only(path, "text").text == "Below is an instruction"


def test_columns_give_other_names(file):
    path = file("rows.json", [{"question": "Hi", "reply": "Hello", "id": 7}])
    example = only(path, "auto", {"instruction": "question", "output": "reply"})
    assert list(example.messages) == CHAT
    assert example.extra == {"id": 7}


@pytest.mark.parametrize("order", [1, -1])
def test_a_named_column_wins_over_one_that_has_our_name(file, order):
    row = dict([*{"question": "Hi", "instruction": "no", "output": "Hello"}.items()][::order])
    example = only(file("rows.json", [row]), "alpaca", {"instruction": "question"})
    assert list(example.messages) == CHAT


def test_two_columns_may_change_places(file):
    path = file("rows.json", [{"prompt": "Hello", "completion": "Hi"}])
    columns = {"prompt": "completion", "completion": "prompt"}
    assert list(only(path, "prompt_completion", columns).messages) == CHAT


def test_columns_that_no_row_has_are_refused(file):
    path = file("rows.json", [ALPACA, ALPACA | {"context": "x"}])
    assert refusal(path, "alpaca", {"input": "contxt", "output": "reply"}) == [
        f"{path}: no row has the column contxt that columns.input names; "
        "there are context, input, instruction, output",
        f"{path}: no row has the column reply that columns.output names; "
        "there are context, input, instruction, output",
    ]
    assert len(read_examples(path, "alpaca", {"input": "context"})[1]) == 2


def test_one_row_without_a_named_column_is_refused(file):
    path = file("rows.json", [{"q": "Hi", "output": "Hello"}, {"instruction": "Hi", "output": "x"}])
    (finding,) = refusal(path, "alpaca", {"instruction": "q"})
    assert re.match(re.escape(f"{path}:2: has no instruction"), finding)
