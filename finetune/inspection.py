"""`data CONFIG`: what became of every row, before anything is trained.

The ledger of both sides, suspicious rows with the reason explained, duplicates, lengths, the
mixture, what training and held-out rows have in common, packs and steps. Where overlap would stop
the run (`data.on_overlap: error`) everything is shown first; then the verb ends as `train` would,
with exit code 3.

`--json` prints one object: what the run folder's data.json holds, and what follows from it.

| key | holds |
|---|---|
| config, recipe, max_length, on_overlap | of the config |
| chat_format | the prompt format; null: plain text |
| files | path -> sha256 |
| documents_sha256 | over the ids and masks of both sides |
| train, heldout | the ledger: rows_read, rows_kept, rows_dropped, rows_shortened, documents, \
turns_lost, tokens, tokens_trained, tokens_context, tokens_dropped, dropped {reason: places}, \
shortened [place], suspicious {reason: places}, duplicates [{kind, first, others}], \
length_median, length_max, length_histogram [[longest of the bin, documents]], notes |
| explanations | for each reason of `suspicious`: what it does to training, or what to do |
| overlap | [{kind, where, other, share, blocks}]: place held out, place trained on |
| blocked | whether overlap stops a run of this config |
| mixture | for each source name, share, epochs, documents, tokens_trained, bytes |
| steps | num_packs, is_packed, max_length, per_device, accumulation, num_ranks, per_epoch, \
epochs, total, num_tokens, num_trained, empty_share |
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune import pages
from finetune.batching import Steps, plan_batches, steps_of
from finetune.config import RunConfig
from finetune.config.loader import load
from finetune.data import RunData, open_data, refuse_leaks
from finetune.errors import InputError
from finetune.excerpts import excerpt, find_rows, pair
from finetune.ledger import Ledger
from finetune.model import read_tokenizer
from finetune.shapes import Example
from finetune.summary import (
    bins_of,
    explanation_of,
    is_only_note,
    kind_of,
    overlap_lines,
    packing_lines,
    packing_text,
    repeats_of,
    run_text,
    side_lines,
)

MAX_PLACES = 200  # of one reason, on the page
MAX_EXAMPLES = 3  # rows of one suspicion, on the page
MAX_PAIRS = 20  # of overlap, on the page


@dataclass(frozen=True)
class Inspection:
    """The data of a config, and what a run would make of it.

    Attributes:
        name: the config's file.
        config: it.
        chat_format: name of the prompt format; None: plain text.
        data: both sides.
        steps: packs and steps.
    """

    name: str
    config: RunConfig
    chat_format: str | None
    data: RunData
    steps: Steps

    @property
    def is_blocked(self) -> bool:
        """Whether held-out rows that are trained on stop a run of this config."""
        leaks = any(finding.blocks for finding in self.data.overlap)
        return leaks and self.config.data.on_overlap == "error"

    def as_json(self) -> dict[str, Any]:
        """One object; its keys are in the module's docstring."""
        reasons = {reason for side in self.data.ledgers for reason in side.suspicious}
        found = self.data.as_json()
        for finding, shown in zip(self.data.overlap, found["overlap"], strict=True):
            shown["blocks"] = finding.blocks
        return {
            "config": self.name,
            "recipe": self.config.recipe,
            "chat_format": self.chat_format,
            "max_length": self.config.data.max_length,
            "on_overlap": self.config.data.on_overlap,
            **found,
            "explanations": {reason: explanation_of(reason) for reason in sorted(reasons)},
            "blocked": self.is_blocked,
            "steps": self.steps.as_json(),
        }

    def lines(self) -> Iterator[str]:
        """Everything for the terminal."""
        rendered = f"prompt format {self.chat_format}" if self.chat_format else "plain text"
        limit = self.config.data.max_length
        yield f"data     {self.name}: {rendered}, rows of at most {limit:,} tokens"
        for ledger in self.data.ledgers:
            if ledger.num_rows_read:
                yield from side_lines(ledger)
        if self.data.ledgers[1].num_rows_read:
            yield from overlap_lines(self.data.overlap, self.config.data.on_overlap)
        else:
            yield "overlap  none: no row is held out"
        yield from self.data.mixture_lines()
        yield from packing_lines(self.steps)


