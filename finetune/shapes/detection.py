"""Which documented shape a row has, said with what to write where it is not plain."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.shapes.layouts import QUESTIONS, SHAPES
from finetune.shapes.messages import is_chat, is_sharegpt
from finetune.shapes.preferences import Reading, as_yaml, preference_reason

# Names that other data sets give to what ours call instruction, output and so on. They are only
# ever proposed: a wrong guess would train on the wrong column without a word.
_ASKED = ("instruction", "question", "query", "prompt", "problem", "user", "human", "task", "input")
_ANSWERED = (
    "output",
    "answer",
    "response",
    "completion",
    "solution",
    "assistant",
    "reply",
    "target",
)
_ADDED = ("input", "context", "passage")
_SYSTEM = ("system", "system_prompt")
_DOCUMENT = ("content", "document", "body", "article", "story", "passage", "raw_content")


def fitting_shapes(columns: Mapping[str, Any]) -> list[str]:
    """Every shape that has its required columns in the row; null is as good as absent."""
    return list(_fitting(tuple(name for name, value in columns.items() if value is not None)))


@functools.lru_cache(maxsize=1024)  # the rows of a file have a few sets of names, or one
def _fitting(names: tuple[str, ...]) -> tuple[str, ...]:
    there = set(names)
    return tuple(s for s in SHAPES if any(there.issuperset(r) for r in _requirements(s)))


def _requirements(shape: str) -> tuple[tuple[str, ...], ...]:
    if shape == "sharegpt":
        return (("conversations",), ("conversation",))
    return QUESTIONS if shape == "question_answer" else (SHAPES[shape].required,)


def detect_shape(columns: Mapping[str, Any]) -> str:
    """The one shape of a row.

    Raises:
        ValueError: none, or several; says which `format:` and `columns:` would read the row.
    """
    fitting = fitting_shapes(columns)
    refuse_unasked(columns, fitting)
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(columns) or "none"
    if fitting:
        readings = "; ".join(f"format: {name} reads {SHAPES[name].description}" for name in fitting)
        raise ValueError(f"columns {names} fit {' and '.join(fitting)}; give one: {readings}")
    formats = "; ".join(f"{name} ({shape.description})" for name, shape in SHAPES.items())
    raise ValueError(
        f"columns {names} fit no format that is read; {_proposal(columns)}. Formats: {formats}"
    )


def refuse_unasked(columns: Mapping[str, Any], fitting: list[str]) -> None:
    """Refuses what a detected shape would read in a way that nobody may have meant.

    Raises:
        ValueError: preference data, or columns of a conversation that the shape has no place for.
    """
    reason = preference_reason(columns, fitting)
    if reason:
        raise ValueError(reason)
    if len(fitting) != 1:
        return
    shape = fitting[0]
    lost = [name for name in SHAPES[shape].would_lose if columns.get(name) not in (None, "", [])]
    if lost:
        proposed = next((r for r in _readings(columns) if r[0] != shape or r[1]), None)
        other = f"; {as_yaml(proposed)} reads more" if proposed and proposed[0] != shape else ""
        raise ValueError(
            f"fits {shape}, which does not read its column {', '.join(lost)}; "
            f"format: {shape} says that this is meant{other}"
        )


def _proposal(columns: Mapping[str, Any]) -> str:
    reading = next(_readings(columns), None)
    if reading:
        return f"{as_yaml(reading)} would make it one"
    return (
        "name its columns, as in columns: {instruction: …, output: …}, {messages: …} or {text: …}"
    )


def _readings(columns: Mapping[str, Any]) -> Iterator[Reading]:
    """Readings that a row allows, the likeliest first."""
    for name, value in columns.items():
        if is_chat(value):
            yield "messages", {"messages": name}
        if is_sharegpt(value):
            yield "sharegpt", {"conversations": name}
    texts = {name.lower(): name for name, value in columns.items() if isinstance(value, str)}
    asked = next((texts[name] for name in _ASKED if name in texts), None)
    answered = next((texts[name] for name in _ANSWERED if name in texts), None)
    if asked and answered:
        beside = {"input": _ADDED, "system": _SYSTEM}
        found = {"instruction": asked, "output": answered}
        for ours, names in beside.items():
            named = next((texts[n] for n in names if n in texts and texts[n] != asked), None)
            found |= {ours: named} if named else {}
        yield "alpaca", {ours: theirs for ours, theirs in found.items() if ours != theirs}
    documents = [texts[name] for name in _DOCUMENT if name in texts]
    if documents or len(texts) == len(columns) == 1:
        yield "text", {"text": (documents or list(texts.values()))[0]}
