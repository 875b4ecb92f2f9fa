"""A row: the columns of one record and the place it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_ROW_MIB = 256
"""Longest row (and .txt document). Above it, a file is no longer read in bounded memory."""


@dataclass(frozen=True)
class Row:
    """One record of a file.

    Attributes:
        where: `file:N`, counted from 1: the line on which the row begins (jsonl, csv, tsv), or the
            number of the element or record (json, parquet); 1 for a .txt document.
        columns: name -> value, as the file has them.
    """

    where: str
    columns: dict[str, Any]


def max_row_size() -> int:
    """The longest row, in bytes or characters."""
    return MAX_ROW_MIB * 2**20
