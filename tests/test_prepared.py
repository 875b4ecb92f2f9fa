"""What is written is what is read, byte for byte and number for number."""

from __future__ import annotations

import datetime
import decimal
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.errors import InputError
from finetune.fast.loss import pack
from finetune.prepared import Document, DocumentWriter, PreparedDocuments
from finetune.shapes import Example

EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
IDS = st.one_of(
    st.integers(0, 1023),
    st.sampled_from(
        [0, 255, 256, 65_534, 65_535, 65_536, 65_537, 128_255, 262_143, 262_144, 300_000]
    ),
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
calls = st.fixed_dictionaries(
    {"name": st.text(min_size=1), "arguments": st.dictionaries(st.text(), json_values, max_size=2)}
)
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": st.text()}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.text()},
        optional={"tool_calls": st.lists(calls, max_size=2), "train": st.booleans()},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": json_values}),
)
examples = st.builds(
    Example,
    where=st.text(),
    messages=st.lists(messages, max_size=4).map(tuple),
    text=st.text(),
    extra=st.dictionaries(st.text(), json_values, max_size=3),
    tools=st.lists(st.text() | st.dictionaries(st.text(), json_values), max_size=2).map(tuple),
    source=st.integers(0, 3),
)


@st.composite
def documents_of(draw, ids=IDS) -> list[Document]:
    """Rows of one to three pieces; the pieces share the row, as those of a split text do."""
    documents = []
    for row in draw(st.lists(examples, max_size=6)):
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            pairs = draw(st.lists(st.tuples(ids, st.booleans()), min_size=1, max_size=5))
            documents.append(Document(row, [i for i, _ in pairs], [t for _, t in pairs]))
    return documents


def written(folder: Path, documents: list[Document], vocab_size: int, block: int = 4) -> Path:
    with DocumentWriter(folder, vocab_size) as writer:
        for start in range(0, len(documents), block):
            writer.add(documents[start : start + block])
    return folder


@pytest.fixture
def stored(tmp_path):
    """`stored(documents, vocab_size)`: the documents, written to a new folder and opened."""
    numbers = itertools.count()

    def write(documents, vocab_size=300_001, block=4):
        folder = written(tmp_path / str(next(numbers)), documents, vocab_size, block)
        return PreparedDocuments(folder)

    return write


def trained_tokens(document: Document) -> int:
    """Counted token by token: a document's first token is predicted from nothing."""
    return len([t for place, t in enumerate(document.train_mask) if t and place > 0])


@EXAMPLES
@given(documents=documents_of(), block=st.integers(1, 5))
def test_what_is_read_is_what_was_written(stored, documents, block):
    found = stored(documents, block=block)
    assert len(found) == len(documents)
    assert list(found) == documents
    assert found.lengths.tolist() == [len(d.input_ids) for d in documents]
    assert found.num_trained.tolist() == [trained_tokens(d) for d in documents]
    assert found.sources.tolist() == [d.example.source for d in documents]
    assert found.used_ids() == sorted({i for d in documents for i in d.input_ids})
    rows = [row for row, _ in itertools.groupby(d.example for d in documents)]
    assert len(list(found.examples())) >= len(rows)  # equal rows may follow each other
    for index, document in enumerate(documents):
        ids, mask = found.pair(index)
        assert (ids.tolist(), mask.tolist()) == (document.input_ids, document.train_mask)
        assert found.example(index) == document.example


@EXAMPLES
@given(documents=documents_of(st.integers(0, 50)), data=st.data())
def test_a_choice_of_a_choice_is_the_same_documents(stored, documents, data):
    found, expected = stored(documents, vocab_size=51), documents
    for _ in range(2):
        places = st.integers(0, max(0, len(expected) - 1))
        chosen = data.draw(st.lists(places, max_size=6 if expected else 0))
        found = found.only(np.array(chosen, np.int64))
        expected = [expected[index] for index in chosen]
        assert list(found) == expected
        assert found.num_trained.tolist() == [trained_tokens(d) for d in expected]
        assert found.lengths.tolist() == [len(d.input_ids) for d in expected]
        assert found.sources.tolist() == [d.example.source for d in expected]
        assert found.used_ids() == sorted({i for d in expected for i in d.input_ids})


@EXAMPLES
@given(documents=documents_of(st.integers(0, 50)), data=st.data())
def test_indices_and_slices_are_a_lists(stored, documents, data):
    found, bound = stored(documents, vocab_size=51), len(documents) + 2
    ends = st.none() | st.integers(-bound, bound)
    steps = st.none() | st.integers(-3, 3).filter(bool)
    chosen = slice(data.draw(ends), data.draw(ends), data.draw(steps))
    assert found[chosen] == documents[chosen]
    for index in range(-bound, bound):
        if -len(documents) <= index < len(documents):
            assert found[index] == documents[index]
        else:
            with pytest.raises(IndexError):
                found[index]


