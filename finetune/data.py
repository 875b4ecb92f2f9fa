"""Data of a run: files -> examples -> documents with train masks, and the ledger of both sides.

Rows over `max_length` are dropped, refused or (plain text only) split, by the config's policy,
and counted. Nothing is ever cut: a conversation is trained whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune.artifact import sha256_of, sha256_of_json
from finetune.config import RunConfig
from finetune.config.data import DataSection, Source
from finetune.errors import InputError
from finetune.files import find_files, read_rows, refuse
from finetune.ledger import Ledger
from finetune.llama.chat import ChatFormat, Rendered
from finetune.llama.tokenizer import encode_texts
from finetune.shapes import Example, iter_answers, read_examples


@dataclass(frozen=True)
class Document:
    """An example as the model sees it.

    Attributes:
        example: the row it came from.
        input_ids: ids, BOS first.
        train_mask: for each id, whether it counts in the loss.
    """

    example: Example
    input_ids: list[int]
    train_mask: list[bool]

    @property
    def num_trained(self) -> int:
        """Tokens that count in the loss; the first has nothing before it and never does."""
        return sum(self.train_mask[1:])


@dataclass(frozen=True)
class RunData:
    """Both sides of a run's data, with what became of every row."""

    train: list[Document]
    heldout: list[Document]
    ledgers: tuple[Ledger, ...]
    file_hashes: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """data.json of the run folder."""
        sides = {ledger.name: ledger.as_json() for ledger in self.ledgers}
        both = (self.train, self.heldout)
        ids = [[[d.input_ids, d.train_mask] for d in side] for side in both]
        return {"files": self.file_hashes, "documents_sha256": sha256_of_json(ids), **sides}


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, chat_format: ChatFormat | None
) -> RunData:
    """Reads, renders and counts the training and held-out rows of a config.

    Args:
        chat_format: None for recipes on plain text.

    Raises:
        InputError: unreadable files or rows, a side without a row, overlong rows under `error`.
    """
    data = config.data
    if not data.train:
        raise InputError("data.train: names no file; give at least one")
    train, train_ledger = _read_side("train", data.train, config.recipe)
    heldout, heldout_ledger = _read_side("heldout", data.heldout, config.recipe)
    if data.heldout_fraction:
        train, heldout = _split(train, data.heldout_fraction)
        train_ledger.num_rows_read, heldout_ledger.num_rows_read = len(train), len(heldout)
        if not heldout:
            raise InputError(
                f"data.heldout_fraction: {data.heldout_fraction} of {len(train)} rows holds none "
                "out; raise it, or name a file in data.heldout"
            )
    documents = _documents(train, data, tokenizer, chat_format, train_ledger)
    _refuse_none("data.train: no row is left to train on", documents, train_ledger)
    held = _documents(heldout, data, tokenizer, chat_format, heldout_ledger)
    if heldout:
        _refuse_none("data.heldout: no row is left to score", held, heldout_ledger)
    _note_overlap(documents, held, heldout_ledger)
    sources = [*data.train, *data.heldout]
    paths = [path for source in sources for path in find_files(source.path)]
    hashes = {str(path): sha256_of(path) for path in paths}
    return RunData(documents, held, (train_ledger, heldout_ledger), hashes)


def _refuse_none(finding: str, documents: Sequence[Document], ledger: Ledger) -> None:
    if not documents:
        raise InputError([finding, *(" ".join(line.split()) for line in ledger.lines())])


def load_heldout(
    source: Source | Path,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat | None,
) -> tuple[list[Document], Ledger]:
    """One held-out file under a config's rendering, for evaluation.

    Args:
        source: a source of the config; or any file, in one of the formats or with the columns of
            the config's own rows.
    """
    if isinstance(source, Path):
        source = _like_the_runs_own(source, config.data)
    examples, ledger = _read_side("heldout", [source], config.recipe)
    return _documents(examples, config.data, tokenizer, chat_format, ledger), ledger


def _like_the_runs_own(path: Path, data: DataSection) -> Source:
    """A file under the run's column names, where it has them."""
    for source in (*data.heldout, *data.train):
        names = set((source.columns or {}).values())
        if names and names <= set(next(read_rows(path)).columns):
            return source.model_copy(update={"path": str(path)})
    return Source(path=str(path))


