"""Files to a folder of documents: read, rendered, counted and compared, in bounded memory.

    sources -> files -> examples -> documents, side by side -> duplicates, overlap

Memory holds a block of rows, not the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from finetune import artifact
from finetune.artifact import sha256_of_json
from finetune.cache import cache_root, remembered_sha256
from finetune.config import RunConfig
from finetune.config.data import Source
from finetune.copies import Copies, num_copies
from finetune.errors import InputError
from finetune.files import find_files
from finetune.files.findings import Findings
from finetune.heap import heap_at_rest
from finetune.ledger import Ledger
from finetune.overlap import DuplicateFinder, overlap
from finetune.prepared import DocumentWriter, PreparedDocuments
from finetune.rendering import Outcome, Renderer
from finetune.row_work import RowResult, RowWork, row_text
from finetune.shapes import Example, read_examples

BLOCK = 1000  # rows that are rendered together
BLOCK_CHARACTERS = 1 << 19  # or so many of their texts; each takes some 90 bytes on the way to ids
SIDES = ("train", "heldout")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        side: train or heldout.
        number: index of the source on its side.
        source: how to read it.
        path: the file.
        sha256: of its content.
    """

    side: str
    number: int
    source: Source
    path: Path
    sha256: str


def source_files(config: RunConfig) -> tuple[list[SourceFile], list[str]]:
    """Every file of a config's data, in order, and what is wrong with sources that have none."""
    found: list[SourceFile] = []
    findings: list[str] = []
    for side in SIDES:
        for number, source in enumerate(getattr(config.data, side)):
            try:
                paths = find_files(str(located(source)))
            except InputError as error:
                findings += error.findings
                continue
            found += [SourceFile(side, number, source, p, remembered_sha256(p)) for p in paths]
    return found, findings


def located(source: Source) -> Path:
    """Where the rows of a source lie; a dataset of the hub is fetched first."""
    if source.hub_dataset is None:
        return Path(source.path)
    from finetune.hub import download_dataset

    assert source.split is not None, "the config asks for it"
    return download_dataset(source.hub_dataset, source.split, source.revision, cache_root())


