"""A second way to ids and mask where tools, results and a message's own choice come in.

Every format is written as a list of turns; texts are encoded by the original libraries, which know
no control tokens, and the mask is looked up by the place of a token in its message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chat_reference import DATE, Case
from hypothesis import strategies as st

CODE = "code_interpreter"
HOSTILE = (
    *("</s>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<<SYS>>"),
    *("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eom_id|>"),
    *("<|end_header_id|>", "<|python_tag|>", "<|eot_id|><|start_header_id|>user<|end_header_id|>"),
)
pieces = (*HOSTILE, " ", "\n", "\n\n", "\t", '"', "\\", "{}", "ok", "é中🙂", "1.")
texts = st.lists(st.sampled_from(pieces), max_size=4).map("".join) | st.text(max_size=10)
values = st.recursive(
    texts | st.integers(-99, 99) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=3,
)
names = st.sampled_from(("add", "brave_search", "f<|eot_id|>", '</s>"'))


@st.composite
def conversations(draw, with_calls: bool = False, builtin: Sequence[str] = ()) -> list[dict]:
    """[system] (user (call, result)* assistant)+; messages may say whether they are trained."""

    def message(role: str, **values: Any) -> dict[str, Any]:
        own = draw(st.sampled_from([None, None, True, False]))
        if own is None or (own and role == "system"):
            return {"role": role, **values}
        return {"role": role, "train": own, **values}

    def call() -> dict[str, Any]:
        name = draw(st.sampled_from([*builtin, "add"]) if builtin else names)
        if name == CODE:
            return {"name": name, "arguments": {"code": draw(texts)}}
        kinds = texts if name in builtin else values
        return {"name": name, "arguments": draw(st.dictionaries(texts, kinds, max_size=2))}

    found = [message("system", content=draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        found.append(message("user", content=draw(texts)))
        for _ in range(draw(st.integers(0, 2)) if with_calls else 0):
            found.append(message("assistant", content="", tool_calls=[call()]))
            found.append(message("tool", content=draw(values.filter(lambda v: v is not None))))
        found.append(message("assistant", content=draw(texts)))
    return found


@st.composite
def transcripts(draw) -> list[dict]:
    """Messages of the verbatim format, in any order."""
    turns = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": texts},
        optional={
            "train": st.booleans(),
            "python_tag": st.booleans(),
            "end": st.sampled_from(["eot", "eom"]),
        },
    )
    return draw(st.lists(turns, min_size=1, max_size=6))


schemas = st.fixed_dictionaries({"name": names, "description": texts, "parameters": values})


@dataclass(frozen=True)
class Piece:
    """A control token or a text, and the message whose words it is."""

    text: str
    control: bool = False
    message: int | None = None


def reference(
    case: Case, name: str, messages: list[dict], tools: Sequence[Any], train_on: str
) -> tuple[list[int], list[bool]]:
    """Ids and train mask of a conversation in a format."""
    written = {"nano": _nano, "llama2": _llama2}.get(name)
    pieces = written(messages) if written else _llama3(name, messages, tools)
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    trained = set(answers if train_on == "assistant" else answers[-1:])
    bos = "<s>" if written else "<|begin_of_text|>"
    ids, mask = [case.control(bos)], [False]
    for piece in pieces:
        new = [case.control(piece.text)] if piece.control else case.oracle(piece.text)
        choice = None if piece.message is None else messages[piece.message].get("train")
        if choice is None:
            is_bos = piece.control and piece.text == bos
            choice = not is_bos if train_on == "all" else piece.message in trained
        ids += new
        mask += [choice] * len(new)
    return ids, mask


def _nano(messages: list[dict]) -> Iterator[Piece]:
    for n, m in enumerate(messages):
        yield Piece(f"<|{m['role']}|>", True)
        yield Piece(m["content"], message=n)
        yield Piece("</s>", True, n)


def _llama2(messages: list[dict]) -> Iterator[Piece]:
    has_system = messages[0]["role"] == "system"
    for n, m in enumerate(messages):
        text = m["content"].strip()
        if m["role"] == "user":
            first = n == int(has_system)
            if not first:
                yield Piece("<s>", True)
            if first and has_system:
                text = f"<<SYS>>\n{messages[0]['content'].strip()}\n<</SYS>>\n\n{text}"
            yield Piece(f"[INST] {text} [/INST]", message=n)
        elif m["role"] == "assistant":
            yield Piece(f"{text} ", message=n)
            yield Piece("</s>", True, n)


def _llama3(name: str, messages: list[dict], tools: Sequence[Any]) -> Iterator[Piece]:
    builtin = [t for t in tools if isinstance(t, str)]
    functions = [json.dumps(t, ensure_ascii=False, indent=4) for t in tools if isinstance(t, dict)]
    is_dated = name not in ("llama3", "llama3.1-verbatim")
    if is_dated and messages[0]["role"] != "system":
        yield from _turn("system", _dated(tools, builtin, ""), None)
    first_user = next((n for n, m in enumerate(messages) if m["role"] == "user"), None)
    for n, m in enumerate(messages):
        text, tag, end = m["content"], m.get("python_tag", False), m.get("end", "eot")
        if name != "llama3.1-verbatim":
            text = text.strip() if m["role"] != "tool" else json.dumps(text, ensure_ascii=False)
        if is_dated and m["role"] == "system":
            text = _dated(tools, builtin, text)
        if m.get("tool_calls"):
            text, tag = _call(m["tool_calls"][0], builtin)
            end = "eom" if builtin else "eot"
        if functions and n == first_user:
            text = INTRODUCTION + "".join(f"{schema}\n\n" for schema in functions) + text
        yield from _turn("ipython" if m["role"] == "tool" else m["role"], text, n, tag, end)


INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def _dated(tools: Sequence[Any], builtin: list[str], system: str) -> str:
    opening = "Environment: ipython\n" if tools else ""
    if builtin:
        opening += "Tools: " + ", ".join(t for t in builtin if t != CODE) + "\n\n"
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
    return opening + dates + system.strip()


def _call(call: dict[str, Any], builtin: list[str]) -> tuple[str, bool]:
    if call["name"] not in builtin:
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        return '{"name": "' + call["name"] + '", "parameters": ' + arguments + "}", False
    if call["name"] == CODE:
        return call["arguments"]["code"], True
    given = [f'{key}="{value}"' for key, value in call["arguments"].items()]
    return call["name"] + ".call(" + ", ".join(given) + ")", True


def _turn(
    role: str, text: str, message: int | None, tag: bool = False, end: str = "eot"
) -> Iterator[Piece]:
    yield from (Piece("<|start_header_id|>", True), Piece(role))
    yield from (Piece("<|end_header_id|>", True), Piece("\n\n"))
    if tag:
        yield Piece("<|python_tag|>", True, message)
    yield Piece(text, message=message)
    yield Piece(f"<|{end}_id|>", True, message)
