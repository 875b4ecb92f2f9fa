"""`preview CONFIG`: what is trained, token by token: rows, or the first packs of the first epoch.

`--json` prints one object. Its `rows` are documents: where, input_ids, labels (-100 where not
trained, else the same id, not shifted) and text. With `--packs` they are the documents of those
packs, in the order of training, with position_ids, and `packs` says which of them share one:
[{step, micro_batch, pack, tokens, trained, rows (indices into rows)}].
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedTokenizerFast

from finetune import pages
from finetune.batching import PlannedPack, first_packs, plan_batches
from finetune.config import RunConfig
from finetune.config.loader import load
from finetune.data import RunData, load_data
from finetune.errors import InputError
from finetune.model import read_tokenizer
from finetune.prepared import Document, PreparedDocuments
from finetune.tokens import as_table, as_text, has_colour, labels_of, legend, runs_of, tokens_of

DEFAULT_ROWS = 5


@dataclass(frozen=True)
class Group:
    """Documents that are shown together.

    Attributes:
        documents: in order.
        pack: the pack that they share; None for rows.
    """

    documents: list[Document]
    pack: PlannedPack | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(len(document.input_ids) for document in self.documents)

    @property
    def num_trained(self) -> int:
        """Trained tokens of all documents."""
        return sum(document.num_trained for document in self.documents)


def as_row(tokenizer: PreTrainedTokenizerFast, document: Document) -> dict[str, Any]:
    """One row of `preview --json`."""
    return {
        "where": document.example.where,
        "input_ids": document.input_ids,
        "labels": labels_of(document),
        "text": tokenizer.decode(document.input_ids),
    }


def show_example(
    tokenizer: PreTrainedTokenizerFast,
    document: Document,
    stream: TextIO | None = None,
    raw: bool = False,
) -> str:
    """A document with its mask: in colour on a terminal, in brackets elsewhere.

    Args:
        stream: where it will be printed; standard error if left out.
        raw: a line for each token, in place of the text.
    """
    colour = has_colour(stream or sys.stderr)
    tokens = tokens_of(tokenizer, document)
    counts = f"{document.num_trained:,} of {len(tokens):,} tokens trained"
    head = f"example  {pages.seen(document.example.where)}, {counts}"
    if raw:
        return f"{head}:\n{as_table(tokens, colour)}"
    return f"{head}, {legend(colour)}:\n{as_text(tokens, colour)}"


def rows_at(data: RunData, where: str | None, count: int) -> list[Document]:
    """The first training documents whose place has a substring; the first of all without one.

    Raises:
        InputError: there is none; what became of the rows that have it is said.
    """
    if where is None:
        return data.train[:count]
    found = list(itertools.islice(_indices_at(data.train, where), count))
    if not found:
        dropped = [
            f"{place} is dropped: {reason}"
            for reason, places in data.ledgers[0].dropped.items()
            for place in places
            if where in place
        ]
        hint = dropped[0] if dropped else f"the first is {data.train.example(0).where}"
        raise InputError(f"--where {where}: no document's place has it; {hint}")
    return [data.train[index] for index in found]


def _indices_at(documents: PreparedDocuments, where: str) -> Iterator[int]:
    return (i for i in range(len(documents)) if where in documents.example(i).where)


def packs_of(config: RunConfig, data: RunData, count: int) -> list[Group]:
    """The first packs that are trained on, with their documents."""
    plan = plan_batches(config, data, num_ranks=1)
    return [
        Group([data.train[index] for index in pack.documents], pack)
        for pack in first_packs(plan, config.run.seed, count)
    ]


def as_json(tokenizer: PreTrainedTokenizerFast, groups: Sequence[Group]) -> dict[str, Any]:
    """The object of `preview --json`; its keys are in the module's docstring."""
    rows = [as_row(tokenizer, document) for group in groups for document in group.documents]
    ends = itertools.accumulate(len(group.documents) for group in groups)
    packs = [
        {
            **_place_of(group.pack),
            "tokens": group.num_tokens,
            "trained": group.num_trained,
            "rows": list(range(end - len(group.documents), end)),
        }
        for group, end in zip(groups, ends, strict=True)
        if group.pack is not None
    ]
    if not packs:
        return {"rows": rows}
    for row in rows:
        row["position_ids"] = list(range(len(row["input_ids"])))
    return {"rows": rows, "packs": packs}


