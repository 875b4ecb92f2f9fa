"""An example: one row, ready to be rendered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One turn.

role: system | user | assistant | tool. content: text; any JSON value where the role is tool.
Only where the row has them, tool_calls: [{"name": str, "arguments": dict}], python_tag and end
(an assistant's; see finetune.llama.segments.verbatim), and train: whether this turn is trained on,
above what the config says.
"""


@dataclass(frozen=True)
class Example:
    """One row, ready to be rendered.

    Attributes:
        where: `file:row`, rows counted from 1 (lines for jsonl, csv and tsv); `file:row[i]` where a
            row holds several examples.
        messages: the conversation; empty for plain text.
        text: plain text; empty for a conversation.
        extra: the row's other columns (family, answer …).
        tools: what the model may call: names of built-in tools, and functions as JSON schemas,
            exactly as in the row.
        source: index of the config's source that the row came from.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Any, ...] = ()
    source: int = 0


def iter_answers(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The assistant's texts of a conversation; one that only calls tools has the text ""."""
    return (m["content"] for m in messages if m["role"] == "assistant")
