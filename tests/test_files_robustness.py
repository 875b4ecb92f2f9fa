"""Readers against writers that know nothing of them, against noise, and in bounded memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.files import TYPES, Findings, iter_rows, read_rows
from finetune.files.json_rows import _CHUNK

COMPRESSED = [f"{kind}.gz" for kind in TYPES if kind != ".parquet"]
ODD = "\u2028\u2029\x85\x0b\x0c\x1c\x1e\ufeff\u200b\U0001f600\ud7ff\ue000\x7f\"'\\\r\n\t,;{}[]:é "
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(ODD)), max_size=20)
QUICK = settings(max_examples=60, deadline=None)
SHARED_FOLDER = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def columns_of(path: Path) -> list[dict[str, Any]]:
    return [row.columns for row in read_rows(path)]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
JSON_ROWS = st.lists(st.dictionaries(TEXTS, JSON_VALUES, max_size=4), min_size=1, max_size=5)


@QUICK
@given(JSON_ROWS, st.booleans(), st.sampled_from([None, 2]))
def test_json_comes_back_as_it_was_written(tmp_path_factory, rows, ascii_only, indent):
    folder = tmp_path_factory.mktemp("rows")
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode()
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    for name, content in {"x.json": array, "x.jsonl": lines}.items():
        assert columns_of(written(folder / name, content)) == rows
        assert columns_of(written(folder / f"{name}.gz", content)) == rows


# A zero byte is refused: the csv module writes it, no reader of tables takes it.
CELLS = TEXTS.map(lambda text: text.replace("\0", ""))


@QUICK
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from(["\r\n", "\n"]))
@example([("", ""), ('"', ",")], "\n")
def test_tables_come_back_as_they_were_written(tmp_path_factory, cells, end):
    folder = tmp_path_factory.mktemp("rows")
    # With \n at the line's end the csv module leaves a bare \r outside quotes, and cannot read it.
    quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL
    for name, delimiter in {"x.csv": ",", "x.tsv": "\t", "x.csv.gz": ","}.items():
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writerows([("q", "a"), *cells])
        content = text.getvalue().encode("utf-8-sig" if name == "x.tsv" else "utf-8")
        expected = [{"q": q, "a": a} for q, a in cells]
        assert columns_of(written(folder / name, content)) == expected


@QUICK
@given(TEXTS.map(lambda text: text.replace("\0", "")).filter(str.strip))
def test_a_document_comes_back_as_it_was_written(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("rows") / "x.txt"
    # A mark at the start belongs to the file; the text's own comes after it.
    assert columns_of(written(path, ("\ufeff" + text).encode())) == [{"text": text}]


PARQUET_ROWS = st.lists(
    st.fixed_dictionaries(
        {"text": TEXTS, "n": st.integers(-(2**63), 2**63 - 1), "parts": st.lists(TEXTS, max_size=3)}
    ),
    min_size=1,
    max_size=6,
)


@QUICK
@given(PARQUET_ROWS, st.sampled_from(["snappy", "gzip", "zstd", "none"]), st.integers(1, 4))
def test_parquet_comes_back_as_it_was_written(tmp_path_factory, rows, compression, group):
    path = tmp_path_factory.mktemp("rows") / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression=compression, row_group_size=group)
    assert columns_of(path) == rows


def test_keys_that_arrow_adds_are_dropped_and_null_columns_stay(tmp_path):
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}], "tools": None},
        {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}]},
        {"messages": [], "tools": [{"name": "g", "parameters": {"x": 1}}, None]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() != rows  # the keys are really there
    assert columns_of(tmp_path / "x.parquet") == rows


def test_parquet_counts_rows_over_batches_and_groups(tmp_path):
    table = pa.table({"n": list(range(1000))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=70)
    rows = list(read_rows(tmp_path / "x.parquet"))
    assert [row.where for row in rows] == [f"{tmp_path}/x.parquet:{n}" for n in range(1, 1001)]
    assert [row.columns["n"] for row in rows] == list(range(1000))


def test_a_parquet_text_that_is_not_utf8_costs_its_own_row(tmp_path):
    good, bad = pa.array([b"a", b"b"]), pa.array([b"c\xff"])
    column = pa.chunked_array([a.cast(pa.string(), safe=False) for a in (good, bad, good)])
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    findings = Findings()
    rows = list(iter_rows(tmp_path / "x.parquet", findings))
    assert [row.columns["text"] for row in rows] == ["a", "b", "a", "b"]
    assert findings.total == 1
    assert findings.named[0].startswith(
        f"{tmp_path}/x.parquet:3: holds a value that cannot be read"
    )


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="has the column x twice"):
        columns_of(tmp_path / "x.parquet")


def read_or_refused(path: Path) -> tuple[int, Findings]:
    """Rows and findings; any other error than InputError is the test's failure."""
    findings, num_rows = Findings(), 0
    try:
        num_rows = sum(1 for _ in iter_rows(path, findings))
    except InputError as error:
        for finding in error.findings:
            findings.add(finding)
    assert num_rows or findings.total, "a file is read or refused"
    assert all(finding.startswith(f"{path}:") for finding in findings.named)
    return num_rows, findings


SEEDS = [
    b"",
    b"[",
    b"[{",
    b'{"a": ',
    b"a,b\n",
    b'"',
    b"PAR1",
    b"\x1f\x8b",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
]


