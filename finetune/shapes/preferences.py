"""Preference data: recognised, and refused with the reading that makes SFT rows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.shapes.layouts import given
from finetune.shapes.messages import is_chat, is_sharegpt

Reading = tuple[str, dict[str, str]]
"""A format and its columns: our name -> the file's."""

_FLAGS = ("kto_tag", "label")
_CONVERSATIONS = ("conversations", "conversation", "messages", "prompt")
_QUESTIONS = ("question", "query")
_ASSISTANT = ("assistant", "gpt", "chatgpt", "bing")


def as_yaml(reading: Reading) -> str:
    """A reading as it stands in a config's source."""
    shape, columns = reading
    named = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    return f"format: {shape}" + (f", columns: {{{named}}}" if named else "")


def preference_reason(columns: Mapping[str, Any], fitting: list[str]) -> str | None:
    """Why a row is no SFT row but preference data, or None.

    Args:
        fitting: the shapes that the row would have by its columns.
    """
    if given(columns, "chosen", "rejected"):
        reading = _chosen(columns)
        how = f"give {as_yaml(reading)}" if reading else "its chosen column is no conversation"
        return f"is preference data (chosen, rejected); to train on the chosen answer, {how}"
    flag = next((name for name in _FLAGS if _is_flag(columns.get(name))), None)
    shapes = [shape for shape in fitting if shape != "text"]
    if flag and shapes:
        return (
            f"is preference data (KTO): {flag} says whether the answer is wanted; to train on all "
            f"of them, unwanted ones too, give {as_yaml((shapes[0], {}))}; or keep the wanted ones"
        )
    return None


def _is_flag(value: Any) -> bool:
    """True or false, or the words, since a csv file has no other."""
    return isinstance(value, bool) or (
        isinstance(value, str) and value.lower() in ("true", "false")
    )


def _chosen(columns: Mapping[str, Any]) -> Reading | None:
    chosen = columns["chosen"]
    first = chosen[0] if isinstance(chosen, list) and chosen else chosen
    if isinstance(chosen, list) and _role(first) not in _ASSISTANT:
        if is_chat(chosen):
            return "messages", {"messages": "chosen"}
        return ("sharegpt", {"conversations": "chosen"}) if is_sharegpt(chosen) else None
    before = next((name for name in _CONVERSATIONS if given(columns, name)), None)
    if before:
        named = {} if before == "prompt" else {"prompt": before}
        return "prompt_completion", {**named, "completion": "chosen"}
    return _after_question(columns) if isinstance(chosen, str) else None


def _role(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, dict) else None


def _after_question(columns: Mapping[str, Any]) -> Reading | None:
    if given(columns, "instruction"):
        return "alpaca", {"output": "chosen"}
    asked = next((name for name in _QUESTIONS if given(columns, name)), None)
    return ("alpaca", {"instruction": asked, "output": "chosen"}) if asked else None