def _read_side(name: str, sources: Sequence[Source], recipe: str) -> tuple[list[Example], Ledger]:
    ledger, examples = Ledger(name), []
    findings: list[str] = []
    for source, path in _files_of(sources, findings):
        try:
            shape, rows = read_examples(path, source.format, source.columns)
            new = list(rows)
        except InputError as error:
            findings += error.findings
            continue
        if (shape == "text") != (recipe == "pretrain"):
            wanted = "plain text (a text column)" if recipe == "pretrain" else "conversations"
            findings.append(f"{path}: holds {shape}; recipe {recipe} trains on {wanted}")
        ledger.notes.append(f"{path}: {len(new):,} rows of format {shape}")
        examples += new
    if findings:
        raise InputError(findings)
    ledger.num_rows_read = len(examples)
    return examples, ledger


def _files_of(sources: Sequence[Source], findings: list[str]) -> Iterator[tuple[Source, Path]]:
    for source in sources:
        try:
            yield from ((source, path) for path in find_files(source.path))
        except InputError as error:
            findings += error.findings


def _split(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Splits by a hash of the content, so that a row never changes sides between runs."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        content = sha256_of_json([example.messages, example.text])
        share = int(content[:16], 16) / 2**64
        sides[share < fraction].append(example)
    return sides


def _documents(
    examples: Sequence[Example],
    data: DataSection,
    tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat | None,
    ledger: Ledger,
) -> list[Document]:
    rendered = (
        _render_texts(examples, tokenizer, ledger)
        if chat_format is None
        else _render_conversations(examples, data, tokenizer, chat_format, ledger)
    )
    documents, overlong, num_split = [], [], 0
    for example, row in rendered:
        parts = [row]
        if len(row.input_ids) > data.max_length:
            overlong.append(f"{example.where}: {len(row.input_ids)} tokens")
            parts = _overlong(example, row, data, ledger)
            num_split += bool(parts)
        if parts:
            ledger.keep(*(part.train_mask for part in parts))
        documents += [Document(example, part.input_ids, part.train_mask) for part in parts]
    if data.on_overflow == "error":
        limit = f"over data.max_length {data.max_length}; raise it, or data.on_overflow=drop"
        refuse([f"{place}, {limit}" for place in overlong])
    if num_split:
        ledger.notes.append(
            f"{num_split:,} rows longer than data.max_length ({data.max_length} tokens) are split"
        )
    return documents


def _overlong(example: Example, row: Rendered, data: DataSection, ledger: Ledger) -> list[Rendered]:
    if data.on_overflow == "split":
        step = data.max_length
        starts = range(0, len(row.input_ids), step)
        return [Rendered(row.input_ids[s : s + step], row.train_mask[s : s + step]) for s in starts]
    reason = f"longer than data.max_length ({data.max_length} tokens)"
    ledger.drop(reason, example.where, len(row.input_ids))
    return []


def _render_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, ledger: Ledger
) -> list[tuple[Example, Rendered]]:
    """Plain text: BOS, the text, EOS where it really ends; everything but BOS is trained."""
    for example in examples:
        if not example.text.strip():
            ledger.drop("without text", example.where)
    examples = [example for example in examples if example.text.strip()]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert None not in (bos, eos), "Llama tokenizers have BOS and EOS"
    result = []
    for example, text_ids in zip(
        examples, encode_texts(tokenizer, [e.text for e in examples]), strict=True
    ):
        ids = [bos, *text_ids, eos]
        result.append((example, Rendered(ids, [False] + [True] * (len(ids) - 1))))
    return result


def _render_conversations(
    examples: Sequence[Example],
    data: DataSection,
    tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat,
    ledger: Ledger,
) -> list[tuple[Example, Rendered]]:
    result, findings = [], []
    for example in examples:
        if example.tools or any(m.keys() - {"role", "content"} for m in example.messages):
            findings.append(f"{example.where}: has tools or a train mark, not rendered yet")
            continue
        answers = list(iter_answers(example.messages))
        if not answers or not answers[-1].strip():
            ledger.drop("without an answer", example.where)
            continue
        if data.train_on != "last" and not all(answer.strip() for answer in answers):
            ledger.drop("with an empty answer among its answers", example.where)
            continue
        try:
            row = chat_format.render(tokenizer, example.messages, data.train_on)
        except InputError as error:
            findings.append(f"{example.where}: {error}")
            continue
        result.append((example, row))
    refuse(findings)
    return result


def _note_overlap(train: Sequence[Document], heldout: Sequence[Document], ledger: Ledger) -> None:
    seen = {tuple(document.input_ids) for document in train}
    shared = [d.example.where for d in heldout if tuple(d.input_ids) in seen]
    if shared:
        ledger.notes.append(f"{len(shared)} rows are in the training data too: {shared[:5]}")
