"""What the ledger says, the documents and the batches have: to the token, under every policy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from data_cache import chat, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.batching import plan_batches
from finetune.data import RunData, load_data
from finetune.errors import InputError
from finetune.fast.loss import IGNORED
from finetune.ledger import Ledger
from finetune.llama.chat import FORMATS
from finetune.llama.tokenizer import encode_text
from finetune.packing import FILLER, PackLoader, PackSampler, TokenizedRows
from finetune.prepared import Document
from finetune.shapes import Example

NANO = FORMATS["nano"]
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LIMIT = 24
masks = st.lists(st.booleans(), min_size=1, max_size=40)
rows_of_masks = st.lists(st.lists(masks, min_size=1, max_size=3), max_size=6)


def size_of(mask: list[bool]) -> tuple[int, int]:
    document = Document(Example("x:1"), [0] * len(mask), mask)
    assert document.size == (len(mask), sum(mask[place] for place in range(1, len(mask))))
    return document.size


def ledger_of(kept, dropped=()) -> Ledger:
    ledger = Ledger("heldout")
    for row in kept:
        ledger.keep(*map(size_of, row))
    for row in dropped:
        ledger.drop("exact", "x:1", sum(map(len, row)))
    return ledger


@given(kept=rows_of_masks, taken=rows_of_masks)
def test_a_row_taken_back_was_never_kept(kept, taken):
    ledger = ledger_of([*kept, *taken])
    for row in taken:
        ledger.take_back("exact", "x:1", *map(size_of, row))
    assert ledger.as_json() == ledger_of(kept, taken).as_json()
    assert ledger.lines() == ledger_of(kept, taken).lines()


@given(kept=rows_of_masks)
def test_totals_lengths_and_bins_are_those_of_the_masks(kept):
    ledger = ledger_of(kept)
    documents = [mask for row in kept for mask in row]
    trained = sum(mask[place] for mask in documents for place in range(1, len(mask)))
    assert ledger.num_tokens_trained == trained
    assert ledger.num_tokens_context == sum(map(len, documents)) - trained
    assert (ledger.num_rows_kept, ledger.num_documents) == (len(kept), len(documents))
    lengths = sorted(map(len, documents))
    assert ledger.length_at(1.0) == (lengths[-1] if lengths else 0)
    assert ledger.length_at(0.5) == (lengths[(len(lengths) - 1) // 2] if lengths else 0)
    assert sum(count for _, count in ledger.histogram()) == len(documents)
    for end, count in ledger.histogram():
        assert count == sum(end // 2 < length <= end for length in lengths)
    again = Ledger.from_state(json.loads(json.dumps(ledger.state())))
    assert again == ledger


words = st.sampled_from(["one", "two three", "a b c d e f", "", " ", "x" * 9])
rows = st.builds(chat, words, words, words) | st.builds(chat, words) | st.builds(chat, words, words)
files = st.lists(rows, min_size=1, max_size=12)


def load(config_of, tokenizer, path: Path, *overrides: str, recipe: str = "sft"):
    config = config_of(path, f"data.max_length={LIMIT}", *overrides, recipe=recipe)
    return config, load_data(config, tokenizer, NANO if recipe == "sft" else None)


def check_totals(config, data: RunData, num_ranks: int = 2) -> None:
    """Ledger, documents and one epoch of batches say the same."""
    ledger = data.ledgers[0]
    lengths = [len(d.input_ids) for d in data.train]
    assert ledger.num_documents == len(lengths)
    assert ledger.num_tokens_trained == sum(d.num_trained for d in data.train)
    assert ledger.num_tokens_trained + ledger.num_tokens_context == sum(lengths)
    assert Counter(lengths) == Counter(ledger.lengths)
    plan = plan_batches(config, data, num_ranks)
    pairs = TokenizedRows(data.train.pair, len(data.train), filler_id=0)
    trained = tokens = 0
    for rank in range(num_ranks):
        chosen = plan.epoch(0, 0, rank)
        for batch, indices in zip(
            PackLoader(pairs, PackSampler(plan, 0, rank)), chosen, strict=True
        ):
            if indices != [FILLER]:
                trained += int((batch["labels"] != IGNORED).sum())
                tokens += batch["labels"].numel()
    assert trained == ledger.num_tokens_trained
    assert tokens - trained == ledger.num_tokens_context


def fate(given_row, train_on: str, policy: str, tokenizer) -> tuple[str, int, int, int]:
    """What becomes of a row of one or two exchanges: reason or kept; tokens trained, kept, lost."""
    messages = given_row["messages"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers or not answers[-1].strip():
        return "without an answer", 0, 0, 0
    if train_on != "last" and not all(a.strip() for a in answers):
        return "with an empty answer among its answers", 0, 0, 0
    sizes = [len(encode_text(tokenizer, m["content"])) + 2 for m in messages]  # role, end of turn
    first, whole = 0, 1 + sum(sizes)
    if whole > LIMIT and policy == "truncate_history" and len(answers) == 2:
        first = 2
    length = 1 + sum(sizes[first:])
    if length > LIMIT:
        return "too long", 0, 0, whole
    spans = [size - 1 for size in sizes[first + 1 :: 2]]
    trained = {"assistant": sum(spans), "last": spans[-1], "all": length - 1}[train_on]
    return "kept" if not first else "shortened", trained, length, whole - length


def check_refusal(error: InputError, num_refused: int, num_kept: int) -> None:
    """Each row that is refused has its finding; without one, nothing was left to train on."""
    if num_refused:
        assert len(error.findings) == num_refused
    else:
        assert num_kept == 0 and "no row is left to train on" in error.findings[0]


@EXAMPLES
@given(
    given_rows=files,
    train_on=st.sampled_from(["assistant", "last", "all"]),
    policy=st.sampled_from(["drop", "truncate_history", "error"]),
    packing=st.booleans(),
)
def test_every_row_has_its_fate(
    config_of, tmp_path, nano_tokenizer, given_rows, train_on, policy, packing
):
    path = write_lines(tmp_path / "train.jsonl", given_rows)
    overrides = (f"data.train_on={train_on}", f"data.on_overflow={policy}")
    fates = [fate(row, train_on, policy, nano_tokenizer) for row in given_rows]
    counts = Counter(reason for reason, *_ in fates)
    kept = counts["kept"] + counts["shortened"]
    try:
        config, data = load(
            config_of, nano_tokenizer, path, *overrides, f"data.packing={str(packing).lower()}"
        )
    except InputError as error:
        check_refusal(error, counts["too long"] if policy == "error" else 0, kept)
        return
    assert kept and not (policy == "error" and counts["too long"])
    ledger = data.ledgers[0]
    assert ledger.num_rows_read == len(given_rows)
    assert ledger.num_rows_kept == kept
    assert ledger.num_rows_kept + ledger.num_rows_dropped == ledger.num_rows_read
    assert {reason.split(" than")[0].replace("longer", "too long"): len(places)
            for reason, places in ledger.dropped.items()} == {
        reason: n for reason, n in counts.items() if reason not in ("kept", "shortened")
    }  # fmt: skip
    assert ledger.num_tokens_trained == sum(trained for _, trained, _, _ in fates)
    assert ledger.num_tokens_dropped == sum(lost for *_, lost in fates)
    shortened = [f"{path}:{n}" for n, (reason, *_) in enumerate(fates, 1) if reason == "shortened"]
    assert ledger.shortened == shortened
    assert ledger.num_turns_lost == 2 * len(shortened)
    check_totals(config, data)


@EXAMPLES
@given(
    texts=st.lists(words | st.text(max_size=120), min_size=1, max_size=8),
    policy=st.sampled_from(["drop", "split", "error"]),
)
def test_every_text_has_its_fate(config_of, tmp_path, nano_tokenizer, texts, policy):
    path = write_lines(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    said = [text for text in texts if text.strip()]
    whole = [[1, *encode_text(nano_tokenizer, text), 2] for text in said]
    long = [ids for ids in whole if len(ids) > LIMIT]
    kept = whole if policy == "split" else [ids for ids in whole if len(ids) <= LIMIT]
    try:
        config, data = load(
            config_of, nano_tokenizer, path, f"data.on_overflow={policy}", recipe="pretrain"
        )
    except InputError as error:
        check_refusal(error, len(long) if policy == "error" else 0, len(kept))
        return
    ledger = data.ledgers[0]
    assert (ledger.num_rows_read, ledger.num_rows_kept) == (len(texts), len(kept))
    assert ledger.num_rows_kept + ledger.num_rows_dropped == len(texts)
    assert ledger.num_tokens_dropped == (sum(map(len, long)) if policy == "drop" else 0)
    expected = [ids[n : n + LIMIT] for ids in kept for n in range(0, len(ids), LIMIT)]
    assert [d.input_ids for d in data.train] == expected
    assert ledger.num_rows_split == (len(long) if policy == "split" else 0)
    check_totals(config, data)


@pytest.mark.parametrize("times", [1, 2])
def test_leaks_are_taken_back_row_by_row(config_of, tmp_path, nano_tokenizer, times):
    """Also where a file is named twice, and two rows have one place."""
    rows = [chat(f"{n} and {n}", f"{2 * n}") for n in range(10)]
    train = write_lines(tmp_path / "train.jsonl", rows[:6])
    heldout = write_lines(tmp_path / "heldout.jsonl", rows[4:])
    named = ", ".join([str(heldout)] * times)
    _, data = load(
        config_of, nano_tokenizer, train, f"data.heldout=[{named}]", "data.on_overlap=drop"
    )
    check_heldout(data, num_read=6 * times, num_kept=4 * times)


def test_the_pieces_of_a_text_that_leaks_go_together(config_of, tmp_path, nano_tokenizer):
    texts = [{"text": " ".join(str(n * k) for k in range(60))} for n in range(1, 6)]
    train = write_lines(tmp_path / "train.jsonl", texts[:3])
    heldout = write_lines(tmp_path / "heldout.jsonl", texts[2:])
    overrides = (f"data.heldout={heldout}", "data.on_overlap=drop", "data.on_overflow=split")
    _, data = load(config_of, nano_tokenizer, train, *overrides, recipe="pretrain")
    assert {d.example.text for d in data.heldout} == {t["text"] for t in texts[3:]}
    check_heldout(data, num_read=3, num_kept=2)


def check_heldout(data: RunData, num_read: int, num_kept: int) -> None:
    ledger, documents = data.ledgers[1], list[Document](data.heldout)
    assert ledger.num_rows_read == num_read
    assert ledger.num_rows_kept == num_kept
    assert ledger.num_rows_dropped == num_read - num_kept
    assert ledger.num_documents == len(documents)
    assert ledger.num_tokens_trained == sum(d.num_trained for d in documents)
    tokens = ledger.num_tokens_trained + ledger.num_tokens_context
    assert tokens == sum(len(d.input_ids) for d in documents)
    assert Counter(ledger.lengths) == Counter(len(d.input_ids) for d in documents)
