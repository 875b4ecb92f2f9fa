"""A conversation as the prompt formats take it: messages, tools, and the order they stand in.

A message is a mapping: `role` (system, user, assistant, tool), `content` (text; of a tool any JSON
value), and, where it applies, `tool_calls` (a list of `{"name", "arguments"}`) and `train` (whether
it counts in the loss, instead of what `data.train_on` says).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import InputError

Message = Mapping[str, Any]
Tool = str | Mapping[str, Any]  # a built-in tool's name, or a function's JSON schema
ROLES = ("system", "user", "assistant")
TOOL_ROLES = (*ROLES, "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that the model is told of.

    Attributes:
        messages: in order; see the module.
        tools: built-in tools by name, functions by their JSON schema.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()

    @property
    def system(self) -> str | None:
        """The system message's text, if the conversation opens with one."""
        first = self.messages[0]
        return str(first["content"]) if first["role"] == "system" else None

    @property
    def builtin_tools(self) -> list[str]:
        """Names of the built-in tools."""
        return [tool for tool in self.tools if isinstance(tool, str)]

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """JSON schemas of the functions, as they were given."""
        return [tool for tool in self.tools if not isinstance(tool, str)]

    @property
    def last_answer(self) -> int | None:
        """Index of the assistant's last message."""
        return max(
            (i for i, m in enumerate(self.messages) if m["role"] == "assistant"), default=None
        )


@dataclass(frozen=True)
class Call:
    """One call of a tool by the assistant."""

    name: str
    arguments: Mapping[str, Any]


def calls_of(message: Message) -> list[Call]:
    """The tool calls of a message; OpenAI's nesting and arguments as JSON text are read too.

    Raises:
        InputError: a call without a name, or whose arguments are no JSON object.
    """
    calls = message.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InputError("tool_calls is not a list of {name, arguments}")
    return [_call(call) for call in calls]


def _call(call: Any) -> Call:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise InputError(f"a tool call is {str(call)[:80]!r}; expected {{name, arguments}}")
    name, arguments = inner["name"], inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise InputError(f"arguments of the call of {name} are not JSON") from None
    if not isinstance(arguments, Mapping):
        raise InputError(f"arguments of the call of {name} are no JSON object")
    return Call(name, arguments)


def check_in_order(conversation: Conversation, has_tools: bool, name: str) -> None:
    """Refuses what a published prompt format has no place for.

    [system] user assistant user assistant …; with tools, an assistant's calls are followed by one
    tool message each, and those by the assistant again.

    Args:
        has_tools: whether the format documents tools.
        name: of the format, for the message.

    Raises:
        InputError: another order, an unknown role, content that is not text, tools without a place.
    """
    messages = conversation.messages
    check_each(conversation, TOOL_ROLES if has_tools else ROLES)
    if conversation.tools and not has_tools:
        raise InputError(f"has tools; the format {name} documents none (Llama 3.1 and later do)")
    marks = {
        k for m in messages for k in ("python_tag", "end") if m.get(k) not in (None, False, "eot")
    }
    if marks:
        raise InputError(
            f"a message has {' and '.join(sorted(marks))}, which only the format llama3.1-verbatim "
            f"writes; {name} would leave it out"
        )
    if any(m["role"] == "system" for m in messages[1:]):
        raise InputError("a system message stands after the first message")
    turns = [m for m in messages if m["role"] != "system"]
    shown = ", ".join(m["role"] for m in turns) or "none"
    allowed, open_calls = {"user"}, 0
    for message in turns:
        if message["role"] not in allowed:
            raise InputError(_wrong_order(shown, message, allowed))
        open_calls = _open_calls(message, open_calls)
        allowed = _may_follow(message, open_calls)
    if not turns:
        raise InputError(_wrong_order(shown, None, allowed))


def _wrong_order(shown: str, message: Message | None, allowed: set[str]) -> str:
    here = f": {message['role']} stands where {' or '.join(sorted(allowed))} is" if message else ""
    return f"turns are {shown}; expected user, assistant, user …{here}"


def _open_calls(message: Message, before: int) -> int:
    """Calls whose results are still to come."""
    return before - 1 if message["role"] == "tool" else len(calls_of(message))


def _may_follow(message: Message, open_calls: int) -> set[str]:
    if message["role"] == "user":
        return {"assistant"}
    if open_calls > 0:
        return {"tool"}
    return {"assistant"} if message["role"] == "tool" else {"user"}


def check_each(conversation: Conversation, roles: Sequence[str]) -> None:
    """Refuses messages that are none by themselves: a role or a content that no format writes.

    Raises:
        InputError: no messages, an unknown role, content of a wrong type.
    """
    if not conversation.messages:
        raise InputError("no messages; a conversation has at least a user's message")
    for message in conversation.messages:
        role = message.get("role")
        if role not in roles:
            raise InputError(f"role {role!r}; allowed: {', '.join(roles)}")
        if not _has_content(message):
            raise InputError(f"content of the {role} message is not text")
        if message.get("tool_calls") and role != "assistant":
            raise InputError(f"the {role} message has tool_calls; only the assistant's may")
        if role == "system" and message.get("train"):
            raise InputError("train: true on a system message; only data.train_on: all trains it")


def _has_content(message: Message) -> bool:
    content = message.get("content")
    if message["role"] == "tool":
        return content is not None
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
