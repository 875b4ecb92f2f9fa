"""The bytes of a file and their encoding: gzip undone, UTF-8 read, everything else named."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from finetune.errors import InputError
from finetune.files.paths import type_of
from finetune.files.row import MAX_ROW_MIB, max_row_size
from finetune.llama.downloads import refuse_failed_download

BOM = b"\xef\xbb\xbf"
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)

_HEAD_BYTES = 1024
_GZIP = b"\x1f\x8b"
_FOREIGN = {
    _GZIP: "gzip; its name needs .gz at the end",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it",
    b"PAR1": "Parquet; its name needs .parquet",
    b"ARROW1": "an Arrow file; write it as Parquet",
    b"SQLite format 3": "an SQLite database; write its rows as jsonl",
}
_WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class NotText(ValueError):
    """Content that no text file has; the message says which, and in which line."""


def refuse_foreign(path: Path) -> None:
    """Reads the head of a file and refuses what its name does not promise.

    Raises:
        InputError: no file, no permission, empty, a web page, a git-lfs pointer, another kind of
            file, gzip where none is promised or the other way round, UTF-16 or UTF-32.
    """
    refuse_failed_download(path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if type_of(path).endswith(".gz"):
        if not head.startswith(_GZIP):
            raise InputError(f"{path}: is not gzip, as its name says; it begins with {head[:4]!r}")
    elif type_of(path) != ".parquet":
        for mark, kind in _FOREIGN.items():
            if head.startswith(mark):
                raise InputError(f"{path}: is {kind}")
    else:
        return
    wide = _wide_encoding(_decompressed_head(path))
    if wide:
        raise InputError(f"{path}: line 1 is {wide}, not UTF-8; save it as UTF-8")


def _decompressed_head(path: Path) -> bytes:
    try:
        with open_bytes(path) as stream:
            return stream.read(_HEAD_BYTES)
    except GZIP_ERRORS as error:
        raise InputError(f"{path}: {gzip_reason(error)}") from None


def gzip_reason(error: Exception) -> str:
    """What one of `GZIP_ERRORS` means for the file."""
    if isinstance(error, EOFError):
        return "the gzip file was cut off: its end is missing; download or write it again"
    return f"the gzip file is damaged ({error})"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the mark at the start or by where zero bytes stand in plain letters."""
    for mark, name in _WIDE_MARKS.items():
        if head.startswith(mark):
            return f"{name} (it begins with the byte order mark {mark.hex(' ')})"
    pairs = len(head) // 2
    first, second = (head[start : 2 * pairs : 2].count(0) for start in (0, 1))
    # JSON and most text has a letter below 256 in nearly every pair; half of them is plenty.
    for zeros, others, order in ((second, first, "little"), (first, second, "big")):
        if pairs >= 2 and 2 * zeros >= pairs and 10 * others <= pairs:
            return f"UTF-16 ({order}-endian, without a byte order mark)"
    return None


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where its name ends in .gz."""
    compressed = type_of(path).endswith(".gz")
    with gzip.open(path, "rb") if compressed else path.open("rb") as stream:
        yield cast(BinaryIO, stream)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The text of a UTF-8 file without its byte order mark; line ends stay as they are."""
    with (
        open_bytes(path) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
    ):
        yield text


def iter_lines(text: TextIO) -> Iterator[str]:
    """The lines of a text with their ends.

    Raises:
        NotText: a zero byte, or a line longer than a row may be.
    """
    number = 0
    while line := text.readline(max_row_size() + 1):
        number += 1
        refuse_zero(line, number)
        if len(line) > max_row_size():
            raise NotText(f"line {number} is longer than {MAX_ROW_MIB} MiB")
        yield line


def refuse_zero(text: str, line: int) -> None:
    """Refuses zero bytes, which a disk that was full or a crash leaves behind.

    Args:
        line: the number of the line on which the text begins.

    Raises:
        NotText: there is one.
    """
    position = text.find("\0")
    if position >= 0:
        line += text.count("\n", 0, position)
        raise NotText(f"line {line} holds a NUL byte, which no text file has; was it cut off?")


def encoding_reason(line: bytes) -> str:
    """Why a line is not UTF-8, and which encoding it looks like."""
    valid = line.decode("utf-8", "ignore")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start]
    else:
        raise AssertionError("the line is UTF-8")
    if not valid.isascii():
        looks = "damaged UTF-8 (other letters of the line are right)"
    elif any(0x80 <= byte <= 0x9F for byte in line):
        looks = "Windows-1252"
    else:
        looks = "Latin-1"
    return f"is not UTF-8: byte 0x{bad:02x}; it looks like {looks}; save it as UTF-8"


def find_bad_line(path: Path) -> str:
    """Which line of a file is not UTF-8, and why: a second pass over a file that was refused."""
    with open_bytes(path) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not _is_utf8(line):
                    return f"line {number} {encoding_reason(line)}"
        except GZIP_ERRORS as error:
            return gzip_reason(error)
    raise AssertionError(f"{path} is UTF-8")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