@pytest.mark.parametrize("kind", [*TYPES, *COMPRESSED])
@SHARED_FOLDER
@given(st.sampled_from(SEEDS), st.binary(max_size=200), st.booleans())
def test_random_bytes_are_read_or_refused(tmp_path, kind, seed, noise, wrapped):
    path = tmp_path / f"noise{kind}"
    path.write_bytes(gzip.compress(seed + noise, 1) if wrapped else seed + noise)
    read_or_refused(path)


ROWS = [{"q": f"{n} and é\u2028", "a": ['"', {"b": [n, 1.5, None, True]}]} for n in range(12)]
FLAT = [{"q": f'{n}, "é"\n', "a": "x"} for n in range(12)]


def valid(kind: str) -> bytes:
    """A file of the type, written by another hand."""
    if kind == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ROWS[:1] and FLAT), sink, row_group_size=5)
        return sink.getvalue()
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["q", "a"], delimiter="," if kind == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(FLAT)
        return text.getvalue().encode()
    if kind == ".json":
        return json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@st.composite
def mutations(draw: Any, first: int = 0) -> Any:
    """A function that changes, drops, doubles or cuts some bytes after the first ones."""
    steps = draw(
        st.lists(st.tuples(st.sampled_from("scdi"), st.floats(0, 1), st.binary(max_size=3)))
    )

    def mutate(content: bytes) -> bytes:
        for step, share, new in steps:
            at = first + int(share * max(len(content) - first, 0))
            if step == "s":
                content = content[:at] + new + content[at + len(new) :]
            elif step == "c":
                content = content[:at] + content[at + 1 + len(new) :]
            elif step == "d":
                content = content[: at + 40] + content[at:]
            else:
                content = content[:at] + new + content[at:]
        return content

    return mutate


@pytest.mark.parametrize("kind", [*TYPES, *COMPRESSED])
@SHARED_FOLDER
@given(mutations(), st.booleans())
def test_damaged_files_are_read_or_refused(tmp_path, kind, mutate, inside):
    path, content = tmp_path / f"damaged{kind}", valid(kind.removesuffix(".gz"))
    if kind.endswith(".gz"):
        content = gzip.compress(mutate(content)) if inside else mutate(gzip.compress(content))
    else:
        content = mutate(content)
    path.write_bytes(content)
    read_or_refused(path)


@settings(SHARED_FOLDER, max_examples=250)
@given(mutations(first=20))
def test_every_line_of_damaged_jsonl_is_a_row_or_a_finding(tmp_path, mutate):
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(mutate(valid(".jsonl")))
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip(b" \t\r")]
    num_rows, findings = read_or_refused(path)
    if len(findings.named) == 1 and re.match(r"\S+: line 1 is UTF-16", findings.named[0]):
        return
    assert num_rows + findings.total == len(lines)


@pytest.mark.parametrize("shift", range(0, 40, 3))
def test_a_window_may_end_anywhere_in_an_array(tmp_path, shift):
    odd = {"n": -1.5e-30, "t": [True, None], "é": '\\"\u2028\U0001f600', "x": {}}
    filler = {"text": "x" * (_CHUNK - 100 + shift)}
    rows = [filler, *[odd] * 3, filler, *[odd] * 2]
    content = json.dumps(rows, separators=(",", ":")).encode()
    assert columns_of(written(tmp_path / "x.json", content)) == rows


@pytest.mark.parametrize("shift", range(-40, 40))
def test_a_number_that_the_window_cuts_is_one_finding(tmp_path, shift):
    filler = json.dumps({"text": "x" * (_CHUNK - 60 + shift)})
    path = written(tmp_path / "x.json", f'[{filler},-12345.67890e-10,{{"a": 1}}]'.encode())
    findings = Findings()
    rows = list(iter_rows(path, findings))
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert findings.named == [f"{path}:2: is a number; expected an object with columns"]


@pytest.mark.parametrize("break_after", [None, 5, 200_000])
def test_a_syntax_error_far_in_is_placed_by_line_and_column(tmp_path, break_after):
    row = '{"text": "some words"}'
    content = "[" + f"{row}," * 30_000
    if break_after is not None:
        at = content.index(",", break_after) + 1
        content = content[:at] + "\n" + content[at:]
    wrong = content + '{"text" 5}]'
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(wrong)
    with pytest.raises(InputError) as refused:
        columns_of(written(tmp_path / "x.json", wrong.encode()))
    place = f"line {caught.value.lineno}, column {caught.value.colno}"
    assert refused.value.findings[0].endswith(f":30001: is not JSON: {caught.value.msg} ({place})")


def chunks(num_mib: int, kind: str) -> Iterator[bytes]:
    """A file of many rows, its texts of every length up to 20 KB."""
    source = random.Random(0)
    row = {"instruction": "word " * 20, "output": 'say "yes"\n' * 10}
    size, separator = 0, b"["
    while size < num_mib * 2**20:
        text = json.dumps(row | {"output": row["output"] * source.randrange(200)}).encode()
        line = text + b"\n" if kind == ".jsonl" else separator + text
        size, separator = size + len(line), b",\n "
        yield line
    yield b"" if kind == ".jsonl" else b"]"


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.jsonl.gz"])
def test_a_large_file_is_read_in_little_memory(tmp_path, name):
    path = tmp_path / name
    with gzip.open(path, "wb", 1) if name.endswith(".gz") else path.open("wb") as file:
        num_rows = sum(file.write(chunk) > 1 for chunk in chunks(60, name[3:].removesuffix(".gz")))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == num_rows
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_many_bad_lines_cost_no_more_memory_than_twenty(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"{\n" * 100_000)
    findings = Findings()
    assert list(iter_rows(tmp_path / "bad.jsonl", findings)) == []
    assert (findings.total, len(findings.named)) == (100_000, 20)
