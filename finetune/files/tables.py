"""Rows of tables: .csv and .tsv with a header, .parquet."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from finetune.files.encoding import iter_lines, open_text
from finetune.files.findings import Findings
from finetune.files.row import Row, max_row_size

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow

_BATCH_ROWS = 256
_CARRIAGE_RETURN = (
    "is broken off by a bare carriage return, where the header's line ends with a newline; "
    "put the field into quotes"
)
_VALUE_ERRORS = (ValueError, KeyError, OverflowError)  # text that is not UTF-8, dates beyond 9999


def separated_by(delimiter: str) -> Callable[[Path, Findings], Iterator[Row]]:
    """The reader of tables with this character between the fields."""

    def read(path: Path, findings: Findings) -> Iterator[Row]:
        # The library's limit is one for the process, and 128 KiB unless it is raised.
        csv.field_size_limit(max_row_size())
        with open_text(path) as text:
            yield from _table(path, _Records(path, text, delimiter, findings), delimiter)

    return read


class _Records:
    """The records of a table with the line on which each begins; bad quotes become findings."""

    def __init__(self, path: Path, text: TextIO, delimiter: str, findings: Findings) -> None:
        self._path, self.findings = path, findings
        self._last_line = ""
        self._reader = csv.reader(self._lines(text), delimiter=delimiter, strict=True)

    def _lines(self, text: TextIO) -> Iterator[str]:
        for line in iter_lines(text):
            self._last_line = line
            yield line

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        line_end = ""
        while True:
            line = self._reader.line_num + 1
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.findings.add(f"{self._path}:{line}: {_quote_reason(error)}")
                continue
            line_end = line_end or self._last_line[-1]
            # The csv module writes a bare carriage return without quotes: no end of a row.
            if self._last_line[-1] == "\r" != line_end:
                self.findings.add(f"{self._path}:{line}: {_CARRIAGE_RETURN}")
            elif fields:
                yield line, fields


def _quote_reason(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return 'has a quote (") that is never closed'
    return f'is not a row of quoted fields ({error}); a quote inside a quoted field is written ""'


def _table(path: Path, records: _Records, delimiter: str) -> Iterator[Row]:
    rows = iter(records)
    line, header = next(rows, (0, []))
    wrong = list(_header_findings(header, delimiter))
    for finding in wrong:
        records.findings.add(f"{path}:{line}: {finding}")
    if wrong:
        return
    empty = True
    for line, fields in rows:
        empty = False
        if len(fields) == len(header):
            yield Row(f"{path}:{line}", dict(zip(header, fields, strict=True)))
        else:
            records.findings.add(
                f"{path}:{line}: has {len(fields)} fields; "
                f"the header has {len(header)}: {', '.join(header)}"
            )
    if empty and header and not records.findings.total:
        records.findings.add(f"{path}: has a header and no row under it")


def _header_findings(header: list[str], delimiter: str) -> Iterator[str]:
    if any(not name.strip() for name in header):
        yield f"the header has an empty name: {header}"
    yield from (f"the header has the column {name} twice" for name in _twice(header))
    foreign = [mark for mark in ",;\t|" if mark != delimiter and mark in "".join(header)]
    if len(header) == 1 and foreign:
        yield (
            f"the header is one column, {header[0]!r}; fields are separated by {delimiter!r}, "
            f"not by {foreign[0]!r}"
        )


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if name.strip() and count > 1]


def read_parquet(path: Path, findings: Findings) -> Iterator[Row]:
    """Rows of a Parquet file, batch by batch; rows are counted from 1."""
    import pyarrow
    from pyarrow import parquet

    number = itertools.count(1)
    try:
        with parquet.ParquetFile(path) as file:
            for name in _twice(file.schema_arrow.names):
                findings.add(f"{path}: has the column {name} twice")
                return
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield from _rows_of(batch, path, number, findings)
    # A damaged page may also raise the errors of what it is decoded to.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        findings.add(f"{path}: is not readable as Parquet, or was cut off ({reason})")


def _rows_of(
    batch: pyarrow.RecordBatch, path: Path, number: Iterator[int], findings: Findings
) -> Iterator[Row]:
    for where, columns in _records_of(batch, path, number, findings):
        yield Row(where, {name: _without_nulls(value) for name, value in columns.items()})


def _records_of(
    batch: pyarrow.RecordBatch, path: Path, number: Iterator[int], findings: Findings
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        records = batch.to_pylist(maps_as_pydicts="strict")
    except _VALUE_ERRORS as error:
        if batch.num_rows > 1:  # one by one, so that the row with the bad value is named
            for index in range(batch.num_rows):
                yield from _records_of(batch.slice(index, 1), path, number, findings)
            return
        findings.add(f"{path}:{next(number)}: holds a value that cannot be read ({error})")
        return
    yield from ((f"{path}:{next(number)}", columns) for columns in records)


def _without_nulls(value: Any) -> Any:
    """Drops the keys that are null.

    Arrow gives every struct of a column all keys that any of them has, so that a message without
    tool calls comes back with `tool_calls: None`, and a schema with the parameters of the others.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
