"""Messages to ids and train mask, grown together segment by segment.

No string is searched and nothing is tokenised twice: a conversation is a list of segments, each
either one control token or a piece of text, each trained or not. Text is encoded as plain text,
so a user who types `<|eot_id|>` writes five characters, not a turn's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from finetune.errors import InputError
from finetune.llama.tokenizer import encode_text, special_id

Message = Mapping[str, str]  # {"role": system | user | assistant, "content": text}
DEFAULT_DATE = "26 Jul 2024"  # what Meta's own template prints where none is given
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Segment:
    """A control token or a piece of text.

    Attributes:
        text: the token's name, or the text.
        control: whether `text` names one control token.
        turn: index of the message whose answer this is, or None: not the assistant's words.
    """

    text: str
    control: bool = False
    turn: int | None = None


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it: ids and, for each, whether it is trained."""

    input_ids: list[int]
    train_mask: list[bool]


@dataclass(frozen=True)
class ChatFormat:
    """One documented prompt format.

    Attributes:
        name: as in `data.chat_format`.
        bos: the token that opens the conversation.
        stops: tokens that end an answer, the first being the one training teaches.
        segments: messages (and the date, for formats that print one) to segments, without bos.
        opening: what stands before an answer that is still to be written.
        template: the same format as a Jinja chat template for other libraries.
        source: where the format is documented.
        date_string: what formats with a date print; never the clock.
    """

    name: str
    bos: str
    stops: tuple[str, ...]
    segments: Callable[[Sequence[Message], str], Iterator[Segment]]
    opening: tuple[Segment, ...]
    template: str
    source: str
    date_string: str = DEFAULT_DATE

    def render(
        self,
        tokenizer: PreTrainedTokenizerFast,
        messages: Sequence[Message],
        train_on: str = "assistant",
        date_string: str | None = None,
    ) -> Rendered:
        """A whole conversation with its train mask.

        Args:
            train_on: assistant (every answer and its end of turn), last (the last answer), all
                (everything but BOS).
            date_string: instead of the format's own.
        """
        check_messages(messages)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        ids, mask = [special_id(tokenizer, self.bos)], [False]
        for segment in self.segments(messages, date_string or self.date_string):
            new = _encode(tokenizer, segment)
            is_answer = segment.turn is not None
            is_bos = segment.control and segment.text == self.bos  # Llama 2 has one a turn
            trained = {"assistant": is_answer, "last": segment.turn == last and is_answer}
            ids += new
            mask += [trained.get(train_on, not is_bos)] * len(new)
        assert ids[:2] != [ids[0], ids[0]], f"{self.name}: two BOS at the start"
        return Rendered(ids, mask)

    def prompt(
        self,
        tokenizer: PreTrainedTokenizerFast,
        messages: Sequence[Message],
        date_string: str | None = None,
    ) -> list[int]:
        """The ids after which the model writes the next answer; the last message is the user's.

        Raises:
            InputError: the messages are no conversation, or end with an answer.
        """
        check_messages(messages)
        if messages[-1]["role"] != "user":
            raise InputError("the last message is the assistant's; a prompt ends with the user's")
        ids = [special_id(tokenizer, self.bos)]
        for segment in (*self.segments(messages, date_string or self.date_string), *self.opening):
            ids += _encode(tokenizer, segment)
        return ids

    def jinja(self) -> str:
        """The template for other libraries, with this format's date instead of the default one."""
        return self.template.replace(DEFAULT_DATE, self.date_string)

    def stop_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Ids of every stop token that the tokenizer has, the taught one first."""
        vocabulary = tokenizer.get_vocab()
        special_id(tokenizer, self.stops[0])
        return [vocabulary[stop] for stop in self.stops if stop in vocabulary]


def check_messages(messages: Sequence[Message]) -> None:
    """Roles in the order the formats document: [system] user assistant user assistant …

    Raises:
        InputError: another order, an unknown role, or content that is not text.
    """
    if not messages:
        raise InputError("no messages; a conversation has at least a user's message")
    for message in messages:
        if message.get("role") not in ROLES:
            raise InputError(f"role {message.get('role')!r}; allowed: {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"content of the {message['role']} message is not text")
    turns = [m["role"] for m in messages if m["role"] != "system"]
    if any(m["role"] == "system" for m in messages[1:]):
        raise InputError("a system message stands after the first message")
    expected = ["user", "assistant"] * len(turns)
    if not turns or turns != expected[: len(turns)]:
        raise InputError(
            f"turns are {', '.join(turns) or 'none'}; expected user, assistant, user …"
        )


def _encode(tokenizer: PreTrainedTokenizerFast, segment: Segment) -> list[int]:
    if segment.control:
        return [special_id(tokenizer, segment.text)]
    return encode_text(tokenizer, segment.text)


def _nano(messages: Sequence[Message], date_string: str) -> Iterator[Segment]:
    for index, message in enumerate(messages):
        turn = index if message["role"] == "assistant" else None
        yield Segment(f"<|{message['role']}|>", control=True)
        yield Segment(message["content"], turn=turn)
        yield Segment("</s>", control=True, turn=turn)


def _llama2(messages: Sequence[Message], date_string: str) -> Iterator[Segment]:
    system = ""
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            if index > 1:
                yield Segment("<s>", control=True)
            yield Segment(f"[INST] {system}{content} [/INST]")
            system = ""
        else:
            yield Segment(f"{content} ", turn=index)
            yield Segment("</s>", control=True, turn=index)


def _header(role: str) -> tuple[Segment, ...]:
    return (
        Segment("<|start_header_id|>", control=True),
        Segment(role),
        Segment("<|end_header_id|>", control=True),
        Segment("\n\n"),
    )


def _llama3(messages: Sequence[Message], date_string: str) -> Iterator[Segment]:
    for index, message in enumerate(messages):
        turn = index if message["role"] == "assistant" else None
        yield from _header(message["role"])
        yield Segment(message["content"].strip(), turn=turn)
        yield Segment("<|eot_id|>", control=True, turn=turn)


def _llama31(messages: Sequence[Message], date_string: str) -> Iterator[Segment]:
    """Llama 3.1 and later: the system turn always stands, and opens with two dates."""
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {date_string}\n\n"
    has_system = messages[0]["role"] == "system"
    system = messages[0]["content"].strip() if has_system else ""
    yield from _header("system")
    yield Segment(dates + system)
    yield Segment("<|eot_id|>", control=True)
    offset = 1 if has_system else 0
    for segment in _llama3(messages[offset:], date_string):
        turn = None if segment.turn is None else segment.turn + offset
        yield Segment(segment.text, segment.control, turn)


_LLAMA3_TURNS = (
    "{%- for message in messages[start:] -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)
_LLAMA3_TEMPLATE = "{{- bos_token -}}{%- set start = 0 -%}" + _LLAMA3_TURNS
_LLAMA31_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set start = 1 if messages[0]['role'] == 'system' else 0 -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n"
    "Cutting Knowledge Date: December 2023\\nToday Date: '"
    " + (date_string | default('26 Jul 2024')) + '\\n\\n' -}}"
    "{%- if start -%}{{- messages[0]['content'] | trim -}}{%- endif -%}"
    "{{- '<|eot_id|>' -}}" + _LLAMA3_TURNS
)
_NANO_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '</s>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_LLAMA2_TEMPLATE = (
    "{%- set start = 1 if messages[0]['role'] == 'system' else 0 -%}"
    "{%- for message in messages[start:] -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' -}}"
    "{%- if start and loop.index0 == 0 -%}"
    "{{- '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}"
    "{{- message['content'] | trim + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + message['content'] | trim + ' ' + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
_META_PAGE = "Meta's prompt format page of the model, and its reference `ChatFormat`"
_HEADER_STOPS = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")

FORMATS: dict[str, ChatFormat] = {
    "nano": ChatFormat(
        "nano",
        "<s>",
        ("</s>",),
        _nano,
        (Segment("<|assistant|>", control=True),),
        _NANO_TEMPLATE,
        "assets/llama-nano/README.md",
    ),
    "llama2": ChatFormat(
        "llama2",
        "<s>",
        ("</s>",),
        _llama2,
        (),
        _LLAMA2_TEMPLATE,
        "Meta's Llama 2 reference code, `chat_completion`",
    ),
    "llama3": ChatFormat(
        "llama3",
        "<|begin_of_text|>",
        _HEADER_STOPS,
        _llama3,
        _header("assistant"),
        _LLAMA3_TEMPLATE,
        _META_PAGE,
    ),
    "llama3.1": ChatFormat(
        "llama3.1",
        "<|begin_of_text|>",
        _HEADER_STOPS,
        _llama31,
        _header("assistant"),
        _LLAMA31_TEMPLATE,
        _META_PAGE,
    ),
}
FORMATS["llama3.2"] = FORMATS["llama3.1"]


def detect_format(tokenizer: PreTrainedTokenizerFast, rope_factor: float | None) -> ChatFormat:
    """The documented format of a base, from its tokenizer's control tokens and its RoPE scaling.

    Args:
        rope_factor: of Llama 3.1's scaling; None where positions are not scaled.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|assistant|>" in vocabulary and "<|user|>" in vocabulary:
        return FORMATS["nano"]
    if "<|start_header_id|>" in vocabulary:
        return FORMATS["llama3" if rope_factor is None else "llama3.1"]
    if "<s>" in vocabulary and "</s>" in vocabulary:
        return FORMATS["llama2"]
    raise InputError(
        "data.chat_format: auto finds no documented format for this tokenizer; "
        f"name one of {', '.join(FORMATS)}"
    )
