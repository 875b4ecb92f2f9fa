"""Messages of a row -> ours, in both ways they are written: role/content and from/value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune.files.strict_json import kind_of, parse
from finetune.shapes.example import Message
from finetune.shapes.tool_calls import read_calls, read_function_call

CHAT_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
# Ids tie results to calls; the formats of Llama do that by their order. A speaker's name has no
# place in them either.
_WITHOUT_EFFECT = {"id", "name", "tool_call_id"}
_MARKS = {"train", "weight"}
# What a turn of an exact transcript may say (format llama3.1-verbatim).
_TRANSCRIPT = {"python_tag", "end"}
_CHAT_KEYS = {"role", "content", "tool_calls", "function_call"} | _MARKS | _WITHOUT_EFFECT
_CHAT_KEYS |= _TRANSCRIPT
_SHAREGPT_KEYS = {"from", "value"} | _MARKS | _WITHOUT_EFFECT
_LONGEST_ROLE = 24


def text_of(columns: Mapping[str, Any], key: str, place: str = "") -> str:
    """The text under a key.

    Args:
        place: stands before the key in the message.

    Raises:
        ValueError: there is none.
    """
    value = columns.get(key)
    if not isinstance(value, str):
        found = kind_of(value) if key in columns else "missing"
        raise ValueError(f"{place}{key} is {found}; expected text")
    return value


def read_messages(value: Any, name: str) -> list[Message]:
    """A list of role/content messages.

    Args:
        name: the column's, for the message of a refusal.

    Raises:
        ValueError: it is not one, or a message holds what is not read.
    """
    return [_chat(m, f"{name}[{i}]") for i, m in enumerate(_list_of(value, name, "role, content"))]


def read_sharegpt(value: Any, name: str) -> list[Message]:
    """A list of from/value messages; see `read_messages`."""
    entries = _list_of(value, name, "from, value")
    return [_sharegpt(m, f"{name}[{i}]") for i, m in enumerate(entries)]


def read_either(value: Any, name: str) -> list[Message]:
    """One message or a list of them, written in either way."""
    value = [value] if isinstance(value, dict) else value
    return (read_sharegpt if is_sharegpt(value) else read_messages)(value, name)


def is_sharegpt(value: Any) -> bool:
    """Whether a value is a list whose first message is written from/value."""
    return isinstance(value, list) and bool(value) and _has(value[0], "from", "role")


def is_chat(value: Any) -> bool:
    """Whether a value is a list whose first message is written role/content."""
    return isinstance(value, list) and bool(value) and _has(value[0], "role", "from")


def _has(message: Any, key: str, other: str) -> bool:
    return isinstance(message, dict) and key in message and other not in message


def _list_of(value: Any, name: str, keys: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise ValueError(f"{name} is {found}; expected a list of {{{keys}}}")
    return value


def _chat(message: Any, place: str) -> Message:
    if is_sharegpt([message]):
        raise ValueError(
            f"{place} has from and value, not role and content; "
            f"that is format: sharegpt, columns: {{conversations: {place.partition('[')[0]}}}"
        )
    role = _role(message, place, ("role", "content"), CHAT_ROLES, _CHAT_KEYS)
    calls = read_calls(message, place)
    if calls and role != "assistant":
        raise ValueError(f"{place} has tool calls; only an assistant's message has them")
    result: Message = {"role": role, "content": _content(message, role, bool(calls), place)}
    if calls:
        result["tool_calls"] = calls
    return result | _transcript(message, role, place) | _training(message, place)


def _transcript(message: Mapping[str, Any], role: str, place: str) -> Message:
    """`python_tag` and `end` of an exact transcript, where they are given."""
    given = {key: message[key] for key in _TRANSCRIPT if message.get(key) is not None}
    if given and role != "assistant":
        raise ValueError(f"{place} has {', '.join(sorted(given))}; only an assistant's message may")
    if not isinstance(given.get("python_tag", False), bool):
        raise ValueError(f"{place}.python_tag is {kind_of(given['python_tag'])}; allowed: a bool")
    if given.get("end", "eot") not in ("eot", "eom"):
        raise ValueError(
            f"{place}.end is {json.dumps(given['end'], default=str)[:20]}; allowed: eot or eom"
        )
    return given


def _sharegpt(message: Any, place: str) -> Message:
    if is_chat([message]):
        raise ValueError(
            f"{place} has role and content, not from and value; "
            f"that is format: messages, columns: {{messages: {place.partition('[')[0]}}}"
        )
    role = _role(message, place, ("from", "value"), SHAREGPT_ROLES, _SHAREGPT_KEYS)
    if message["from"] == "function_call":
        calls = read_function_call(message.get("value"), f"{place}.value")
        result: Message = {"role": role, "content": "", "tool_calls": calls}
    elif role == "tool" and "value" in message:
        result = {"role": role, "content": _observed(message["value"])}
    else:
        result = {"role": role, "content": text_of(message, "value", f"{place}.")}
    return result | _training(message, place)


def _observed(value: Any) -> Any:
    """A tool's result: JSON as text is that JSON, as it is for a call; other text stays text."""
    if not isinstance(value, str):
        return value
    try:
        parsed = parse(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, (dict, list)) else value