def inspect(name: str, overrides: Sequence[str] = (), num_ranks: int = 1) -> Inspection:
    """Prepares the data of a config, or finds it in the cache.

    Raises:
        InputError: as `load_data`.
    """
    config = load(name, overrides).config
    tokenizer, chat_format = read_tokenizer(config)
    data = open_data(config, tokenizer, chat_format)
    steps = steps_of(config, data, plan_batches(config, data, num_ranks))
    return Inspection(name, config, chat_format.name if chat_format else None, data, steps)


def page_of(inspection: Inspection) -> str:
    """The same as one HTML page, with examples of suspicious rows and of overlap."""
    data = inspection.data
    # What stops a run comes first, also where there is more than the page shows.
    findings = sorted(data.overlap, key=lambda finding: not finding.blocks)[:MAX_PAIRS]
    examples = [
        place
        for ledger in data.ledgers
        for places in ledger.suspicious.values()
        for place in places[:MAX_EXAMPLES]
    ]
    places = {*examples, *(p for finding in findings for p in (finding.where, finding.other))}
    rows = find_rows(inspection.config, places)
    return pages.render(
        "data.html",
        inspection=inspection,
        sides=[_side(ledger, rows) for ledger in data.ledgers if ledger.num_rows_read],
        pairs=[pair(finding, rows[finding.where], rows[finding.other]) for finding in findings],
        num_blocking=sum(finding.blocks for finding in data.overlap),
        packing=packing_text(inspection.steps),
        steps=inspection.steps.line().removeprefix("steps").strip(),
        run=run_text(inspection.steps),
        kind_of=kind_of,
        max_places=MAX_PLACES,
    )


def _side(ledger: Ledger, rows: Mapping[str, Example]) -> dict[str, Any]:
    """What the template shows of one side."""
    bins = bins_of(ledger)
    most = max((count for _, _, count in bins), default=1)
    return {
        "ledger": ledger,
        "num_tokens": ledger.num_tokens_trained + ledger.num_tokens_context,
        "bins": [(first, last, count, 100 * count / most) for first, last, count in bins],
        "suspicious": [
            {
                "reason": reason,
                "explanation": explanation_of(reason),
                "is_note": is_only_note(reason),
                "places": places,
                "examples": [excerpt(rows[place]) for place in places[:MAX_EXAMPLES]],
            }
            for reason, places in sorted(
                ledger.suspicious.items(), key=lambda item: is_only_note(item[0])
            )
        ],
        "repeats": repeats_of(ledger),
    }


def main(argv: Sequence[str]) -> int:
    """The verb `data`."""
    args = _parse(argv)
    if args.ranks < 1:
        raise InputError(f"--ranks {args.ranks}: allowed: 1 or more")
    target = pages.target_of(args.html) if args.html is not None else None
    inspection = inspect(args.config, args.overrides, args.ranks)
    if target is not None:
        pages.write(target, page_of(inspection))
        print(f"page     {target}", file=sys.stderr)
    if args.json:
        print(json.dumps(inspection.as_json(), ensure_ascii=False))
    else:
        print("\n".join(inspection.lines()))
    sys.stdout.flush()  # before the message that follows on standard error
    refuse_leaks(inspection.config.data, inspection.data.overlap)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    description = "What became of every row: the ledger, its warnings, packs and steps."
    parser = argparse.ArgumentParser(prog="python -m finetune data", description=description)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the launch (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--html", metavar="FILE", help="write a page, with examples of rows")
    return parser.parse_intermixed_args(list(argv))
