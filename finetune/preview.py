"""Examples as the model will see them: trained tokens green, tokens only read grey."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from transformers import PreTrainedTokenizerFast

from finetune.config.loader import load
from finetune.data import load_data
from finetune.errors import InputError
from finetune.fast.loss import IGNORED
from finetune.model import read_tokenizer
from finetune.prepared import Document

_GREEN, _GREY, _END = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def labels_of(document: Document) -> list[int]:
    """The id itself where it is trained, else -100; not shifted. Length: the document's."""
    pairs = zip(document.input_ids, document.train_mask, strict=True)
    return [i if trained and p > 0 else IGNORED for p, (i, trained) in enumerate(pairs)]


def as_row(tokenizer: PreTrainedTokenizerFast, document: Document) -> dict[str, Any]:
    """One row of `preview --json`."""
    return {
        "where": document.example.where,
        "input_ids": document.input_ids,
        "labels": labels_of(document),
        "text": tokenizer.decode(document.input_ids),
    }


def show_example(
    tokenizer: PreTrainedTokenizerFast, document: Document, stream: TextIO | None = None
) -> str:
    """A document with its mask: in colour on a terminal, in brackets elsewhere.

    Args:
        stream: where it will be printed; standard error if left out.
    """
    colour = (stream or sys.stderr).isatty() and not os.environ.get("NO_COLOR")
    spans: list[tuple[bool, list[int]]] = []
    for token, label in zip(document.input_ids, labels_of(document), strict=True):
        trained = label != IGNORED
        if not spans or spans[-1][0] != trained:
            spans.append((trained, []))
        spans[-1][1].append(token)
    text = "".join(_span(tokenizer, ids, trained, colour) for trained, ids in spans)
    how = "green" if colour else "between [[ and ]]"
    return f"example  {document.example.where}, trained tokens {how}:\n{text}"


def _span(tokenizer: PreTrainedTokenizerFast, ids: list[int], trained: bool, colour: bool) -> str:
    # Decoded from pieces, so that the space before a span's first word stays visible.
    pieces = tokenizer.convert_ids_to_tokens(ids)
    text = tokenizer.convert_tokens_to_string(pieces)
    if colour:
        return f"{_GREEN if trained else _GREY}{text}{_END}"
    return f"[[{text}]]" if trained else text


def main(argv: Sequence[str]) -> int:
    """The verb `preview`."""
    parser = argparse.ArgumentParser(prog="python -m finetune preview", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--rows", type=int, default=5, help="how many documents (default 5)")
    parser.add_argument("--json", action="store_true", help='{"rows": [{input_ids, labels, text}]}')
    args = parser.parse_intermixed_args(list(argv))
    if args.rows < 1:
        raise InputError(f"--rows {args.rows}: allowed: 1 or more")
    config = load(args.config, args.overrides).config
    tokenizer, chat_format = read_tokenizer(config)
    data = load_data(config, tokenizer, chat_format)
    documents = data.train[: args.rows]
    for ledger in data.ledgers:
        print("\n".join(ledger.lines()), file=sys.stderr)
    if args.json:
        rows = [as_row(tokenizer, document) for document in documents]
        print(json.dumps({"rows": rows}, ensure_ascii=False))
        return 0
    for document in documents:
        print(show_example(tokenizer, document, sys.stdout) + "\n")
    return 0