@pytest.mark.parametrize(("vocab_size", "width"), [(65_535, 2), (65_536, 2), (65_537, 4)])
def test_an_id_has_two_bytes_where_the_vocabulary_fits(stored, vocab_size, width):
    ids = [0, vocab_size - 1, 1, vocab_size - 1]
    found = stored([Document(Example("a:1"), ids, [True] * 4)], vocab_size)
    assert found[0].input_ids == ids
    assert found.pair(0)[0].dtype == np.dtype(f"<u{width}")
    assert (found._folder / "ids.bin").stat().st_size == width * 4


def test_an_id_that_does_not_fit_is_not_wrapped_round(tmp_path):
    with pytest.raises(OverflowError):
        written(tmp_path / "side", [Document(Example("a:1"), [1, 65_536], [True] * 2)], 65_536)
    assert not (tmp_path / "side" / "side.json").exists()
    with pytest.raises(InputError, match=r"side\.json: no such file"):
        PreparedDocuments(tmp_path / "side")


def test_an_empty_side_is_read(stored):
    found = stored([])
    assert (len(found), list(found), found[:], found.used_ids()) == (0, [], [], [])
    assert list(found.examples()) == []
    for numbers in (found.lengths, found.num_trained, found.sources):
        assert numbers.shape == (0,) and numbers.dtype == np.int64
    assert len(found.only(np.zeros(0, np.int64))) == 0
    with pytest.raises(IndexError):
        found[0]


@pytest.mark.parametrize("trained", [True, False])
def test_a_document_of_one_token_trains_nothing(stored, trained):
    found = stored([Document(Example("a:1"), [7], [trained])] * 2)
    assert found.num_trained.tolist() == [0, 0]
    assert found[1].train_mask == [trained], "the mask itself is kept"


def test_the_pieces_of_a_row_share_its_line(stored):
    """Else a text of n pieces is on disk n times: a book of 5 MB as 3 GB."""
    long, other = Example("a:1", text="x" * 1000), Example("a:2", text="y" * 10)
    rows = [long] * 50 + [other] + [long] * 2  # blocks of 4 cut the pieces
    found = stored([Document(row, [n], [True]) for n, row in enumerate(rows)])
    assert (found._folder / "rows.jsonl").stat().st_size < 2500
    assert [found.example(n) for n in range(len(rows))] == rows
    assert list(found.examples()) == [long, other, long]
    assert list(found.only(np.array([49, 50, 52])).examples()) == [long, other, long]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (datetime.datetime(2020, 2, 1, 3), "2020-02-01 03:00:00"),
        (datetime.date(2020, 2, 1), "2020-02-01"),
        (datetime.timedelta(1), "1 day, 0:00:00"),
        (decimal.Decimal("1.50"), "1.50"),
        (b"\xff", "b'\\xff'"),
        ({datetime.date(2020, 2, 1): [b"a"]}, {"2020-02-01": ["b'a'"]}),
        ({3: {"a": (1, None)}, "b": b""}, {"3": {"a": [1, None]}, "b": "b''"}),
    ],
)
def test_columns_that_json_has_no_form_for_are_kept_as_text(stored, value, kept):
    """Parquet has them; groups of an evaluation are named by str() anyway."""
    row = Example("a.parquet:1", text="t", extra={"x": value, "answer": 5})
    assert stored([Document(row, [1], [True])]).example(0).extra == {"x": kept, "answer": 5}


@example(documents=[])
@EXAMPLES
@given(documents=documents_of())
def test_the_files_do_not_depend_on_the_blocks(tmp_path_factory, documents):
    folders = [
        written(tmp_path_factory.mktemp("blocks") / "side", documents, 300_001, block)
        for block in (1, 3)
    ]
    one, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert one == other
    assert set(one) == {
        *("ids.bin", "mask.bin", "rows.jsonl", "ends.bin", "table.bin", "side.json")
    }


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_a_row_packed_from_disk_is_the_row_packed_from_lists(stored, vocab_size):
    """Ids of two bytes have no sign: nothing may overflow on the way to labels."""
    documents = [
        Document(Example("a:1"), [65_535, 0, 65_535], [True, True, False]),
        Document(Example("a:2"), [3], [True]),
        Document(Example("a:3"), [1, 32_768], [False, True]),
    ]
    found = stored(documents, vocab_size)
    ours = pack([found.pair(index) for index in range(3)])
    lists = pack([(d.input_ids, d.train_mask) for d in documents])
    assert ours.document_lengths == lists.document_lengths == [3, 1, 2]
    for name in ("input_ids", "position_ids", "labels"):
        assert getattr(ours, name).tolist() == getattr(lists, name).tolist()
    assert ours.labels.tolist() == [[-100, 0, -100, -100, -100, 32_768]]