def _role(
    message: Any, place: str, keys: tuple[str, str], allowed: Mapping[str, str], known: set[str]
) -> str:
    """Our name for the role, after the checks that both ways of writing share."""
    if not isinstance(message, dict):
        expected = f"expected an object with {' and '.join(keys)}"
        raise ValueError(f"{place} is {kind_of(message)}; {expected}")
    unknown = sorted({key for key, value in message.items() if value is not None} - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise ValueError(f"{place} has {', '.join(unknown)}, which is not read; known are {names}")
    role = text_of(message, keys[0], f"{place}.")
    if role not in allowed:
        raise ValueError(f"{place} {_role_reason(role, message.get(keys[1]), keys, allowed)}")
    return allowed[role]


def _role_reason(role: str, content: Any, keys: tuple[str, str], allowed: Mapping[str, str]) -> str:
    if isinstance(content, str) and content in allowed:
        return f"has {_short(role)} in {keys[0]} and {content!r} in {keys[1]}: they are swapped"
    if role == "developer":
        return "has the role 'developer', which Llama does not have; write system"
    what = f"text in {keys[0]}," if len(role) > _LONGEST_ROLE or " " in role else "the role"
    return f"has {what} {_short(role)}; allowed: {', '.join(allowed)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_ROLE else f"{text[:_LONGEST_ROLE]}…")


def _content(message: Mapping[str, Any], role: str, has_calls: bool, place: str) -> Any:
    value = message.get("content")
    if has_calls and value is None:
        return ""
    if value and isinstance(value, list) and (role != "tool" or _is_text_parts(value)):
        return "".join(_part(part, f"{place}.content[{i}]") for i, part in enumerate(value))
    if role == "tool" and "content" in message:
        return value
    return text_of(message, "content", f"{place}.")


def _is_text_parts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(p, dict) and set(p) == {"type", "text"} for p in value)


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict):
        raise ValueError(f"{place} is {kind_of(part)}; expected an object with type and text")
    if part.get("type") != "text":
        raise ValueError(f"{place} is of type {part.get('type')}; only parts of type text are read")
    unknown = sorted({key for key, value in part.items() if value is not None} - {"type", "text"})
    if unknown:
        raise ValueError(f"{place} has {', '.join(unknown)}, which is not read")
    return text_of(part, "text", f"{place}.")


def _training(message: Mapping[str, Any], place: str) -> Message:
    """`train`, or OpenAI's `weight` 0 or 1 for it; nothing where neither is said."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and weight is not None:
        raise ValueError(f"{place} has train and weight; they say the same, give one")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(
                f"{place}.weight is {json.dumps(weight, default=str)[:20]}; allowed: 0 or 1"
            )
        train = bool(weight)
    if train is None:
        return {}
    if not isinstance(train, bool):
        raise ValueError(f"{place}.train is {kind_of(train)}; allowed: true or false")
    return {"train": train}
