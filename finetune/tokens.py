"""The tokens of a document as people can read them: piece, text, whether trained, whether control.

| in the text view | on a terminal | elsewhere |
|---|---|---|
| trained tokens | green | between [[ and ]] |
| tokens that are only read | grey | as they are |
| control tokens | reversed | between ⟨ and ⟩ |
"""

from __future__ import annotations

import codecs
import functools
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from transformers import PreTrainedTokenizerFast

from finetune.fast.loss import IGNORED
from finetune.llama.tiktoken_file import byte_letters
from finetune.pages import seen
from finetune.prepared import Document

_TRAINED, _READ, _CONTROL, _END = "\x1b[32m", "\x1b[90m", "\x1b[7m", "\x1b[0m"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Token:
    """One token of a document.

    Attributes:
        position: in its document, from 0.
        id: in the vocabulary.
        piece: as the vocabulary writes it.
        text: what it adds to the text. Where a character takes several tokens, it is the last's,
            and the others' is empty.
        trained: whether it counts in the loss.
        control: whether it is a control token, which no text of a row can become.
    """

    position: int
    id: int
    piece: str
    text: str
    trained: bool
    control: bool


def labels_of(document: Document) -> list[int]:
    """The id itself where it is trained, else -100; not shifted. Length: the document's."""
    pairs = zip(document.input_ids, document.train_mask, strict=True)
    return [i if trained and p > 0 else IGNORED for p, (i, trained) in enumerate(pairs)]


def tokens_of(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[Token]:
    """Every token of a document, in order."""
    ids = document.input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    control = control_ids(tokenizer)
    flags = [i in control for i in ids]
    texts = _texts(pieces, flags, is_byte_level(tokenizer))
    labels = labels_of(document)
    return [
        Token(place, i, pieces[place], texts[place], labels[place] != IGNORED, flags[place])
        for place, i in enumerate(ids)
    ]


def control_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the tokens that end turns, open headers and so on."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset([*tokenizer.all_special_ids, *(i for i, token in added if token.special)])


def text_bytes(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """UTF-8 bytes of each answer's text (`Document.answer_lengths`): without control tokens, and
    without white space around it, which belongs to the prompt format and not to what was said.
    """
    control, byte_level = _control_ids(tokenizer), is_byte_level(tokenizer)
    counted = zip(document.input_ids[1:], document.train_mask[1:], strict=True)
    runs = [list(run) for trained, run in itertools.groupby(counted, lambda x: x[1]) if trained]
    pieces = [
        tokenizer.convert_ids_to_tokens([i for i, _ in run if i not in control]) for run in runs
    ]
    return [len(b"".join(_bytes_of(p, byte_level) for p in said).strip()) for said in pieces]


@functools.lru_cache(maxsize=4)
def _control_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    return control_ids(tokenizer)


def is_byte_level(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether pieces are spelled in letters for bytes (Llama 3), not in SentencePiece's way."""
    return "ByteLevel" in type(tokenizer.backend_tokenizer.decoder).__name__


def _texts(pieces: Sequence[str], control: Sequence[bool], byte_level: bool) -> list[str]:
    """What each piece adds to the text; a space at a segment's start stays."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = []
    for place, piece in enumerate(pieces):
        if control[place]:
            texts.append(piece)
            continue
        # A character's bytes are never on both sides of a control token.
        is_last = place + 1 == len(pieces) or control[place + 1]
        texts.append(decoder.decode(_bytes_of(piece, byte_level), final=is_last))
    return texts


def _bytes_of(piece: str, byte_level: bool) -> bytes:
    if byte_level:
        numbers = _numbers_of_letters()
        if all(letter in numbers for letter in piece):
            return bytes(numbers[letter] for letter in piece)
        return piece.encode()  # an added token, written as it is
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("▁", " ").encode()


@functools.cache
def _numbers_of_letters() -> dict[str, int]:
    return {letter: byte for byte, letter in byte_letters().items()}


def runs_of(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Neighbours that are alike: trained or not, control or not."""
    for _, run in itertools.groupby(tokens, key=lambda token: (token.trained, token.control)):
        yield list(run)


def has_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose owner has not set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def legend(colour: bool) -> str:
    """How `as_text` marks tokens."""
    if colour:
        return f"trained tokens green, control tokens {_CONTROL}reversed{_END}"
    return "trained tokens between [[ and ]], control tokens between ⟨ and ⟩"


def as_text(tokens: Sequence[Token], colour: bool) -> str:
    """The text with its mask; characters of the rows that steer a terminal are replaced."""
    shown = []
    for trained, neighbours in itertools.groupby(tokens, key=lambda token: token.trained):
        runs = "".join(_run(run, colour) for run in runs_of(list(neighbours)))
        shown.append(f"[[{runs}]]" if trained and not colour else runs)
    return "".join(shown)


def _run(run: Sequence[Token], colour: bool) -> str:
    text = seen("".join(token.text for token in run))
    if colour:
        return f"{_style(run[0])}{text}{_END}"
    return "".join(f"⟨{token.text}⟩" for token in run) if run[0].control else text


def _style(token: Token) -> str:
    return (_TRAINED if token.trained else _READ) + (_CONTROL if token.control else "")


def as_table(tokens: Sequence[Token], colour: bool) -> str:
    """A line for each token: position, id, whether trained, whether control, piece."""
    lines = [f"{'position':>8} {'id':>7}  {'in loss':<7}  {'kind':<7}  piece"]
    for token in tokens:
        trained, kind = "trained" if token.trained else "-", "control" if token.control else "-"
        line = f"{token.position:>8} {token.id:>7}  {trained:<7}  {kind:<7}  {seen(token.piece)}"
        lines.append(f"{_style(token)}{line}{_END}" if colour else line)
    return "\n".join(lines)
