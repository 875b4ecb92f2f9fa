"""Pages hold texts as texts; white space and unseen characters can be seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import pages
from finetune.errors import InputError

pieces = st.lists(st.text(alphabet=" \n\tab\x1b\r\u202e\u200d漢"), max_size=6)


@given(pieces)
def test_parts_are_the_text_piece_by_piece(given_pieces):
    parts = pages.parts_of(given_pieces)
    assert ["".join(t for _, t in piece) for piece in parts] == [
        pages.seen(p) for p in given_pieces
    ]
    whole = "".join(given_pieces)
    together = list(zip(pages.kinds_of(whole), whole, strict=True))
    flat = [(kind, character) for piece in parts for kind, text in piece for character in text]
    assert [x for x in flat if x[0] != "unseen"] == [x for x in together if x[0] != "unseen"]


def test_white_space_is_marked_where_it_is_easily_overlooked():
    text = " a b  c \n d\t\n\ne "
    marks = {"line": "n", "tab": "t", "space": "s", "": "."}
    assert "".join(marks[kind] for kind in pages.kinds_of(text)) == "s...ss.sns.tnn.s"


def test_every_line_break_has_a_mark_of_its_own():
    assert pages.parts_of(["a\n\nb"]) == [[("", "a"), ("line", "\n"), ("line", "\n"), ("", "b")]]


def test_what_steers_a_terminal_or_turns_text_around_becomes_a_number():
    assert pages.seen("a\x1b[2J\u202eb\r\x00") == "a<U+001B>[2J<U+202E>b<U+000D><U+0000>"
    kept = "tab\t, line\n, é, 漢, \u0646\u200c\u0647, 👨\u200d👩"
    assert pages.seen(kept) == kept


@pytest.mark.parametrize("name", ["page.txt", "config.yaml", "page", ".html"])
def test_only_pages_are_written(name, tmp_path):
    with pytest.raises(InputError, match="ends in .html"):
        pages.target_of(str(tmp_path / name))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        pages.target_of(str(tmp_path / "none" / "page.html"))
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="ends in .html"):
        pages.target_of(str(tmp_path / "folder.html"))


def test_a_page_is_replaced_in_one_step(tmp_path):
    target = pages.target_of(str(tmp_path / "page.HTML"))
    pages.write(target, "one")
    pages.write(target, "two é")
    assert target.read_text(encoding="utf-8") == "two é"
    assert list(tmp_path.iterdir()) == [target]
