"""The documented prompt formats as segments: control tokens and pieces of text, in order.

Each function takes a conversation that fits the format and yields what stands after the first BOS.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune.errors import InputError
from finetune.llama.conversation import Call, Conversation, Message, calls_of

CODE_INTERPRETER = "code_interpreter"

# What Meta's published templates of Llama 3.1 to 3.3 tell the model before its functions.
CALL_AS_JSON = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables.\n\n"
)


class Segment(NamedTuple):
    """A control token or a piece of text.

    Attributes:
        text: the token's name, or the text.
        control: whether `text` names one control token.
        message: index of the message whose words (or end of turn) this is, else None.
        is_answer: whether that message is the assistant's.
    """

    text: str
    control: bool = False
    message: int | None = None
    is_answer: bool = False


def nano(conversation: Conversation, date_string: str) -> Iterator[Segment]:
    """The format of the embedded base: a control token for each role, nothing trimmed."""
    for index, message in enumerate(conversation.messages):
        is_answer = message["role"] == "assistant"
        yield Segment(f"<|{message['role']}|>", control=True)
        yield Segment(message["content"], False, index, is_answer)
        yield Segment("</s>", True, index, is_answer)


def llama2(conversation: Conversation, date_string: str) -> Iterator[Segment]:
    """Llama 2 Chat: the system text inside the first user turn, BOS before every exchange."""
    system = ""
    for index, message in enumerate(conversation.messages):
        content = message["content"].strip()
        if message["role"] == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            if index > 1:
                yield Segment("<s>", control=True)
            yield Segment(f"[INST] {system}{content} [/INST]", message=index)
            system = ""
        else:
            yield Segment(f"{content} ", False, index, True)
            yield Segment("</s>", True, index, True)


@functools.cache
def header(role: str) -> tuple[Segment, ...]:
    """What opens a turn in Llama 3 and later."""
    return (
        Segment("<|start_header_id|>", control=True),
        Segment(role),
        Segment("<|end_header_id|>", control=True),
        Segment("\n\n"),
    )


def llama3(conversation: Conversation, date_string: str) -> Iterator[Segment]:
    """Llama 3: a header for each turn, its text trimmed."""
    for index, message in enumerate(conversation.messages):
        yield from _turn(index, message, message["content"].strip())


def llama31(conversation: Conversation, date_string: str) -> Iterator[Segment]:
    """Llama 3.1 and 3.3: the system turn always stands, with two dates; functions and built-in
    tools."""
    yield from _dated_system(conversation, date_string)
    yield from _turns_with_tools(conversation)


def llama32(conversation: Conversation, date_string: str) -> Iterator[Segment]:
    """Llama 3.2 1B and 3B: as 3.1, without built-in tools."""
    if conversation.builtin_tools:
        raise InputError(
            f"has built-in tools ({', '.join(conversation.builtin_tools)}); the format llama3.2 "
            "has functions only (llama3.1 has both; llama3.1-verbatim writes any system text)"
        )
    return llama31(conversation, date_string)


def verbatim(conversation: Conversation, date_string: str) -> Iterator[Segment]:
    """Llama 3.1's headers around exactly the content given, as Meta's reference code writes them:
    nothing trimmed, no dates, turns in any order.

    An assistant's message may say `python_tag: true` (its text follows `<|python_tag|>`) and
    `end: eom` (the turn ends with `<|eom_id|>`: the model waits for a tool).
    """
    for index, message in enumerate(conversation.messages):
        if message.get("tool_calls"):
            raise InputError(
                "has tool_calls; the format llama3.1-verbatim takes a call as its content, with "
                "python_tag: true and end: eom where they apply"
            )
        end = message.get("end", "eot")
        if end not in ("eot", "eom"):
            raise InputError(f"end is {end!r}; allowed: eot, eom")
        yield from _turn(
            index, message, message["content"], bool(message.get("python_tag")), end == "eom"
        )


def _turn(
    index: int, message: Message, text: str, python_tag: bool = False, is_eom: bool = False
) -> Iterator[Segment]:
    role = message["role"]
    is_answer = role == "assistant"
    yield from header("ipython" if role == "tool" else role)
    if python_tag:
        yield Segment("<|python_tag|>", True, index, is_answer)
    yield Segment(text, False, index, is_answer)
    yield Segment("<|eom_id|>" if is_eom else "<|eot_id|>", True, index, is_answer)


def _dated_system(conversation: Conversation, date_string: str) -> Iterator[Segment]:
    builtin = conversation.builtin_tools
    text = "Environment: ipython\n" if conversation.tools else ""
    if builtin:
        listed = ", ".join(name for name in builtin if name != CODE_INTERPRETER)
        text += f"Tools: {listed}\n\n"
    text += f"Cutting Knowledge Date: December 2023\nToday Date: {date_string}\n\n"
    message = None if conversation.system is None else 0
    yield from header("system")
    yield Segment(text + (conversation.system or "").strip(), message=message)
    yield Segment("<|eot_id|>", True, message)


def _turns_with_tools(conversation: Conversation) -> Iterator[Segment]:
    builtin, introduction = conversation.builtin_tools, _introduction(conversation)
    for index, message in enumerate(conversation.messages):
        if message["role"] == "system":
            continue
        if calls := calls_of(message):
            text, python_tag = _call_text(message, calls, builtin)
            yield from _turn(index, message, text, python_tag, is_eom=bool(builtin))
        elif message["role"] == "tool":
            yield from _turn(index, message, as_json(message["content"]))
        else:
            yield from _turn(index, message, introduction + message["content"].strip())
            introduction = ""


def _introduction(conversation: Conversation) -> str:
    """What stands before the first user's words: the functions, and how to call them."""
    if not conversation.functions:
        return ""
    listed = "".join(as_json(schema, indent=4) + "\n\n" for schema in conversation.functions)
    return CALL_AS_JSON + listed


def _call_text(message: Message, calls: list[Call], builtin: list[str]) -> tuple[str, bool]:
    """A call as the format writes it, and whether `<|python_tag|>` stands before it."""
    if len(calls) > 1:
        names = ", ".join(call.name for call in calls)
        raise InputError(
            f"the assistant's message has {len(calls)} tool calls ({names}); Llama 3.1 to 3.3 have "
            "one a message: make a message of each, its result after it"
        )
    if (message.get("content") or "").strip():
        raise InputError(
            f"the assistant's message has text beside its call of {calls[0].name}; the format has "
            "no place for both: it would be lost"
        )
    call = calls[0]
    if call.name not in builtin:
        return f'{{"name": "{call.name}", "parameters": {as_json(call.arguments)}}}', False
    return _builtin_call(call), True


def _builtin_call(call: Call) -> str:
    """Meta's notation of a built-in tool: code stands as it is, a search as `tool.call(query=…)`.

    The published template writes `code_interpreter.call(code="…")`, which Meta's page and
    reference code do not; theirs is taken.
    """
    wrong = [key for key, value in call.arguments.items() if not isinstance(value, str)]
    if wrong or (call.name == CODE_INTERPRETER and set(call.arguments) != {"code"}):
        raise InputError(
            f"the call of the built-in tool {call.name} has the arguments "
            f"{', '.join(call.arguments) or 'none'}; expected text only"
            + (", under code" if call.name == CODE_INTERPRETER else "")
        )
    if call.name == CODE_INTERPRETER:
        return str(call.arguments["code"])
    arguments = ", ".join(f'{key}="{value}"' for key, value in call.arguments.items())
    return f"{call.name}.call({arguments})"


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON as the templates' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