def _place_of(pack: PlannedPack) -> dict[str, int]:
    return {"step": pack.step, "micro_batch": pack.micro_batch, "pack": pack.pack}


def heading_of(group: Group) -> str:
    """Where a pack is trained and what it holds."""
    assert group.pack is not None
    place = ", ".join(f"{n.replace('_', '-')} {v}" for n, v in _place_of(group.pack).items())
    return (
        f"{place}: {len(group.documents):,} documents that cannot see each other, each with "
        f"positions from 0; {group.num_tokens:,} tokens, {group.num_trained:,} trained"
    )


def page_of(tokenizer: PreTrainedTokenizerFast, name: str, groups: Sequence[Group]) -> str:
    """One HTML page to scroll: every token an element of its own."""
    shown = [
        {
            "heading": heading_of(group) if group.pack else None,
            "documents": [on_page(tokenizer, document) for document in group.documents],
        }
        for group in groups
    ]
    return pages.render("preview.html", name=name, groups=shown)


def on_page(tokenizer: PreTrainedTokenizerFast, document: Document) -> dict[str, Any]:
    """One document for a template: place, counts, and each token with its parts."""
    tokens = tokens_of(tokenizer, document)
    marked = [
        {"token": token, "parts": parts}
        for run in runs_of(tokens)
        for token, parts in zip(run, pages.parts_of([t.text for t in run]), strict=True)
    ]
    return {
        "where": document.example.where,
        "num_tokens": len(tokens),
        "num_trained": document.num_trained,
        "tokens": marked,
    }


def main(argv: Sequence[str]) -> int:
    """The verb `preview`."""
    args = _parse(argv)
    target = pages.target_of(args.html) if args.html is not None else None
    config = load(args.config, args.overrides).config
    tokenizer, chat_format = read_tokenizer(config)
    data = load_data(config, tokenizer, chat_format)
    for ledger in data.ledgers:
        print("\n".join(ledger.lines()), file=sys.stderr)
    if args.packs is not None:
        groups = packs_of(config, data, args.packs)
    else:
        groups = [Group(rows_at(data, args.where, args.rows or DEFAULT_ROWS))]
    if target is not None:
        _write_page(target, page_of(tokenizer, args.config, groups))
    if args.json:
        print(json.dumps(as_json(tokenizer, groups), ensure_ascii=False))
    elif target is None:
        _print_groups(tokenizer, groups, args.raw)
    return 0


def _write_page(target: Path, page: str) -> None:
    pages.write(target, page)
    print(f"page     {target}", file=sys.stderr)


def _print_groups(tokenizer: PreTrainedTokenizerFast, groups: Sequence[Group], raw: bool) -> None:
    for group in groups:
        if group.pack is not None:
            print(f"{heading_of(group)}\n")
        for document in group.documents:
            print(show_example(tokenizer, document, sys.stdout, raw) + "\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    description = "What is trained, token by token: rows, or the first packs."
    parser = argparse.ArgumentParser(prog="python -m finetune preview", description=description)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--rows", type=int, help=f"how many documents (default {DEFAULT_ROWS})")
    parser.add_argument("--where", metavar="TEXT", help="only rows whose place (file:row) has it")
    parser.add_argument(
        "--packs", type=int, metavar="N", help="in place of rows, the first N packs, as trained"
    )
    parser.add_argument("--raw", action="store_true", help="a line for each token")
    parser.add_argument("--json", action="store_true", help='{"rows": [{input_ids, labels, text}]}')
    parser.add_argument("--html", metavar="FILE", help="write a page in place of the text")
    args = parser.parse_intermixed_args(list(argv))
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    findings = [
        f"--{name} {value}: allowed: 1 or more"
        for name, value in (("rows", args.rows), ("packs", args.packs))
        if value is not None and value < 1
    ]
    if args.where == "":
        findings.append("--where '': allowed: a part of a place, such as train.jsonl:12")
    if args.packs is not None and (args.rows is not None or args.where is not None):
        findings.append("--packs shows whole packs; it goes with neither --rows nor --where")
    if args.raw and (args.json or args.html):
        findings.append("--raw is for the terminal; --json and --html have every token anyway")
    if findings:
        raise InputError(findings)
