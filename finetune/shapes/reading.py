"""A file -> its shape and its examples, streaming."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.files import Findings, Row, iter_rows
from finetune.shapes.detection import detect_shape, fitting_shapes, refuse_unasked
from finetune.shapes.example import Example
from finetune.shapes.layouts import to_examples


def read_examples(
    path: Path, shape: str = "auto", columns: Mapping[str, str] | None = None
) -> tuple[str, Iterator[Example]]:
    """Every row of a file as an example.

    Examples are handed out as their rows are read. What is wrong with other rows is raised together
    after the last one, so reach the end before the first of them is used.

    Args:
        shape: one of `SHAPES`, or auto: detected from the first row.
        columns: our column name -> the file's, for files with other names.

    Returns:
        the shape, and the examples in file order.

    Raises:
        InputError: at once: nothing can be read, or the first row's shape is not plain. From the
            iterator, at its end: rows that cannot be read or are not of the shape (all of them,
            up to 20), columns that no row has.
    """
    file = _File(path, columns or {})
    first = next(file.rows, None)
    if first is None:
        file.refuse()
        raise AssertionError("a file without rows has findings")
    detected = file.detect(first) if shape == "auto" else shape
    return detected, file.examples(first, detected, was_detected=shape == "auto")


class _File:
    """The rows of a file under our column names, and what is wrong with them."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self._path, self._columns = path, columns
        self._names: set[str] = set()
        self._findings = Findings()
        self.rows = map(self._renamed, iter_rows(path, self._findings))

    def _renamed(self, row: Row) -> Row:
        """The columns under our names; one of the file's own that has such a name gives way."""
        if not self._columns:
            return row
        self._names |= row.columns.keys()
        taken = {*self._columns, *self._columns.values()}
        named: dict[str, Any] = {
            ours: row.columns[theirs]
            for ours, theirs in self._columns.items()
            if theirs in row.columns
        }
        others = {name: value for name, value in row.columns.items() if name not in taken}
        return Row(row.where, named | others)

    def detect(self, row: Row) -> str:
        try:
            return detect_shape(row.columns)
        except ValueError as error:
            self._findings.add(f"{row.where}: {error}")
        if self._columns:  # the reason may be a name that is spelled wrong: look at all rows
            for _ in self.rows:
                continue
            self._refuse_unknown_columns()
        self._findings.refuse()
        raise AssertionError("a finding was added")

    def examples(self, first: Row, shape: str, was_detected: bool) -> Iterator[Example]:
        for row in itertools.chain([first], self.rows):
            try:
                if was_detected:
                    refuse_unasked(
                        row.columns, [s for s in fitting_shapes(row.columns) if s == shape]
                    )
                found = to_examples(row, shape)
            except ValueError as error:
                self._findings.add(f"{row.where}: {error}")
            else:
                yield from found
        self.refuse()

    def refuse(self) -> None:
        self._refuse_unknown_columns()
        self._findings.refuse()

    def _refuse_unknown_columns(self) -> None:
        """Alone, since each row's finding is only its consequence."""
        unknown = Findings()
        for ours, theirs in self._columns.items():
            if self._names and theirs not in self._names:
                unknown.add(
                    f"{self._path}: no row has the column {theirs} that columns.{ours} names; "
                    f"there are {', '.join(sorted(self._names))}"
                )
        unknown.refuse()
