"""Duplicates and leaks: against a slow reference, planted ones, and rows that only look alike."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_texts import text_rows

from finetune.errors import InputError
from finetune.ngrams import GramHasher, fold, units
from finetune.overlap import DuplicateGroup, Overlap, RowText, duplicates, overlap

# --- a second route: tuples of words in sets, every pair of rows compared ---

WORDS = ["ash", "birch", "cedar", "elm", "fir", "larch", "lime", "oak", "pine", "rowan", "yew"]
SENTENCES = [" ".join(random.Random(seed).choices(WORDS, k=5 + seed)) for seed in range(14)]
TEXTS = st.lists(st.sampled_from([*SENTENCES, "Oak.", "oak", "YEW  ash"]), max_size=3).map(" ".join)


@st.composite
def sides(draw):
    texts = draw(st.lists(st.tuples(TEXTS, TEXTS), max_size=12))
    rows = [RowText(f"rows:{number}", *pair) for number, pair in enumerate(texts)]
    cut = draw(st.integers(0, len(rows)))
    return rows[:cut], rows[cut:]


def plain(text: str) -> str:
    words = " ".join(text.lower().split())
    return words.rstrip(" .") or words


def grams(text: str) -> set[tuple[str, ...]]:
    words = plain(text).replace(".", " ").split()
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def expected(train: list[RowText], row: RowText, share: float, limit: int) -> Overlap | None:
    def same(key, kind: str, found: float = 1.0) -> Overlap | None:
        equal = [other.where for other in train if key(other) == key(row)]
        return Overlap(kind, row.where, equal[0], found) if equal else None

    def both(text: RowText) -> tuple[str, str]:
        return plain(text.prompt), plain(text.answer)

    certain = same(lambda r: (r.prompt, r.answer), "exact") or same(both, "folded")
    if certain:
        return certain
    distinct = list({both(other): other for other in reversed(train)}.values())[::-1]
    held = {other: grams(other.prompt) | grams(other.answer) for other in distinct}
    counts = Counter(gram for all_of_it in held.values() for gram in all_of_it)
    limit = min(limit, max(2, len(distinct) // 2))
    is_long = bool(grams(row.answer))
    counted = {g for g in grams(row.answer if is_long else row.prompt) if counts[g] <= limit}
    rivals = [r for r in train if r in held and (is_long or both(r)[1] == both(row)[1])]
    best = max(rivals, key=lambda r: len(held[r] & counted), default=None)
    found = {g for g in counted if (counts[g] if is_long else best and g in held[best])}
    part = len(found) / len(counted) if counted else 0.0
    if found and part >= share:
        return Overlap("near", row.where, best.where, part)
    return same(lambda r: plain(r.prompt), "same prompt", part * is_long) if row.prompt else None


@given(sides(), st.sampled_from([0.05, 0.3, 0.5, 1.0]), st.integers(1, 3))
def test_the_findings_are_those_of_a_comparison_of_all_pairs(both_sides, share, limit):
    train, heldout = both_sides
    reference = [expected(train, row, share, limit) for row in heldout]
    assert overlap(train, heldout, share, limit) == [x for x in reference if x]


@given(sides(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_finding_but_the_row_it_names(both_sides, rng):
    train, heldout = both_sides
    before = {(x.kind, x.where, x.share) for x in overlap(train, heldout)}
    rng.shuffle(train)
    rng.shuffle(heldout)
    assert {(x.kind, x.where, x.share) for x in overlap(train, heldout)} == before


@given(sides())
def test_taking_the_others_of_all_groups_out_leaves_no_row_twice(both_sides):
    rows = [*both_sides[0], *both_sides[1]]
    groups = duplicates(rows)
    surplus = Counter(place for group in groups for place in group.others)
    left = [(plain(r.prompt), plain(r.answer)) for r in rows if r.where not in surplus]
    assert set(surplus.values()) <= {1}
    assert len(left) == len(set(left)) == len({(plain(r.prompt), plain(r.answer)) for r in rows})
    exact = sum(len(group.others) for group in groups if group.kind == "exact")
    assert exact == len(rows) - len({(r.prompt, r.answer) for r in rows})


# --- planted: each kind, in several scripts ---

SPACED = [f"word{number}" for number in range(400)]
HAN = [chr(0x4E00 + 7 * number) for number in range(400)]
THAI = "ประเทศไทยมีแม่น้ำหลายสายและผู้คนปลูกข้าวในที่ราบลุ่มภาคกลางมานานหลายร้อยปีแล้ว"


def some(pool: list[str], num_units: int, seed: int) -> str:
    return (" " if len(pool[0]) > 1 else "").join(random.Random(seed).sample(pool, num_units))


@pytest.mark.parametrize(
    ("train", "heldout", "kind"),
    [
        (("Why?", "So."), ("Why?", "So."), "exact"),
        (("Why?", "So."), ("WHY?", "so."), "folded"),
        (("Why is it?", "So."), ("  Why\tis\n\nit", "So"), "folded"),
        (("Zoë’s café", "naïve"), ("Zoe\u0308’s cafe\u0301", "nai\u0308ve"), "folded"),
        (("５＋１　は？", "６"), ("5+1 は?", "6"), "folded"),
        (("ﬁne", "½"), ("fine", "1⁄2"), "folded"),
        (("Straße", "ΟΔΟΣ"), ("STRASSE", "οδος"), "folded"),
        (("zero\u200bwidth", "\ufeffso\u00adft"), ("zerowidth", "soft"), "folded"),
        (("为什么？", "因为。"), ("为什么", "因为"), "folded"),
        (("हिन्दी क्या है", "भाषा।"), ("हिन्दी क्या है?", "भाषा"), "folded"),
        (("Why?", "So."), ("Why?", "Because."), "same prompt"),
        (("Say it", "-5"), ("Say it", "5"), "same prompt"),
        (("Say it", "5!"), ("Say it", "5"), "same prompt"),
        (("Say it", "..."), ("Say it", "?"), "same prompt"),
        (("", "one text"), ("", "another text"), None),
        (("ab", "c"), ("a", "bc"), None),
    ],
)
def test_each_kind_of_equality(train, heldout, kind):
    found = overlap([RowText("t:1", *train)], [RowText("h:1", *heldout)])
    assert [x.kind for x in found] == ([kind] if kind else [])
    assert all(x.blocks == (kind != "same prompt") and x.other == "t:1" for x in found)


@pytest.mark.parametrize("pool", [SPACED, HAN], ids=["words", "han"])
@given(st.integers(1, 4), st.integers(0, 10**6), st.integers(0, 30))
def test_k_changed_words_are_found_in_a_text_of_12_plus_26_k(pool, num_changed, seed, longer):
    text = some(pool, 12 + 26 * num_changed + longer, seed)
    parts = text.split() if pool is SPACED else list(text)
    for place in random.Random(seed).sample(range(len(parts)), num_changed):
        parts[place] = "changed" if pool is SPACED else "改"
    changed = (" " if pool is SPACED else "").join(parts)
    rows = [RowText(f"t:{i}", f"q {i}", some(pool, 60, seed + i)) for i in range(1, 9)]
    for prompt in ("Another question", ""):
        planted = [*rows, RowText("t:9", prompt and "The question", text)]
        (found,) = overlap(planted, [RowText("h:1", prompt, changed)])
        assert (found.kind, found.other) == ("near", "t:9")
        assert 0.5 <= found.share < 1


def test_thai_is_cut_into_characters_not_into_one_long_word():
    changed = THAI.replace("ภาคกลาง", "ภาคเหนือ")
    (found,) = overlap([RowText("t:1", "", THAI)], [RowText("h:1", "", changed)])
    assert found.kind == "near" and found.share > 0.5


def test_a_short_answer_is_near_by_its_prompt_and_only_in_the_same_row():
    passage = some(SPACED, 80, 1)
    train = [RowText("t:1", passage, "Yes."), RowText("t:2", some(SPACED, 80, 2), "No.")]
    changed = passage.replace(" ", " new ", 1)
    (found,) = overlap(train, [RowText("h:1", changed, "yes")])
    assert (found.kind, found.other) == ("near", "t:1") and found.share > 0.5
    assert overlap(train, [RowText("h:1", changed, "no")]) == []


def test_the_gravest_kind_and_the_first_row_are_named():
    text = some(SPACED, 60, 3)
    rows = [
        ("t:1", "Q", "other"),
        ("t:2", "q", text.upper()),
        ("t:3", "Q", text),
        ("t:4", "Q", text),
    ]
    train = [RowText(*row) for row in rows]
    assert overlap(train, [RowText("h:1", "Q", text)]) == [Overlap("exact", "h:1", "t:3", 1.0)]
    assert overlap(train, [RowText("h:1", "q?", text)]) == [Overlap("folded", "h:1", "t:2", 1.0)]


def test_groups_of_duplicates():
    texts = ["a", "b", "B", "a", "b", "B", "c", " a."]
    groups = duplicates([RowText(f"f:{i}", "", text) for i, text in enumerate(texts)])
    assert groups == [
        DuplicateGroup("exact", "f:0", ("f:3",)),
        DuplicateGroup("folded", "f:0", ("f:7",)),
        DuplicateGroup("exact", "f:1", ("f:4",)),
        DuplicateGroup("folded", "f:1", ("f:2",)),
        DuplicateGroup("exact", "f:2", ("f:5",)),
    ]


# --- rows that share something and are none the less different ---


def blocking(train: list[RowText], heldout: list[RowText], **options) -> list[Overlap]:
    return [x for x in overlap(train, heldout, **options) if x.blocks]


@pytest.mark.parametrize("num_train", [1, 3, 8, 40])
@pytest.mark.parametrize("pool", [SPACED, HAN], ids=["words", "han"])
def test_a_system_prompt_in_every_row_flags_nothing(pool, num_train):
    system = some(pool, 90, 0)
    rows = [
        RowText(f"f:{i}", f"{system}\n{some(pool, 6, i)}", some(pool, 40, 1000 + i))
        for i in range(1, num_train + 20)
    ]
    assert blocking(rows[:num_train], rows[num_train:]) == []


@pytest.mark.parametrize("num_train", [8, 40])
def test_a_system_prompt_and_short_equal_answers_flag_nothing(num_train):
    system = some(SPACED, 90, 0)
    rows = [RowText(f"f:{i}", f"{system}\n{some(SPACED, 6, i)}", "Yes.") for i in range(1, 60)]
    assert blocking(rows[:num_train], rows[num_train:]) == []


def test_a_passage_with_other_questions_and_answers_flags_nothing():
    passage = some(SPACED, 200, 0)
    train = [
        RowText("t:1", f"{passage} Who?", "Ann."),
        RowText("t:2", "Hello", some(SPACED, 50, 1)),
    ]
    heldout = [
        RowText("h:1", f"{passage} Where?", "Rome."),
        RowText("h:2", "Bye", some(SPACED, 50, 2)),
    ]
    assert overlap(train, heldout) == []


def test_one_common_sentence_is_no_leak_and_the_share_decides():
    common = some(SPACED, 20, 0)
    train = [RowText("t:1", "", f"{common} {some(SPACED[:200], 60, 1)}")]
    heldout = [RowText("h:1", "", f"{common} {some(SPACED[200:], 60, 2)}")]
    assert overlap(train, heldout) == []
    (found,) = overlap(train, heldout, share=0.1)
    assert found.share == pytest.approx(8 / 68, rel=0.2)


def test_copies_of_a_row_do_not_make_it_boilerplate():
    text = some(SPACED, 60, 0)
    train = [RowText(f"t:{i}", "Q", text) for i in range(30)]
    train += [RowText(f"t:{i}", "Q", some(SPACED, 60, i)) for i in range(30, 60)]
    (found,) = blocking(train, [RowText("h:1", "Q again", f"{text} indeed")])
    assert (found.kind, found.other) == ("near", "t:0")


def test_boilerplate_counts_neither_as_found_nor_as_missing():
    template, texts = some(SPACED, 100, 0), [some(SPACED, 30, i) for i in range(1, 31)]
    train = [RowText(f"t:{i}", "", f"{template} {text}") for i, text in enumerate(texts)]
    heldout = [RowText("h:1", "", f"{template} {texts[4]} and more")]
    (found,) = overlap(train, heldout)
    assert (found.kind, found.other) == ("near", "t:4")
    assert found.share == pytest.approx(30 / 32)  # the template's own 88 n-grams are left out


def test_more_than_ten_variants_are_boilerplate_and_the_limit_can_be_raised():
    text = some(SPACED, 60, 0)
    train = [RowText(f"t:{i}", f"Q {i}", f"{text} {i}") for i in range(11)]
    train += [RowText(f"t:{i}", f"Q {i}", some(SPACED, 60, i)) for i in range(11, 40)]
    heldout = [RowText("h:1", "Q", f"{text} none")]
    assert overlap(train, heldout) == []
    assert [x.kind for x in overlap(train, heldout, max_rows_with_it=11)] == ["near"]


@pytest.mark.shared
def test_halves_of_real_files(shared):
    """Looked at by hand: the one near row asks the training row's problem backwards."""
    for name, kinds in [
        ("alpaca_en_demo.json", {"exact": 8}),
        ("instructions_1100.json", {"same prompt": 14}),
        ("gsm8k_train.jsonl", {"near": 1}),
    ]:
        rows = text_rows(shared(f"data/{name}"))
        random.Random(0).shuffle(rows)
        half = len(rows) // 2
        assert Counter(x.kind for x in overlap(rows[:half], rows[half:])) == kinds, name