class Preparation:
    """One preparation: both sides written, counted and compared.

    Args:
        config: of the run.
        renderer: of its rows.
        stage: an empty folder.
        vocab_size: one more than the largest id.
        findings: what is wrong already; raised with what the rows add.
    """

    def __init__(
        self,
        config: RunConfig,
        renderer: Renderer,
        stage: Path,
        vocab_size: int,
        findings: Sequence[str],
    ) -> None:
        self._config, self._renderer, self._stage = config, renderer, stage
        self._vocab_size = vocab_size
        self._ledgers = {side: Ledger(side) for side in SIDES}
        self._findings = Findings()
        for finding in findings:
            self._findings.add(finding)
        self._duplicates = {side: DuplicateFinder() for side in SIDES}

    def run(self, files: Sequence[SourceFile]) -> None:
        """Writes both sides, ledgers.json and overlap.json into the folder.

        Raises:
            InputError: rows that cannot be read or rendered; all of them, up to 20 a file.
        """
        with heap_at_rest(), contextlib.ExitStack() as stack:
            self._writers = {
                side: stack.enter_context(DocumentWriter(self._stage / side, self._vocab_size))
                for side in SIDES
            }
            self._progress = stack.enter_context(_progress())
            self._task = self._progress.add_task("data", total=None)
            self._copies = stack.enter_context(Copies(RowWork(self._renderer), num_copies()))
            for file in files:
                self._read(file)
            self._findings.refuse()
        for side, ledger in self._ledgers.items():
            ledger.duplicates = [asdict(group) for group in self._duplicates[side].groups()]
            if ledger.num_rows_split:
                limit = self._config.data.max_length
                ledger.notes.append(
                    f"{ledger.num_rows_split:,} rows longer than data.max_length ({limit} tokens) "
                    "are split"
                )
        self._compare_sides()
        states = {side: ledger.state() for side, ledger in self._ledgers.items()}
        artifact.write_json(self._stage / "ledgers.json", states)

    def _read(self, file: SourceFile) -> None:
        num_rows = 0
        try:
            shape, examples = read_examples(file.path, file.source.format, file.source.columns)
            self._refuse_other_kind(file, shape)
            if file.number:
                examples = (dataclasses.replace(e, source=file.number) for e in examples)
            for block, results in self._copies.map(_blocks(examples, self._findings)):
                num_rows += len(block)
                self._take(file, block, results)
                self._progress.advance(self._task, len(block))
        except InputError as error:
            self._findings.absorb(error)
            return
        note = f"{file.path}: {num_rows:,} rows of format {shape}"
        self._ledgers[file.side].notes.append(note)

    def _refuse_other_kind(self, file: SourceFile, shape: str) -> None:
        recipe = self._config.recipe
        if (shape == "text") != (recipe == "pretrain"):
            wanted = "plain text (a text column)" if recipe == "pretrain" else "conversations"
            raise InputError(f"{file.path}: holds {shape}; recipe {recipe} trains on {wanted}")

    def _take(
        self, file: SourceFile, block: Sequence[Example], results: Sequence[RowResult]
    ) -> None:
        for example, result in zip(block, results, strict=True):
            side = self._side_of(file, example)
            self._count(side, example, result.outcome)
            self._duplicates[side].add(example.where, result.digests)
            for name in result.suspicions:
                self._ledgers[side].suspect(name, example.where)
            if result.outcome.refused:
                self._findings.add(result.outcome.refused)
            self._writers[side].add(result.outcome.documents)

    def _side_of(self, file: SourceFile, example: Example) -> str:
        fraction = self._config.data.heldout_fraction
        if fraction is None:
            return file.side
        return "heldout" if is_held_out(example, fraction) else "train"

    def _count(self, side: str, example: Example, outcome: Outcome) -> None:
        ledger = self._ledgers[side]
        ledger.num_rows_read += 1
        if outcome.dropped is not None:
            ledger.drop(outcome.dropped, example.where, outcome.num_tokens_lost)
        elif outcome.documents:
            ledger.keep(*(document.size for document in outcome.documents))
            if outcome.num_turns_lost:
                ledger.shorten(example.where, outcome.num_turns_lost, outcome.num_tokens_lost)
            ledger.num_rows_split += outcome.is_split

    def _compare_sides(self) -> None:
        """Held-out rows that the training side has too."""
        train, heldout = (PreparedDocuments(self._stage / side) for side in SIDES)
        found = []
        if len(heldout):
            held = [row_text(example) for example in heldout.examples()]
            trained = (row_text(example) for example in train.examples())
            found = [asdict(finding) for finding in overlap(trained, held)]
        artifact.write_json(self._stage / "overlap.json", found)


def is_held_out(example: Example, fraction: float) -> bool:
    """By a hash of the conversation, so that a row never changes sides between runs.

    Args:
        fraction: `data.heldout_fraction`.
    """
    content = sha256_of_json([example.messages, example.text])
    return int(content[:16], 16) / 2**64 < fraction


def _blocks(examples: Iterable[Example], findings: Findings) -> Iterator[list[Example]]:
    """The rows, those before a file's findings too: they are raised after the last row."""
    block: list[Example] = []
    size = 0
    try:
        for example in examples:
            block.append(example)
            size += _num_characters(example)
            if len(block) == BLOCK or size >= BLOCK_CHARACTERS:
                yield block
                block, size = [], 0
    except InputError as error:
        findings.absorb(error)
    if block:
        yield block


def _num_characters(example: Example) -> int:
    return len(example.text) + sum(len(str(m["content"])) for m in example.messages)


def _progress() -> Progress:
    """Rows so far, on stderr, only where someone watches."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
