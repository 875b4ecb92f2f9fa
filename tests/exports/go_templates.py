"""A renderer of the part of Go's text/template that our Modelfiles use.

`range` over a list, with or without `$index, $value :=`; `if`, `else if`, `else`, `end`; `eq` and
`ne` of two operands; fields of the current element. Anything else is an error.

Source: https://pkg.go.dev/text/template, "Actions", "Variables" and "Functions".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

Node = tuple[str, Any]


def render(template: str, data: dict[str, Any]) -> str:
    tokens = iter(re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL))
    nodes, end = _parse(tokens)
    assert end is None, f"{end} without a beginning"
    return "".join(_run(nodes, data, {}))


def _parse(tokens: Iterator[str]) -> tuple[list[Node], str | None]:
    """Nodes up to an `end` or `else`, which is returned too."""
    nodes: list[Node] = []
    for token in tokens:
        if not token.startswith("{{"):
            nodes.append(("text", token))
            continue
        action = token[2:-2].strip()
        word = action.split(" ")[0]
        if word in ("end", "else"):
            return nodes, action
        if word in ("if", "range"):
            nodes.append(_block(word, action[len(word) :].strip(), tokens))
        else:
            nodes.append(("show", action))
    return nodes, None


def _block(word: str, condition: str, tokens: Iterator[str]) -> Node:
    body, end = _parse(tokens)
    assert end is not None, f"{word} without end"
    other: list[Node] = []
    if end.startswith("else if "):
        other = [_block("if", end.removeprefix("else if "), tokens)]
    elif end == "else":
        other, end = _parse(tokens)
        assert end == "end"
    return word, (condition, body, other)


def _run(nodes: list[Node], dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for kind, content in nodes:
        if kind == "text":
            yield content
        elif kind == "show":
            yield str(_value(content, dot, names))
        elif kind == "if":
            condition, body, other = content
            yield from _run(body if _value(condition, dot, names) else other, dot, names)
        else:
            condition, body, other = content
            assert not other
            declared, _, listed = condition.rpartition(":=")
            variables = [name.strip() for name in declared.split(",") if name.strip()]
            for pair in enumerate(_value(listed.strip(), dot, names)):
                yield from _run(
                    body, pair[1], {**names, **dict(zip(variables, pair, strict=False))}
                )


def _value(expression: str, dot: Any, names: dict[str, Any]) -> Any:
    words = shlex.split(expression, posix=False)
    if words[0] in ("eq", "ne"):
        one, other = (_value(word, dot, names) for word in words[1:])
        return (one == other) == (words[0] == "eq")
    (word,) = words
    if word.startswith("."):
        return dot[word[1:]]
    if word.startswith("$"):
        return names[word]
    return word[1:-1] if word.startswith('"') else int(word)