# --- folding, units, hashes ---


@given(st.text())
def test_folding_twice_is_folding_once(text):
    assert fold(fold(text)) == fold(text)


def test_units_of_several_scripts():
    assert units(fold("Don't PANIC, 42 times!")) == ["don", "t", "panic", "42", "times"]
    assert units(fold("我爱Python3和コード")) == [*"我爱", "python3", *"和コード"]
    assert units(fold("हिन्दी भाषा")) == ["हिन्दी", "भाषा"]
    assert units(fold("한국어 문장 — 😀 ok")) == ["한국어", "문장", "ok"]


def test_hashes_do_not_depend_on_the_process():
    code = (
        "from finetune.ngrams import GramHasher; print(GramHasher()('a b c d e f g h i j k l m'))"
    )
    here = str(GramHasher()("a b c d e f g h i j k l m"))
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == here


def test_a_gram_is_its_units_in_their_order():
    letters = list("abcdefghijklm")
    hashes = {int(GramHasher()(" ".join(letters))[0])}
    for i in range(12):
        swapped = [*letters[:i], letters[i + 1], letters[i], *letters[i + 2 :]]
        hashes.add(int(GramHasher()(" ".join(swapped))[0]))
    assert len(hashes) == 13


# --- limits ---


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.1}, {"max_rows_with_it": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="allowed"):
        overlap([], [], **options)


def many(num_rows: int) -> list[RowText]:
    rng = random.Random(0)
    words = [f"w{number}" for number in range(30_000)]
    sums = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))
    texts = [" ".join(rng.choices(words, cum_weights=sums, k=100)) for _ in range(num_rows)]
    return [RowText(f"f:{i}", text[:100], text[100:]) for i, text in enumerate(texts)]


def test_twenty_thousand_rows_in_seconds():
    rows = many(20_000)
    started = time.perf_counter()
    assert overlap(rows[1000:], rows[:1000]) == []
    assert duplicates(rows) == []
    assert time.perf_counter() - started < 30  # 3 s alone on one core


def test_memory_is_some_bytes_for_a_word():
    rows = many(2_000)
    overlap(rows[:10], rows[:10])  # the patterns, made once
    tracemalloc.start()
    overlap(rows, rows[:100])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * 100 * len(rows)  # 200 bytes a word: 400 MB for 20,000 rows
