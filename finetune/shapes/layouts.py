"""The documented shapes of rows, and how a row of each becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.data import COLUMNS
from finetune.files.row import Row
from finetune.files.strict_json import kind_of
from finetune.shapes.example import Example, Message
from finetune.shapes.messages import read_either, read_messages, read_sharegpt, text_of
from finetune.shapes.tool_calls import read_tools

QUESTIONS = (
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("prompt", "response"),
)
"""The pairs that are read as question and answer; others are named in `columns:`."""


@dataclass(frozen=True)
class Shape:
    """One documented shape.

    Attributes:
        required: columns that a row of it has, under our names.
        description: all its columns, for messages.
        read: columns to messages.
        would_lose: columns that belong to a conversation but have no place in this shape.
    """

    required: tuple[str, ...]
    description: str
    read: Callable[[Mapping[str, Any]], list[Message]]
    would_lose: tuple[str, ...] = ()


def given(columns: Mapping[str, Any], *names: str) -> bool:
    """Whether a row has all these columns, and none of them null."""
    return all(columns.get(name) is not None for name in names)


def under_our_names(shape: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row with the documented other names of a shape replaced.

    Raises:
        ValueError: the row has two pairs of question and answer.
    """
    found = dict(columns)
    if shape == "sharegpt" and not given(found, "conversations") and "conversation" in found:
        found["conversations"] = found.pop("conversation")
    if shape == "question_answer":
        pairs = [pair for pair in QUESTIONS if given(found, *pair)]
        if len(pairs) > 1:
            both = " and ".join("/".join(pair) for pair in pairs)
            raise ValueError(
                f"has {both}; say which is meant by columns: {{question: …, answer: …}}"
            )
        for ours, theirs in zip(QUESTIONS[0], pairs[0] if pairs else (), strict=False):
            if ours != theirs and given(found, ours):
                raise ValueError(f"has {theirs} and {ours}; say by columns: which one is meant")
            found[ours] = found.pop(theirs)
    return found


def to_examples(row: Row, shape: str) -> list[Example]:
    """The examples of a row: one, or for `seed_tasks` one an instance.

    Raises:
        ValueError: the row is not of the shape.
    """
    columns, layout = under_our_names(shape, row.columns), SHAPES[shape]
    missing = [name for name in layout.required if name not in columns]
    if missing:
        raise ValueError(
            f"has no {', '.join(missing)}; a row of format {shape} has {layout.description}"
        )
    extra = {name: value for name, value in columns.items() if name not in COLUMNS[shape]}
    if shape == "text":
        return [Example(row.where, text=text_of(columns, "text"), extra=extra)]
    if shape == "seed_tasks":
        return [
            Example(f"{row.where}[{i}]", tuple(messages), extra=extra)
            for i, messages in enumerate(_instances(columns))
        ]
    tools = read_tools(columns.get("tools")) if "tools" in COLUMNS[shape] else ()
    return [Example(row.where, tuple(layout.read(columns)), extra=extra, tools=tools)]


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _asked(columns: Mapping[str, Any], place: str = "") -> str:
    """An instruction and its input, where it has one."""
    instruction, added = text_of(columns, "instruction"), _optional_text(columns, "input", place)
    return "\n\n".join(part for part in (instruction, added) if part.strip()) or instruction


def _optional_text(columns: Mapping[str, Any], name: str, place: str = "") -> str:
    return "" if columns.get(name) is None else text_of(columns, name, place)


def _system(columns: Mapping[str, Any]) -> list[Message]:
    system = _optional_text(columns, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def _alpaca(columns: Mapping[str, Any]) -> list[Message]:
    turns = [*_history(columns.get("history")), *_turn(_asked(columns), text_of(columns, "output"))]
    return [*_system(columns), *turns]


def _history(value: Any) -> list[Message]:
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise ValueError(f"history is {kind_of(value)}; expected a list of [user, assistant]")
    turns = []
    for index, pair in enumerate(value):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise ValueError(f"history[{index}] is not a pair of texts [user, assistant]")
        turns += _turn(*pair)
    return turns


def _sharegpt(columns: Mapping[str, Any]) -> list[Message]:
    system = _system(columns)
    messages = read_sharegpt(columns["conversations"], "conversations")
    if system and messages[0]["role"] == "system":
        raise ValueError("has a system column and a system message; one of them is meant")
    return [*system, *messages]


def _messages(columns: Mapping[str, Any]) -> list[Message]:
    return read_messages(columns["messages"], "messages")


def _prompt_completion(columns: Mapping[str, Any]) -> list[Message]:
    """Texts, or messages on either side. Answers inside the prompt are its context: not trained."""
    prompt, completion = columns["prompt"], columns["completion"]
    before = (
        read_either(prompt, "prompt")
        if isinstance(prompt, (list, dict))
        else [{"role": "user", "content": text_of(columns, "prompt")}]
    )
    after = (
        read_either(completion, "completion")
        if isinstance(completion, (list, dict))
        else [{"role": "assistant", "content": text_of(columns, "completion")}]
    )
    if after[0]["role"] != "assistant":
        raise ValueError(f"completion begins with a {after[0]['role']} message, not an assistant's")
    context = [m | {"train": False} if m["role"] == "assistant" else m for m in before]
    return [*context, *after]


def _question_answer(columns: Mapping[str, Any]) -> list[Message]:
    return _turn(text_of(columns, "question"), text_of(columns, "answer"))


def _instances(columns: Mapping[str, Any]) -> list[list[Message]]:
    instances = columns["instances"]
    if not isinstance(instances, list) or not instances:
        raise ValueError(f"instances is {kind_of(instances)}; expected a list of {{input, output}}")
    return [_instance(columns["instruction"], entry, i) for i, entry in enumerate(instances)]


def _instance(instruction: Any, entry: Any, index: int) -> list[Message]:
    place = f"instances[{index}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {kind_of(entry)}; expected an object with input and output")
    unknown = sorted({k for k, v in entry.items() if v is not None} - {"input", "output"})
    if unknown:
        raise ValueError(f"{place} has {', '.join(unknown)}; it holds input and output alone")
    user = _asked({**entry, "instruction": instruction}, f"{place}.")
    return _turn(user, text_of(entry, "output", f"{place}."))


_BESIDE = ("system", "input", "context", "history", "tools")
SHAPES: dict[str, Shape] = {
    "alpaca": Shape(
        ("instruction", "output"),
        "instruction, input (optional), output",
        _alpaca,
        ("context", "tools"),
    ),
    "sharegpt": Shape(
        ("conversations",),
        "conversations: [{from, value}, …], system and tools (optional)",
        _sharegpt,
    ),
    "messages": Shape(
        ("messages",),
        "messages: [{role, content}, …], tools (optional)",
        _messages,
        ("system", "functions"),
    ),
    "prompt_completion": Shape(
        ("prompt", "completion"),
        "prompt, completion (texts or messages)",
        _prompt_completion,
        ("system", "input", "context", "history"),
    ),
    "question_answer": Shape(
        ("question", "answer"),
        "question, answer (or query, response; instruction, response; prompt, response)",
        _question_answer,
        _BESIDE,
    ),
    "seed_tasks": Shape(
        ("instruction", "instances"),
        "instruction, instances: [{input, output}, …]",
        lambda columns: _instances(columns)[0],
        _BESIDE,
    ),
    "text": Shape(("text",), "text", lambda columns: []),
}
assert set(SHAPES) == set(COLUMNS), "every format of the config is read"
