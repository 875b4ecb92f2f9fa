"""Files -> rows, streaming: a reader for each type, one order of findings for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.artifact import refuse_special
from finetune.errors import InputError
from finetune.files import json_rows, tables
from finetune.files.encoding import (
    GZIP_ERRORS,
    NotText,
    find_bad_line,
    gzip_reason,
    open_text,
    refuse_foreign,
    refuse_zero,
)
from finetune.files.findings import Findings
from finetune.files.paths import TYPES, allowed_types, is_read, type_of
from finetune.files.row import MAX_ROW_MIB, Row, max_row_size


def read_rows(path: Path | str) -> Iterator[Row]:
    """Rows of one file, in its order and in bounded memory.

    Good rows are handed out as they are read; what is wrong with the others is raised together
    after the last one. Whoever trains on rows therefore has to reach the end of the iterator
    before the first of them is used.

    Raises:
        InputError: at the first row: a file that is missing, of another type, empty or in another
            encoding; at the end: every bad row with its place, the first 20 and how many more.
    """
    findings = Findings()
    yield from iter_rows(Path(path), findings)
    findings.refuse()


def iter_rows(path: Path, findings: Findings) -> Iterator[Row]:
    """Like `read_rows`, but bad rows are added to `findings` and the caller raises them.

    A file without any row adds a finding too.
    """
    _refuse_unread(path)
    refuse_foreign(path)
    num_rows = 0
    try:
        for row in _READERS[type_of(path).removesuffix(".gz")](path, findings):
            num_rows += 1
            yield row
    except GZIP_ERRORS as error:
        findings.add(f"{path}: {gzip_reason(error)}")
    except UnicodeDecodeError:
        findings.add(f"{path}: {find_bad_line(path)}")
    except NotText as error:
        findings.add(f"{path}: {error}")
    if not num_rows and not findings.total:
        findings.add(f"{path}: is empty; expected at least one row")


def _refuse_unread(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file (relative paths start at the current folder)")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file is needed")
    refuse_special(path)
    if not is_read(path):
        kind = type_of(path) or "none"
        raise InputError(f"{path}: files of type {kind} are not read; read are {allowed_types()}")


def _read_document(path: Path, findings: Findings) -> Iterator[Row]:
    """A .txt file: one document, its line ends as they are."""
    with open_text(path) as file:
        text = file.read(max_row_size() + 1)
    refuse_zero(text, line=1)
    if len(text) > max_row_size():
        raise NotText(f"is longer than {MAX_ROW_MIB} MiB; write its documents as jsonl")
    if text.strip():
        yield Row(f"{path}:1", {"text": text})


_READERS: dict[str, Callable[[Path, Findings], Iterator[Row]]] = {
    ".json": json_rows.read_array,
    ".jsonl": json_rows.read_lines,
    ".ndjson": json_rows.read_lines,
    ".csv": tables.separated_by(","),
    ".tsv": tables.separated_by("\t"),
    ".txt": _read_document,
    ".parquet": tables.read_parquet,
}
assert set(_READERS) == set(TYPES), "every type that is found has a reader"
