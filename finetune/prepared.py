"""Documents on disk, mapped into memory: written once, in order, read by index.

| file | holds |
|---|---|
| ids.bin | token ids of all documents, end to end: uint16 where the vocabulary fits, else uint32 |
| mask.bin | for each token 1 where it is trained, else 0 |
| rows.jsonl | the example of each document, once for all pieces of a split row |
| ends.bin | for each document an int64: where its tokens end |
| table.bin | for each document four int64: where its line in rows.jsonl begins and ends (bytes), \
its trained tokens, its source |
| side.json | number of documents, and the type of an id |
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from finetune import artifact
from finetune.shapes import Example

Ids = npt.NDArray[np.unsignedinteger[Any]]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

FILES = ("ids.bin", "mask.bin", "rows.jsonl", "ends.bin", "table.bin", "side.json")

_LINE_START, _LINE_END, _TRAINED, _SOURCE = range(4)  # columns of the table


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

    @functools.cached_property
    def num_trained(self) -> int:
        """Tokens that count in the loss; the first has nothing before it and never does."""
        return sum(self.train_mask) - self.train_mask[0]

    @functools.cached_property
    def answer_lengths(self) -> tuple[int, ...]:
        """Trained tokens of each answer: of each run of them that nothing untrained parts."""
        runs = itertools.groupby(self.train_mask[1:])
        return tuple(len(list(run)) for trained, run in runs if trained)

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and trained tokens."""
        return len(self.input_ids), self.num_trained


class DocumentWriter:
    """Writes the documents of one side into a folder; used as a context.

    Args:
        folder: is made; must not exist.
        vocab_size: of the tokenizer; decides the width of an id.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._ids = (folder / "ids.bin").open("wb")
        self._mask = (folder / "mask.bin").open("wb")
        self._rows = (folder / "rows.jsonl").open("wb")
        self._ends: list[int] = []
        self._table: list[tuple[int, int, int, int]] = []
        self._written: Example | None = None  # the last line of rows.jsonl

    def add(self, documents: Sequence[Document]) -> None:
        """Appends documents."""
        self._ids.write(_flat([d.input_ids for d in documents], self._dtype))
        self._mask.write(_flat([d.train_mask for d in documents], np.dtype("u1")))
        end = self._ends[-1] if self._ends else 0
        for document in documents:
            end += len(document.input_ids)
            self._ends.append(end)
            line = self._line(document.example)
            self._table.append((*line, document.num_trained, document.example.source))

    def _line(self, example: Example) -> tuple[int, int]:
        """Where the example's line begins and ends; the pieces of a split row share one."""
        if example is self._written:
            return self._table[-1][_LINE_START], self._table[-1][_LINE_END]
        self._written, start = example, self._table[-1][_LINE_END] if self._table else 0
        return start, start + self._rows.write(_line_of(example))

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._ids, self._mask, self._rows):
            file.close()
        if kind is None:
            for name, numbers in (("ends.bin", self._ends), ("table.bin", self._table)):
                (self._folder / name).write_bytes(np.array(numbers, "<i8").tobytes())
            facts = {"documents": len(self._ends), "ids": self._dtype.str}
            artifact.write_json(self._folder / "side.json", facts)


def _flat(rows: Sequence[Sequence[int]], dtype: np.dtype[Any]) -> bytes:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype, sum(map(len, rows))).tobytes()


def _line_of(example: Example) -> bytes:
    kept = {name: value for name, value in vars(example).items() if value or name == "where"}
    try:
        line = json.dumps(kept, ensure_ascii=False, separators=(",", ":"))
    except TypeError:
        line = json.dumps(_as_json(kept), ensure_ascii=False, separators=(",", ":"))
    return line.encode() + b"\n"


def _as_json(value: Any) -> Any:
    """A value with texts for what JSON has no form for: Parquet's times, decimals and bytes."""
    if isinstance(value, dict):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


class PreparedDocuments(Sequence[Document]):
    """The documents of one side, read from disk as they are asked for.

    Args:
        folder: written by `DocumentWriter`.
        chosen: indices of the documents that count, in order; all if None.
    """

    def __init__(self, folder: Path, chosen: Numbers | None = None) -> None:
        facts = artifact.read_json(folder / "side.json")
        self._folder = folder
        self._ids = _mapped(folder / "ids.bin", np.dtype(facts["ids"]))
        self._mask = _mapped(folder / "mask.bin", np.dtype(np.bool_))
        self._rows = _mapped(folder / "rows.jsonl", np.dtype("u1"))
        self._ends = np.concatenate([[0], np.fromfile(folder / "ends.bin", "<i8")])
        self._table = np.fromfile(folder / "table.bin", "<i8").reshape(facts["documents"], 4)
        self._chosen = np.arange(facts["documents"]) if chosen is None else chosen

    def only(self, chosen: Numbers) -> PreparedDocuments:
        """Some of these documents, by their index here."""
        return PreparedDocuments(self._folder, self._chosen[chosen])

    @property
    def lengths(self) -> Numbers:
        """(documents,) tokens of each."""
        lengths: Numbers = np.diff(self._ends)[self._chosen]
        return lengths

    @property
    def num_trained(self) -> Numbers:
        """(documents,) trained tokens of each."""
        return self._column(_TRAINED)

    @property
    def sources(self) -> Numbers:
        """(documents,) index of the config's source that each came from."""
        return self._column(_SOURCE)

    def _column(self, number: int) -> Numbers:
        column: Numbers = self._table[self._chosen, number]
        return column

    def used_ids(self) -> list[int]:
        """Every token id that occurs, sorted."""
        seen = np.zeros(int(self._ids.max(initial=0)) + 1, np.bool_)
        for index in range(len(self)):
            seen[self.pair(index)[0]] = True
        return np.flatnonzero(seen).tolist()

    def pair(self, index: int) -> tuple[Ids, Mask]:
        """Ids and train mask of one document, (tokens,) each: views of the files."""
        number = self._chosen[index]
        span = slice(self._ends[number], self._ends[number + 1])
        return self._ids[span], self._mask[span]

    def example(self, index: int) -> Example:
        """The row of one document."""
        span = slice(*self._table[self._chosen[index], [_LINE_START, _LINE_END]])
        values = json.loads(self._rows[span].tobytes())
        for name in ("messages", "tools"):
            values[name] = tuple(values.get(name, ()))
        return Example(**values)

    def examples(self) -> Iterator[Example]:
        """The rows, in order; one whose pieces follow each other comes once."""
        return (self.example(documents[0]) for documents in self.rows())

    def rows(self) -> Iterator[list[int]]:
        """The indices of each row's documents: one, or those of its pieces."""
        begins = self._column(_LINE_START).tolist()
        for _, group in itertools.groupby(range(len(self)), begins.__getitem__):
            yield list(group)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        ids, mask = self.pair(index)
        return Document(self.example(index), ids.tolist(), mask.tolist())

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if not path.stat().st_size:  # nothing to map
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
