"""Rows of every shape, and what the tests of shapes share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import InputError
from finetune.shapes import Example, read_examples

USER, ASSISTANT, SYSTEM, TOOL = ({"role": r} for r in ("user", "assistant", "system", "tool"))
CHAT = [USER | {"content": "Hi"}, ASSISTANT | {"content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ALPACA = {"instruction": "Hi", "input": "", "output": "Hello"}
CALL = {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}
SCHEMA = {"name": "add", "parameters": {"type": "object", "properties": {}}}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": SHAREGPT},
    "alpaca": ALPACA,
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "question_answer": {"question": "Hi", "answer": "Hello"},
    "seed_tasks": {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]},
    "text": {"text": "Hi"},
}


def read(path: Path, *args: Any) -> tuple[str, list[Example]]:
    shape, examples = read_examples(path, *args)
    return shape, list(examples)


def only(path: Path, *args: Any) -> Example:
    _, (example,) = read(path, *args)
    return example


def refusal(path: Path, *args: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(path, *args)
    return caught.value.findings


def proposed(finding: str) -> tuple[str, dict[str, str]]:
    """The format and columns that a message proposes, as a config would hold them."""
    match = re.search(r"format: \w+(, columns: \{[^}]*\})?", finding)
    assert match, finding
    source = yaml.safe_load(f"{{{match.group()}}}")
    return source["format"], source.get("columns", {})
