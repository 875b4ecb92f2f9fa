"""Tools of a row: what an assistant calls, and what it may call."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from finetune.files.strict_json import kind_of, parse

_NAME = re.compile(r"[A-Za-z_][\w.-]*\Z")
_CALL = '{"name": …, "arguments": {…}}'


def read_calls(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The calls of a role/content message: `tool_calls`, or OpenAI's older `function_call`.

    Returns:
        [{"name": str, "arguments": dict}]; empty where nothing is called.

    Raises:
        ValueError: they are written in no way that is read.
    """
    calls, single = message.get("tool_calls"), message.get("function_call")
    if single is not None:
        if calls:
            raise ValueError(f"{place} has function_call and tool_calls; give one")
        return [_call(single, f"{place}.function_call")]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise ValueError(f"{place}.tool_calls is {kind_of(calls)}; expected a list of {_CALL}")
    return [_wrapped_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]


def read_function_call(value: Any, place: str) -> list[dict[str, Any]]:
    """The value of a ShareGPT `function_call`: one call or a list of them, as JSON text or not."""
    value = _parsed(value, place) if isinstance(value, str) else value
    if not isinstance(value, list):
        return [_call(value, place)]
    if not value:
        raise ValueError(f"{place} calls nothing; expected {_CALL}")
    return [_call(call, f"{place}[{i}]") for i, call in enumerate(value)]


def _wrapped_call(call: Any, place: str) -> dict[str, Any]:
    """A call as OpenAI has it, {"id", "type": "function", "function": {…}}, or its inner part."""
    if not isinstance(call, dict) or "function" not in call:
        return _call(call, place)
    if call.get("type", "function") != "function":
        raise ValueError(f"{place}.type is {call['type']!r}; allowed: function")
    _refuse_unknown(call, {"id", "type", "function", "index"}, place)
    return _call(call["function"], f"{place}.function")


def _call(call: Any, place: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f"{place} is {kind_of(call)}; expected {_CALL}")
    _refuse_unknown(call, {"name", "arguments", "id", "type"}, place)
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}.name is {kind_of(name)}; expected the function's name")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}.arguments")
    if not isinstance(arguments, dict):
        found = kind_of(arguments) if "arguments" in call else "missing"
        raise ValueError(f"{place}.arguments is {found}; expected an object, as JSON text or not")
    _refuse_no_json(arguments, f"{place}.arguments")
    return {"name": name, "arguments": arguments}


def _refuse_unknown(value: Mapping[str, Any], known: set[str], place: str) -> None:
    unknown = sorted({key for key, inner in value.items() if inner is not None} - known)
    if unknown:
        raise ValueError(f"{place} has {', '.join(unknown)}, which is not read; expected {_CALL}")


def _parsed(text: str, place: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{place} is text that {error}; expected JSON") from None


def read_tools(value: Any) -> tuple[Any, ...]:
    """A row's `tools` column: a list, or a list as JSON text; null, "" and [] mean none.

    Returns:
        names of built-in tools and JSON schemas of functions, as they stand in the row.

    Raises:
        ValueError: it is neither, or an entry is no tool.
    """
    if isinstance(value, str):
        value = _parsed(value, "tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(
            f"tools is {kind_of(value)}; expected a list of tools, as JSON text or not"
        )
    for index, tool in enumerate(value):
        _check_tool(tool, f"tools[{index}]")
        _refuse_no_json(tool, f"tools[{index}]")
    return tuple(value)


def _refuse_no_json(value: Any, place: str) -> None:
    """Tables hold dates, decimals and bytes as well; which text of them the model should read is
    not guessed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_no_json(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_no_json(inner, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}, which JSON cannot say; write it as text")
    elif not isinstance(value, (str, int, float, NoneType)):
        raise ValueError(f"{place} is {kind_of(value)}, which JSON cannot say; write it as text")


def _check_tool(tool: Any, place: str) -> None:
    if isinstance(tool, str):
        if not _NAME.match(tool):
            raise ValueError(f"{place} is text that is no tool's name: {tool[:30]!r}")
        return
    if not isinstance(tool, dict):
        raise ValueError(f"{place} is {kind_of(tool)}; expected a name or a function's schema")
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place} has no name; expected a function's schema with name")
