"""Every type of file: rows read exactly, or refused by file, place and reason."""

from __future__ import annotations

import codecs
import gzip
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import InputError
from finetune.files import find_files, read_rows

A, B = {"text": "a"}, {"text": "b"}


@pytest.fixture
def file(tmp_path):
    """`file("rows.jsonl", b"…")`: the path of a file that holds these bytes."""

    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row.where.removeprefix(f"{path}:"), row.columns) for row in read_rows(path)]


def findings_of(path: Path) -> list[str]:
    """The findings, without the path that each of them begins with."""
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    assert all(finding.startswith((f"{path}:", "and ")) for finding in caught.value.findings)
    return [finding.removeprefix(f"{path}:") for finding in caught.value.findings]


def deep(levels: int) -> bytes:
    return b'{"text": "a", "x": ' + b"[" * levels + b"]" * levels + b"}"


LONG = {"text": "long " * 2**20}  # 5 MiB
READ = {
    "two lines": ("x.jsonl", b'{"text": "a"}\n{"text": "b"}\n', [("1", A), ("2", B)]),
    "ndjson": ("x.ndjson", b'{"text": "a"}', [("1", A)]),
    "upper case": ("X.JSONL", b'{"text": "a"}', [("1", A)]),
    "byte order mark": ("x.jsonl", codecs.BOM_UTF8 + b'{"text": "a"}\n', [("1", A)]),
    "mark in json": ("x.json", codecs.BOM_UTF8 + b'[{"text": "a"}]', [("1", A)]),
    "mark in csv": ("x.csv", codecs.BOM_UTF8 + b"text\na\n", [("2", A)]),
    "mark in txt": ("x.txt", codecs.BOM_UTF8 + b"a", [("1", A)]),
    "CRLF": ("x.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', [("1", A), ("3", B)]),
    "blank lines": ("x.jsonl", b'\n{"text": "a"}\n\n \t\n{"text": "b"}', [("2", A), ("5", B)]),
    "line separators": (
        "x.jsonl",
        '{"text": "1\u20282\u20293\x854"}\n{"text": "b"}'.encode(),
        [("1", {"text": "1\u20282\u20293\x854"}), ("2", B)],
    ),
    "line separators in csv": (
        "x.csv",
        "text\r\n1\u20282\x0b3\x0c4\x855\r\nb\r\n".encode(),
        [("2", {"text": "1\u20282\x0b3\x0c4\x855"}), ("3", B)],
    ),
    "escapes": (
        "x.jsonl",
        rb'{"text": "\ud83d\ude00\u0000\u20ac\n"}',
        [("1", {"text": "\U0001f600\0€\n"})],
    ),
    "escaped backslash": ("x.jsonl", rb'{"text": "\\ud800"}', [("1", {"text": "\\ud800"})]),
    "99 levels": ("x.jsonl", deep(98), [("1", None)]),
    "many brackets": (
        "x.jsonl",
        b'{"text": "' + b"[{" * 200 + b'"}',
        [("1", {"text": "[{" * 200})],
    ),
    "5 MB line": ("x.jsonl", b'{"text": "' + b"long " * 2**20 + b'"}', [("1", LONG)]),
    "5 MB element": (
        "x.json",
        b'[{"text": "a"}, {"text": "' + b"long " * 2**20 + b'"}, {"text": "b"}]',
        [("1", A), ("2", LONG), ("3", B)],
    ),
    "pretty json": ("x.json", b'[\n  {"text": "a"},\n  {"text":\n "b"}\n]\n', [("1", A), ("2", B)]),
    "one object": ("x.json", b' {"text": "a"}\n', [("1", A)]),
    "quoted newlines": (
        "x.csv",
        b'q,a\r\n"1\r\n2",x\r\n\r\n"say ""b""",\n',
        [("2", {"q": "1\r\n2", "a": "x"}), ("5", {"q": 'say "b"', "a": ""})],
    ),
    "old line ends": ("x.csv", b"text\ra\rb\r", [("2", A), ("3", B)]),
    "tsv": ("x.tsv", b"q\ta\n1,2\t3\n", [("2", {"q": "1,2", "a": "3"})]),
    "empty field of one": ("x.csv", b'text\n""\na\n', [("2", {"text": ""}), ("3", A)]),
    "document": ("x.txt", b"First\r\n\r\nThen {\n", [("1", {"text": "First\r\n\r\nThen {\n"})]),
    "gzip": ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n'), [("1", A)]),
    "gzip in two parts": (
        "x.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n{"te') + gzip.compress(b'xt": "b"}\n'),
        [("1", A), ("2", B)],
    ),
    "gzipped csv": ("x.csv.gz", gzip.compress(b"text\na\n"), [("2", A)]),
}


@pytest.mark.parametrize("kind", READ)
def test_odd_files_are_read_exactly(file, kind):
    name, content, expected = READ[kind]
    found = rows_of(file(name, content))
    assert [place for place, _ in found] == [place for place, _ in expected]
    wanted = [columns for _, columns in expected if columns is not None]
    assert wanted == [] or [columns for _, columns in found] == wanted


UTF16 = '{"text": "héllo"}\n'
TWO = b'{"text": "a"}\n{"text": "b"}\n'
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "no byte": ("x.jsonl", b"", " is empty"),
    "no byte of csv": ("x.csv", b"", " is empty"),
    "blank": ("x.json", b" \n\t", " is empty; expected at least one row"),
    "mark alone": ("x.jsonl", codecs.BOM_UTF8, " is empty; expected at least one row"),
    "blank text": ("x.txt", b" \n", " is empty"),
    "nothing gzipped": ("x.jsonl.gz", gzip.compress(b""), " is empty"),
    "empty array": ("x.json", b" [ ] ", " is an empty array"),
    "header alone": ("x.csv", b"q,a\n", " has a header and no row under it"),
    "unknown type": ("x.xlsx", b"PK", " files of type .xlsx are not read; read are .json, .jsonl"),
    "no type": ("rows", TWO, " files of type none are not read"),
    "gzipped parquet": ("x.parquet.gz", b"\x1f\x8b", " files of type .parquet.gz are not read"),
    "web page": ("x.jsonl", HTML, " is a web page (HTML)"),
    "web page as gz": ("x.jsonl.gz", HTML, " is a web page (HTML)"),
    "web page as parquet": ("x.parquet", HTML, " is a web page (HTML)"),
    "git-lfs pointer": ("x.parquet", LFS, " is a git-lfs pointer"),
    "lfs pointer as csv": ("x.csv", LFS, " is a git-lfs pointer"),
    "gz that is none": (
        "x.jsonl.gz",
        TWO,
        " is not gzip, as its name says; it begins with b'{\"te'",
    ),
    "gzip without .gz": ("x.jsonl", gzip.compress(TWO), " is gzip; its name needs .gz"),
    "zip": ("x.csv", b"PK\x03\x04 \x00", " is a zip archive"),
    "parquet as json": ("x.json", b"PAR1\x15", " is Parquet; its name needs .parquet"),
    "no parquet": ("x.parquet", b'{"text": "a"}', " is not readable as Parquet"),
    "cut parquet": (
        "x.parquet",
        b"PAR1" + bytes(40),
        " is not readable as Parquet, or was cut off",
    ),
    "cut gzip": ("x.jsonl.gz", gzip.compress(TWO)[:-9], " the gzip file was cut off"),
    "cut gzip head": ("x.jsonl.gz", gzip.compress(TWO)[:6], " the gzip file was cut off"),
    "gzip checksum": (
        "x.jsonl.gz",
        gzip.compress(TWO)[:-8] + bytes(8),
        " the gzip file is damaged (CRC check failed",
    ),
    "gzip and more": ("x.jsonl.gz", gzip.compress(TWO) + b"more", " the gzip file is damaged"),
    "UTF-16 with mark": ("x.jsonl", UTF16.encode("utf-16"), " line 1 is UTF-16 (it begins with"),
    "UTF-16 little": ("x.jsonl", UTF16.encode("utf-16-le"), " line 1 is UTF-16 (little-endian"),
    "UTF-16 big": ("x.csv", "text\nabc".encode("utf-16-be"), " line 1 is UTF-16 (big-endian"),
    "UTF-16 gzipped": ("x.txt.gz", gzip.compress(UTF16.encode("utf-16")), " line 1 is UTF-16"),
    "UTF-32": ("x.json", UTF16.encode("utf-32"), " line 1 is UTF-32"),
    "Latin-1": (
        "x.jsonl",
        TWO + '{"text": "é"}'.encode("latin-1"),
        "3: is not UTF-8: byte 0xe9; it looks like Latin-1; save it as UTF-8",
    ),
    "Latin-1 in json": (
        "x.json",
        b'[\n{"text": "\xe9"}]',
        " line 2 is not UTF-8: byte 0xe9; it looks",
    ),
    "Latin-1 in csv": ("x.csv", b"text\n\na\n\xfcber\n", " line 4 is not UTF-8: byte 0xfc"),
    "Latin-1 in txt": ("x.txt", b"a\r\n\xfc", " line 2 is not UTF-8: byte 0xfc"),
    "Windows-1252": (
        "x.csv",
        b"text\n\x93so\x94\n",
        " line 2 is not UTF-8: byte 0x93; it looks like W",
    ),
    "damaged UTF-8": (
        "x.jsonl",
        '{"text": "éé"}'.encode()[:-3],
        "1: is not UTF-8: byte 0xc3; it loo",
    ),
    "surrogate bytes": ("x.jsonl", b'{"text": "\xed\xa0\x80"}', "1: is not UTF-8: byte 0xed"),
    "NUL in jsonl": ("x.jsonl", TWO + bytes(30), "3: holds a NUL byte"),
    "NUL in json": ("x.json", b'[{"text": "a"},\n{"text": "\0"}]', " line 2 holds a NUL byte"),
    "NUL in csv": ("x.csv", b"text\na\0b\n", " line 2 holds a NUL byte"),
    "NUL in txt": ("x.txt", b"ab\nc\0", " line 2 holds a NUL byte"),
    "NaN": ("x.jsonl", b'{"text": "a", "x": NaN}', "1: NaN is not JSON"),
    "Infinity": ("x.json", b'[{"x": 1}, {"x": [-Infinity]}]', "2: -Infinity is not JSON"),
    "too large": ("x.jsonl", b'{"x": 1e999}', "1: the number 1e999 is too large for a float"),
    "too long": ("x.json", b'[{"x": ' + b"9" * 5000 + b"}]", "1: holds a number of 5000 digits"),
    "key twice": ("x.jsonl", b'{"text": "a", "text": "b"}', "1: has the key 'text' twice"),
    "inner key twice": ("x.json", b'[{"m": [{"r": 1, "r": 1}]}]', "1: has the key 'r' twice"),
    "lone surrogate": ("x.jsonl", rb'{"text": "\ud800"}', "1: holds a lone surrogate"),
    "surrogate in a key": ("x.json", rb'[{"\uDFFF": 1}]', "1: holds a lone surrogate"),
    "array in jsonl": (
        "x.jsonl",
        b'[{"text": "a"}]',
        "1: holds an array; one object a line (an ar",
    ),
    "number in jsonl": ("x.jsonl", b"5", "1: is a number; expected an object with columns"),
    "text in json": ("x.json", b'[{"text": "a"}, "b"]', "2: is text; expected an object"),
    "jsonl in json": (
        "x.json",
        TWO,
        " holds one object after another, not an array; that is .jsonl",
    ),
    "key twice in one object": ("x.json", b'{"text": "a", "text": "b"}', " has the key 'text' t"),
    "rows in an object": (
        "x.json",
        b'{"version": 1, "data": [{"text": "a"}]}',
        " is one object whose rows seem to be the list under 'data': save that list",
    ),
    "single text": ("x.json", b'"a"', " is text; expected an array of objects"),
    "no json": ("x.json", b"text", " is not JSON: Expecting value (line 1, column 1)"),
    "two on a line": (
        "x.jsonl",
        b'{"text": "a"} {"text": "b"}',
        "1: holds several values on one line",
    ),
    "comma after": ("x.jsonl", b'{"text": "a"},\n', "1: has a comma after the value"),
    "words after": ("x.jsonl", b'{"text": "a"} b', "1: has more after the value: 'b'"),
    "mark inside": (
        "x.jsonl",
        b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}',
        "2: begins with a byte ord",
    ),
    "cut line": (
        "x.jsonl",
        TWO + b'{"text": "c',
        "3: is cut off: no whole JSON value (Unterminated",
    ),
    "cut after comma": ("x.jsonl", b'{"text": "a",', "1: is cut off: no whole JSON value"),
    "single quotes": ("x.jsonl", b"{'text': 'a'}", "1: is not JSON: Expecting property name"),
    "cut element": (
        "x.json",
        b'[{"text": "a"},\n {"te',
        "2: is cut off: no whole JSON value (Untermi",
    ),
    "cut array": ("x.json", b'[{"text": "a"}', " is cut off after element 1: the array has no end"),
    "comma at the end": (
        "x.json",
        b'[{"text": "a"},\n]',
        "2: is not JSON: Expecting value (line 2,",
    ),
    "comma missing": ("x.json", b'[{"a": 1}\n{"a": 2}]', "1: is followed by '{'; expected a comma"),
    "colon missing": (
        "x.json",
        b'[\n{"a": 1}, {"a" 2}]',
        "2: is not JSON: Expecting ':' delimiter (l",
    ),
    "two arrays": ("x.json", b'[{"a": 1}][{"a": 2}]', " has more after the array's end"),
    "deep in jsonl": ("x.jsonl", deep(100), "1: is nested too deeply to be a row"),
    "deeper in jsonl": ("x.jsonl", b"[" * 100_000, "1: is nested too deeply to be a row"),
    "deep in json": ("x.json", b"[" + deep(100) + b"]", "1: is nested too deeply to be a row"),
    "deeper in json": ("x.json", b"[" * 100_000, "1: is nested too deeply to be a row"),
    "ragged row": ("x.csv", b'q,a\n"1\n2",3\n1,2,3\n', "4: has 3 fields; the header has 2: q, a"),
    "short row": ("x.tsv", b"q\ta\n1\n", "2: has 1 fields; the header has 2: q, a"),
    "name twice": ("x.csv", b"q,a,q\n1,2,3\n", "1: the header has the column q twice"),
    "name empty": ("x.csv", b"q,\n1,2\n", "1: the header has an empty name: ['q', '']"),
    "semicolons": (
        "x.csv",
        b"q;a\n1;2\n",
        "1: the header is one column, 'q;a'; fields are separated",
    ),
    "open quote": ("x.csv", b'q,a\n1,2\n"3,4\n5,6\n', '3: has a quote (") that is never closed'),
    "carriage return": ("x.csv", b"text\na\rb\n", "2: is broken off by a bare carriage return"),
    "stray quote": ("x.csv", b'q,a\n"1"2,3\n', "2: is not a row of quoted fields"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_files_are_refused_with_their_place(file, kind):
    name, content, says = REFUSED[kind]
    (finding,) = findings_of(file(name, content))
    assert says in finding
    assert not says[0].isdigit() or finding.startswith(says)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    path = tmp_path / "none.jsonl"
    assert findings_of(path) == [" no such file (relative paths start at the current folder)"]
    assert findings_of(tmp_path) == [" is a folder, a file is needed"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert findings_of(tmp_path / "pipe.jsonl") == [" is no regular file"]


@pytest.fixture
def as_nobody():
    """Root may read every file: then the test goes on as a user who may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_a_file_without_permission_is_refused(as_nobody):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        path = Path(folder) / "x.jsonl"
        path.write_bytes(TWO)
        path.chmod(0)
        assert findings_of(path) == [" cannot be read (Permission denied)"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_rows_have_a_longest(file, name, monkeypatch):
    monkeypatch.setattr("finetune.files.row.MAX_ROW_MIB", 1)
    text = b"x" * (2**20 + 1)
    contents = {
        "x.jsonl": TWO + b'{"text": "' + text * 3 + b'"}\n{"text": "c"}\n',
        "x.json": b'[{"text": "' + text * 3 + b'"}]',
        "x.csv": b"text\n" + text + b"\n",
        "x.txt": text,
    }
    assert "is longer than" in findings_of(file(name, contents[name]))[0]


def test_good_rows_come_first_and_every_bad_one_is_named_up_to_twenty(file):
    good = b'{"text": "a"}\n'
    rows = read_rows(file("x.jsonl", good + b"{\n" * 33 + good))
    assert [next(rows).columns, next(rows).columns] == [A, A]
    with pytest.raises(InputError) as caught:
        next(rows)
    places = [finding.split(": ")[0].rpartition(":")[2] for finding in caught.value.findings]
    assert places[:20] == [str(number) for number in range(2, 22)]
    assert caught.value.findings[20:] == ["and 13 more rows"]


FOLDER = ["b.jsonl", "a.csv.gz", "sub/c.parquet", ".hidden.json", ".git/d.json", "README.md"]


def test_a_folder_gives_its_data_files_sorted(file, tmp_path):
    for name in FOLDER:
        file(f"data/{name}", b"x")
    (tmp_path / "data" / "sub" / "loop").symlink_to(tmp_path / "data")
    folder = tmp_path / "data"
    assert find_files(str(folder)) == [folder / n for n in ("a.csv.gz", "b.jsonl", "sub/c.parquet")]
    assert find_files(f"{folder}/*") == [folder / "a.csv.gz", folder / "b.jsonl"]
    assert find_files(f"{folder}/**/*.parquet")[0] == folder / "sub/c.parquet"
    assert find_files(f"{folder}/b.jsonl") == [folder / "b.jsonl"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(file):
    path = file("rows[1].jsonl", TWO)
    file("rows1.jsonl", TWO)
    assert find_files(str(path)) == [path]


def refusal_of(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        find_files(str(path))
    (finding,) = caught.value.findings
    assert finding.startswith(f"{path}: ")
    return finding


def test_paths_that_hold_no_data_are_refused(file, tmp_path):
    assert "no such file" in refusal_of(tmp_path / "none.jsonl")
    assert "no file fits this pattern" in refusal_of(f"{tmp_path}/*.jsonl")
    assert "there is no file; read are .json" in refusal_of(tmp_path)
    file("README.md", b"x")
    assert "holds no data file; there are README.md; read are .json" in refusal_of(tmp_path)
    assert "files of type .md are not read" in refusal_of(tmp_path / "README.md")
    file("part-1.jsonl", TWO)
    file("part-2.jsonl.zst", b"x")
    assert "holds data that is not read: part-2.jsonl.zst;" in refusal_of(tmp_path)
    assert len(find_files(f"{tmp_path}/*.jsonl")) == 1


def test_a_link_to_nothing_is_not_passed_over(file, tmp_path):
    file("a.jsonl", TWO)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    found = find_files(str(tmp_path))
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl"]
    assert findings_of(found[1]) == [" no such file (relative paths start at the current folder)"]
