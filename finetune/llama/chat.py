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
from finetune.llama import segments, templates
from finetune.llama.conversation import (
    TOOL_ROLES,
    Conversation,
    Message,
    Tool,
    check_each,
    check_in_order,
)
from finetune.llama.segments import Segment
from finetune.llama.templates import DEFAULT_DATE
from finetune.llama.tokenizer import encode_text, encode_texts, special_id


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
        segments: a conversation (and the date, for formats that print one) to segments, without
            the first BOS.
        opening: what stands before an answer that is still to be written.
        template: the same format as a Jinja chat template for other libraries.
        source: where the format is documented.
        has_tools: whether tools, their calls and their results have a place in it.
        any_order: whether turns may stand in any order.
        date_string: what formats with a date print; never the clock.
    """

    name: str
    bos: str
    stops: tuple[str, ...]
    segments: Callable[[Conversation, str], Iterator[Segment]]
    opening: tuple[Segment, ...]
    template: str
    source: str
    has_tools: bool = False
    any_order: bool = False
    date_string: str = DEFAULT_DATE

    def render(
        self,
        tokenizer: PreTrainedTokenizerFast,
        messages: Sequence[Message],
        train_on: str = "assistant",
        date_string: str | None = None,
        tools: Sequence[Tool] = (),
    ) -> Rendered:
        """A whole conversation with its train mask.

        Args:
            train_on: assistant (every answer and its end of turn), last (the last answer), all
                (everything but BOS). A message's own `train` goes before it.
            date_string: instead of the format's own.
            tools: what the model is told it can call; see `conversation.Tool`.

        Raises:
            InputError: the format has no place for something; it would be lost or moved.
        """
        conversation = Conversation(messages, tools)
        rendered = self.render_many(tokenizer, [conversation], train_on, date_string)[0]
        if isinstance(rendered, InputError):
            raise rendered
        return rendered

    def render_many(
        self,
        tokenizer: PreTrainedTokenizerFast,
        conversations: Sequence[Conversation],
        train_on: str = "assistant",
        date_string: str | None = None,
    ) -> list[Rendered | InputError]:
        """`render` of many conversations; their texts are encoded together, each only once.

        Returns:
            for each conversation what `render` returns, or what it would raise.
        """
        date = date_string or self.date_string
        written = [self._written(conversation, date) for conversation in conversations]
        ids_of = _encoded(tokenizer, written)
        return [
            found
            if isinstance(found, InputError)
            else self._joined(ids_of, found, conversation, train_on)
            for conversation, found in zip(conversations, written, strict=True)
        ]

    def _written(self, conversation: Conversation, date: str) -> list[Segment] | InputError:
        try:
            self.check(conversation)
            return [Segment(self.bos, control=True), *self.segments(conversation, date)]
        except InputError as error:
            return error

    def _joined(
        self,
        ids_of: Mapping[tuple[str, bool], list[int]],
        written: Sequence[Segment],
        conversation: Conversation,
        train_on: str,
    ) -> Rendered:
        ids, mask = list(ids_of[written[0].text, True]), [False]
        for segment in written[1:]:
            new = ids_of[segment.text, segment.control]
            ids += new
            mask += [self._is_trained(segment, conversation, train_on)] * len(new)
        assert ids[:2] != [ids[0], ids[0]], f"{self.name}: two BOS at the start"
        return Rendered(ids, mask)

    def _is_trained(self, segment: Segment, conversation: Conversation, train_on: str) -> bool:
        if segment.message is not None:
            own_choice = conversation.messages[segment.message].get("train")
            if own_choice is not None:
                return bool(own_choice)
        if train_on == "all":
            return not (segment.control and segment.text == self.bos)  # Llama 2 has one a turn
        is_chosen = train_on == "assistant" or segment.message == conversation.last_answer
        return segment.is_answer and is_chosen

    def prompt(
        self,
        tokenizer: PreTrainedTokenizerFast,
        messages: Sequence[Message],
        date_string: str | None = None,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """The ids after which the model writes the next answer.

        Raises:
            InputError: the messages are no conversation, or end with an answer.
        """
        conversation = Conversation(messages, tools)
        self.check(conversation)
        if messages[-1]["role"] == "assistant":
            raise InputError(
                "the last message is the assistant's; a prompt ends with the user's or a tool's"
            )
        bos = Segment(self.bos, control=True)
        written = self.segments(conversation, date_string or self.date_string)
        return [i for s in (bos, *written, *self.opening) for i in _encode(tokenizer, s)]

    def check(self, conversation: Conversation) -> None:
        """Refuses what the format has no place for.

        Raises:
            InputError: an order, a role or tools that it does not document.
        """
        if not self.any_order:
            check_in_order(conversation, self.has_tools, self.name)
            return
        check_each(conversation, TOOL_ROLES)
        if conversation.tools:
            raise InputError(
                f"has tools; the format {self.name} takes them as part of the system or user text"
            )
        if any(not isinstance(m.get("content"), str) for m in conversation.messages):
            raise InputError(f"the format {self.name} takes text only as content")

    def jinja(self) -> str:
        """The template for other libraries, with this format's date instead of the default one."""
        return self.template.replace(DEFAULT_DATE, self.date_string)

    def stop_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Ids of every stop token that the tokenizer has, the taught one first."""
        vocabulary = tokenizer.get_vocab()
        special_id(tokenizer, self.stops[0])
        return [vocabulary[stop] for stop in self.stops if stop in vocabulary]


def _encode(tokenizer: PreTrainedTokenizerFast, segment: Segment) -> list[int]:
    if segment.control:
        return [special_id(tokenizer, segment.text)]
    return encode_text(tokenizer, segment.text)


def _encoded(
    tokenizer: PreTrainedTokenizerFast, written: Sequence[list[Segment] | InputError]
) -> dict[tuple[str, bool], list[int]]:
    """(text, whether it is a control token) -> ids, for every segment of many conversations."""
    found = {
        (segment.text, segment.control): segment
        for segments_of_one in written
        if not isinstance(segments_of_one, InputError)
        for segment in segments_of_one
    }
    texts = [text for text, control in found if not control]
    ids_of = dict(zip(((t, False) for t in texts), encode_texts(tokenizer, texts), strict=True))
    controls = [text for text, control in found if control]
    return ids_of | {(text, True): [special_id(tokenizer, text)] for text in controls}


def _with_headers(
    name: str,
    written: Callable[[Conversation, str], Iterator[Segment]],
    template: str,
    source: str,
    has_tools: bool = True,
    any_order: bool = False,
) -> ChatFormat:
    """A format of the Llama 3 family."""
    return ChatFormat(
        name,
        "<|begin_of_text|>",
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        written,
        segments.header("assistant"),
        template,
        source,
        has_tools,
        any_order,
    )


_NANO = ChatFormat(
    "nano",
    "<s>",
    ("</s>",),
    segments.nano,
    (Segment("<|assistant|>", control=True),),
    templates.NANO,
    "assets/llama-nano/README.md",
)
_LLAMA2 = ChatFormat(
    "llama2",
    "<s>",
    ("</s>",),
    segments.llama2,
    (),
    templates.LLAMA2,
    "`Llama.chat_completion` in llama/generation.py of meta-llama/llama",
)
_PAGE = "Meta's prompt format page of the model, and the chat template it was published with"

FORMATS: dict[str, ChatFormat] = {
    chat_format.name: chat_format
    for chat_format in (
        _NANO,
        _LLAMA2,
        _with_headers(
            "llama3",
            segments.llama3,
            templates.LLAMA3,
            "`ChatFormat` in llama/tokenizer.py of meta-llama/llama3",
            has_tools=False,
        ),
        _with_headers("llama3.1", segments.llama31, templates.LLAMA31, _PAGE),
        _with_headers("llama3.2", segments.llama32, templates.LLAMA32, _PAGE),
        _with_headers(
            "llama3.3",
            segments.llama31,
            templates.LLAMA31,
            "models/llama3_3/prompts.py of meta-llama/llama-models: Llama 3.1's formats",
        ),
        _with_headers(
            "llama3.1-verbatim",
            segments.verbatim,
            templates.VERBATIM,
            "`ChatFormat` in models/llama3/chat_format.py of meta-llama/llama-models",
            any_order=True,
        ),
    )
}


def detect_format(tokenizer: PreTrainedTokenizerFast, rope_factor: float | None) -> ChatFormat:
    """The documented format of a base, from its tokenizer's control tokens and its RoPE scaling.

    Args:
        rope_factor: of Llama 3.1's scaling (3.2 has 32); None where positions are not scaled.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|assistant|>" in vocabulary and "<|user|>" in vocabulary:
        return FORMATS["nano"]
    if "<|start_header_id|>" in vocabulary:
        if rope_factor is None:
            return FORMATS["llama3"]
        return FORMATS["llama3.2" if rope_factor == 32.0 else "llama3.1"]
    if "<s>" in vocabulary and "</s>" in vocabulary:
        return FORMATS["llama2"]
    raise InputError(
        "data.chat_format: auto finds no documented format for this tokenizer; "
        f"name one of {', '.join(FORMATS)}"
    )
