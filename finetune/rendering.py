"""Examples to documents: ids and train mask of each, or the reason why there is none.

A row is never cut. One that is longer than `data.max_length` is dropped, refused, split (plain
text), or loses its oldest turns, by the config's policy; whatever happens is in its `Outcome`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from finetune.config.data import DataSection
from finetune.errors import InputError
from finetune.llama.chat import ChatFormat, Rendered
from finetune.llama.conversation import Conversation
from finetune.llama.tokenizer import encode_texts
from finetune.prepared import Document
from finetune.shapes import Example, Message


@dataclass
class Outcome:
    """What became of one example.

    Attributes:
        example: it.
        documents: one; several, where plain text was split; none, where it was dropped.
        dropped: why there is no document.
        refused: why the row stops the run.
        num_tokens_lost: tokens of a dropped row, or of turns that were left out.
        num_turns_lost: turns left out to make the rest fit.
        is_split: whether it became several documents.
    """

    example: Example
    documents: list[Document] = field(default_factory=list)
    dropped: str | None = None
    refused: str | None = None
    num_tokens_lost: int = 0
    num_turns_lost: int = 0
    is_split: bool = False


class Renderer:
    """Renders examples under one config.

    Args:
        data: the config's section.
        tokenizer: of the base.
        chat_format: None for recipes on plain text.
    """

    def __init__(
        self,
        data: DataSection,
        tokenizer: PreTrainedTokenizerFast,
        chat_format: ChatFormat | None,
    ) -> None:
        self._data, self._tokenizer, self._format = data, tokenizer, chat_format

    def __call__(self, examples: Sequence[Example]) -> list[Outcome]:
        """One outcome for each example, in order."""
        outcomes = [Outcome(example, dropped=self._no_use(example)) for example in examples]
        wanted = [outcome for outcome in outcomes if outcome.dropped is None]
        rows = self._rendered([outcome.example for outcome in wanted])
        for outcome, row in zip(wanted, rows, strict=True):
            if isinstance(row, InputError):
                outcome.refused = f"{outcome.example.where}: {row}"
            elif len(row.input_ids) > self._data.max_length:
                self._fit(outcome, row)
            else:
                self._keep(outcome, row)
        return outcomes

    def _no_use(self, example: Example) -> str | None:
        """Why an example is left out before it is rendered."""
        if self._format is None:
            return None if example.text.strip() else "without text"
        answers = [m for m in example.messages if m["role"] == "assistant"]
        if not answers or not _says_something(answers[-1]):
            return "without an answer"
        by_config = self._data.train_on != "last"
        if any(m.get("train", by_config) and not _says_something(m) for m in answers[:-1]):
            return "with an empty answer among its answers"
        return None

    def _rendered(self, examples: Sequence[Example]) -> Sequence[Rendered | InputError]:
        if self._format is None:
            return self._rendered_texts(examples)
        conversations = [Conversation(e.messages, e.tools) for e in examples]
        return self._format.render_many(self._tokenizer, conversations, self._data.train_on)

    def _rendered_texts(self, examples: Sequence[Example]) -> list[Rendered]:
        """Plain text: BOS, the text, EOS where it really ends; everything but BOS is trained."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        assert None not in (bos, eos), "Llama tokenizers have BOS and EOS"
        encoded = encode_texts(self._tokenizer, [example.text for example in examples])
        return [Rendered([bos, *ids, eos], [False] + [True] * (len(ids) + 1)) for ids in encoded]

    def _keep(self, outcome: Outcome, *rows: Rendered) -> None:
        documents = [Document(outcome.example, row.input_ids, row.train_mask) for row in rows]
        if not any(document.num_trained for document in documents):
            outcome.dropped = "without a trained token"
            outcome.num_tokens_lost += sum(len(row.input_ids) for row in rows)
            return
        outcome.documents = documents

    def _fit(self, outcome: Outcome, row: Rendered) -> None:
        """Applies the config's policy to a row that is too long."""
        policy, limit, length = (
            self._data.on_overflow,
            self._data.max_length,
            len(row.input_ids),
        )
        if policy == "split":
            outcome.is_split = True
            self._keep(outcome, *_pieces(row, limit))
        elif policy == "error":
            outcome.refused = (
                f"{outcome.example.where}: {length} tokens, over data.max_length {limit}; "
                "raise it, or data.on_overflow=drop"
            )
        elif policy != "truncate_history" or not self._shorten(outcome, length):
            outcome.dropped = f"longer than data.max_length ({limit} tokens)"
            outcome.num_tokens_lost = length

    def _shorten(self, outcome: Outcome, whole: int) -> bool:
        """Leaves out the oldest exchanges until the rest fits; the system text and the last
        exchange stay as they are.

        Returns:
            whether it fits now.
        """
        example = outcome.example
        while (messages := without_oldest_exchange(example.messages)) is not None:
            example = dataclasses.replace(example, messages=messages)
            row = self._rendered([example])[0]
            assert isinstance(row, Rendered), "it was rendered with more turns before"
            if len(row.input_ids) <= self._data.max_length:
                outcome.num_turns_lost = len(outcome.example.messages) - len(messages)
                outcome.num_tokens_lost = whole - len(row.input_ids)
                outcome.example = example
                self._keep(outcome, row)
                return True
        return False


def without_oldest_exchange(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """A conversation from its second user message on, with its system message.

    Returns:
        None where it has only one exchange.
    """
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    system = messages[:1] if messages[0]["role"] == "system" else ()
    return (*system, *messages[users[1] :])


def _says_something(message: Message) -> bool:
    return bool(message.get("tool_calls")) or bool((message.get("content") or "").strip())


def _pieces(row: Rendered, limit: int) -> list[Rendered]:
    starts = range(0, len(row.input_ids), limit)
    return [Rendered(row.input_ids[s : s + limit], row.train_mask[s : s + limit]) for s in starts]
