"""Rows of every documented shape, and everything that is refused, by its message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_samples import ALPACA, ASSISTANT, CHAT, ROWS, USER, only, read, refusal

from finetune.config.data import COLUMNS, Source
from finetune.errors import InputError
from finetune.shapes import SHAPES


@pytest.fixture
def file(tmp_path):
    """`file("rows.jsonl", rows)`."""

    def write(name: str, rows: list[Any]) -> Path:
        lines = name.endswith("l")
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_found_and_read(file, name, shape):
    path = file(name, [ROWS[shape] | {"family": "greeting"}] * 3)
    found, examples = read(path)
    assert found == shape
    at = "[0]" if shape == "seed_tasks" else ""
    assert [e.where for e in examples] == [f"{path}:{n}{at}" for n in (1, 2, 3)]
    for example in examples:
        assert example.extra == {"family": "greeting"}
        assert example.text == ("Hi" if shape == "text" else "")
        assert list(example.messages) == ([] if shape == "text" else CHAT)
        assert (example.tools, example.source) == ((), 0)
    assert read(path, shape) == (found, examples)


def test_the_config_names_every_shape_and_its_columns():
    for shape, row in ROWS.items():
        assert Source(path="x", format=shape, columns={c: f"x_{c}" for c in COLUMNS[shape]})
        assert set(row) <= set(COLUMNS[shape])
    with pytest.raises(ValueError, match="columns names q twice"):
        Source(path="x", columns={"prompt": "q", "completion": "q"})
    with pytest.raises(ValueError, match="format text has no column output; allowed: text"):
        Source(path="x", format="text", columns={"output": "q"})


@pytest.mark.parametrize(
    ("row", "user"),
    [
        ({"instruction": "Add", "output": "3"}, "Add"),
        ({"instruction": "Add", "input": None, "output": "3"}, "Add"),
        ({"instruction": "Add", "input": " \n", "output": "3"}, "Add"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2"),
        ({"instruction": "Add", "input": " 1 2", "output": "3", "system": ""}, "Add\n\n 1 2"),
        ({"instruction": "", "input": "1 2", "output": "3", "history": []}, "1 2"),
    ],
)
def test_alpacas_input_follows_the_instruction(file, row, user):
    expected = [USER | {"content": user}, ASSISTANT | {"content": "3"}]
    assert list(only(file("rows.json", [row])).messages) == expected
    more = row | {"system": "Be brief.", "history": [["1", "one"], ["2", "two"]]}
    roles = [m["role"] for m in only(file("rows.json", [more])).messages]
    assert roles == ["system", *["user", "assistant"] * 3]
    before = only(file("rows.json", [more])).messages
    assert [m["content"] for m in before[:5]] == ["Be brief.", "1", "one", "2", "two"]
    assert list(before[5:]) == expected


def test_every_pair_of_question_and_answer_is_read(file):
    for pair in (("query", "response"), ("instruction", "response"), ("prompt", "response")):
        path = file("rows.json", [dict(zip(pair, ("Hi", "Hello"), strict=True)) | {"id": 1}])
        found, (example,) = read(path)
        assert (found, list(example.messages)) == ("question_answer", CHAT)
        assert example.extra == {"id": 1}
        assert only(path, "question_answer") == example


def test_each_instance_of_a_seed_task_is_an_example(file):
    instances = [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}]
    path = file("rows.jsonl", [{"id": "s", "instruction": "Add", "instances": instances}] * 2)
    _, examples = read(path)
    assert [e.where for e in examples] == [f"{path}:{n}[{i}]" for n in (1, 2) for i in (0, 1)]
    assert [e.messages[0]["content"] for e in examples] == ["Add\n\n1 2", "Add"] * 2
    assert [e.messages[1]["content"] for e in examples] == ["3", "0"] * 2


def test_all_bad_rows_are_reported_together_with_bad_lines(file):
    good = [ALPACA] * 2
    path = file("rows.json", [*good, {"instruction": "x"}, 5, *good, ALPACA | {"output": 3}])
    assert refusal(path) == [
        f"{path}:3: has no output; "
        "a row of format alpaca has instruction, input (optional), output",
        f"{path}:4: is a number; expected an object with columns",
        f"{path}:7: output is a number; expected text",
    ]


def test_a_file_has_one_shape(file):
    path = file("rows.jsonl", [ALPACA, *[ROWS["messages"]] * 30, ALPACA])
    findings = refusal(path)
    assert findings[0].startswith(f"{path}:2: has no instruction, output; a row of format alpaca")
    assert (len(findings), findings[20]) == (21, "and 10 more rows")


def test_columns_give_other_names(file):
    path = file("rows.json", [{"problem": "Hi", "reply": "Hello", "id": 7}])
    example = only(path, "auto", {"instruction": "problem", "output": "reply"})
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


@pytest.mark.parametrize("shape", ["alpaca", "auto"])
def test_columns_that_no_row_has_are_refused(file, shape):
    path = file("rows.json", [ALPACA, ALPACA | {"context": "x"}])
    assert refusal(path, shape, {"input": "contxt", "output": "reply"}) == [
        f"{path}: no row has the column {name} that columns.{ours} names; "
        "there are context, input, instruction, output"
        for ours, name in (("input", "contxt"), ("output", "reply"))
    ]
    assert refusal(path, shape, {"instruction": "q", "output": "r"})[0].startswith(
        f"{path}: no row"
    )
    assert len(read(path, "alpaca", {"input": "context"})[1]) == 2


def test_one_row_without_a_named_column_is_refused(file):
    path = file("rows.json", [{"q": "Hi", "output": "Hello"}, {"instruction": "Hi", "output": "x"}])
    (finding,) = refusal(path, "alpaca", {"instruction": "q"})
    assert re.match(re.escape(f"{path}:2: has no instruction"), finding)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "user", "gpt", "x", "[]", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "train", "weight", "name"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
NAMES = sorted(
    {name for names in COLUMNS.values() for name in names} | {"chosen", "rejected", "label"}
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=4), min_size=1, max_size=3)
)
def test_any_row_is_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows))
    for shape in ("auto", *SHAPES):
        try:
            _, examples = read(path, shape)
        except InputError:
            continue
        else:
            assert shape == "seed_tasks" or len(examples) >= len(rows)
            assert all(
                m["role"] in ("system", "user", "assistant", "tool")
                for e in examples
                for m in e.messages
            )
