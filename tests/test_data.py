"""Files to documents: nothing is lost uncounted, the split stays, the ledger equals the batches."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from finetune.data import RunData, load_data, load_heldout
from finetune.errors import CheckFailed, InputError
from finetune.fast.loss import IGNORED
from finetune.ledger import Ledger
from finetune.llama.chat import FORMATS
from finetune.llama.tokenizer import encode_text
from finetune.packing import BatchPlan, PackLoader, PackSampler, TokenizedRows, best_fit
from finetune.prepared import Document

NANO = FORMATS["nano"]
ROWS = Path(__file__).resolve().parents[1] / "assets" / "llama-nano" / "data"


def row(user: str, *answers: str) -> dict[str, object]:
    messages = [{"role": "user", "content": user}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "More"}]
    return {"messages": messages[:-1] if answers else messages}


def rows_of(num_rows: int) -> list[dict[str, object]]:
    return [row(f"How many are {n} and {n}?", f"{2 * n} of them") for n in range(num_rows)]


@pytest.fixture
def file(tmp_path):
    def write(rows: list[dict[str, object]], name: str = "train.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return tmp_path / name

    return write


@pytest.fixture
def loaded(config_of, nano_tokenizer):
    """`loaded(file, "data.max_length=64")`: the run's data."""

    def load(path: Path, *overrides: str, recipe: str = "sft") -> RunData:
        config = config_of(path, *overrides, recipe=recipe)
        return load_data(config, nano_tokenizer, NANO if recipe == "sft" else None)

    return load


def refusal(load, *args, **kwargs) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(*args, **kwargs)
    return caught.value.findings


def lengths_of(documents: list[Document]) -> list[int]:
    return [len(d.input_ids) for d in documents]


def test_documents_are_the_rendered_rows_in_order(loaded, file, nano_tokenizer):
    rows = rows_of(5)
    data = loaded(file(rows))
    for number, (document, given) in enumerate(zip(data.train, rows, strict=True), start=1):
        rendered = NANO.render(nano_tokenizer, given["messages"])
        assert document.input_ids == rendered.input_ids
        assert document.train_mask == rendered.train_mask
        assert document.example.where.endswith(f"train.jsonl:{number}")
        answer = encode_text(nano_tokenizer, given["messages"][1]["content"])
        assert document.num_trained == len(answer) + 1
    assert len(data.heldout) == 0


def test_the_ledger_counts_every_row_and_token(loaded, file, nano_tokenizer):
    kept = [row("Say yes", "yes"), row("Say no", "no", "no, no")]
    dropped = [row("Nobody answers"), row("Blank", " \n"), row("One is blank", "", "b")]
    overlong = [row("x " * 100, "y")]
    path = file([kept[0], *dropped, kept[1], *overlong])
    data = loaded(path, "data.max_length=40")
    ledger = data.ledgers[0]
    masks = [NANO.render(nano_tokenizer, r["messages"]).train_mask for r in (*kept, *overlong)]
    trained, context = (sum(m.count(t) for m in masks[:2]) for t in (True, False))
    assert ledger.as_json() == {
        "rows_read": 6,
        "rows_kept": 2,
        "rows_dropped": 4,
        "documents": 2,
        "tokens": trained + context,
        "tokens_trained": trained,
        "tokens_context": context,
        "tokens_dropped": len(masks[2]),
        "dropped": {
            "without an answer": [f"{path}:2", f"{path}:3"],
            "with an empty answer among its answers": [f"{path}:4"],
            "longer than data.max_length (40 tokens)": [f"{path}:6"],
        },
        "rows_shortened": 0,
        "turns_lost": 0,
        "shortened": [],
        "suspicious": {
            "empty answer": [f"{path}:2", f"{path}:3"],
            "outer white space": [f"{path}:3", f"{path}:6"],
        },
        "duplicates": [],
        "length_median": min(map(len, masks[:2])),
        "length_max": max(map(len, masks[:2])),
        "length_histogram": [(16, 1), (32, 1)],
        "notes": [f"{path}: 6 rows of format messages"],
    }
    text = "\n".join(ledger.lines())
    assert "2 of 6 rows" in text
    assert f"dropped 2: without an answer ({path}:2, {path}:3)" in text


def test_an_empty_answer_is_context_where_only_the_last_is_trained(loaded, file):
    data = loaded(file([row("One is blank", "", "b")]), "data.train_on=last")
    assert data.ledgers[0].num_rows_kept == 1
    assert data.train[0].num_trained == 3 - 1  # "▁b" is one id, and the end of turn


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("packing", [True, False])
def test_ledger_totals_are_the_totals_of_the_batches(loaded, file, train_on, packing):
    rows = rows_of(37) + [row("Two", "first answer", "second one")] * 4
    data = loaded(file(rows), f"data.train_on={train_on}", "data.max_length=64")
    lengths = lengths_of(data.train)
    packs = best_fit(lengths, 64, seed=0) if packing else [[n] for n in range(len(lengths))]
    plan = BatchPlan(packs, per_device=3, accumulation=1, num_ranks=2)
    documents = TokenizedRows(data.train.pair, len(data.train), filler_id=0)
    trained = context = fillers = 0
    for rank in range(2):
        for batch in PackLoader(documents, PackSampler(plan, 0, rank)):
            if batch["document_lengths"] == [1]:
                fillers += 1
                continue
            labels = batch["labels"]
            trained += int((labels != IGNORED).sum())
            context += int((labels == IGNORED).sum())
            assert (batch["input_ids"] == labels)[labels != IGNORED].all()
    ledger = data.ledgers[0]
    assert (trained, context) == (ledger.num_tokens_trained, ledger.num_tokens_context)
    assert trained == sum(d.num_trained for d in data.train)
    assert trained + context == sum(lengths)


TEXTS = ["a b c d e f g h i j k l m n", "one", "  ", "", "two words " * 20]


def test_plain_text_is_bos_text_eos_and_all_but_bos_is_trained(loaded, file, nano_tokenizer):
    path = file([{"text": text} for text in TEXTS])
    data = loaded(path, "data.max_length=512", recipe="pretrain")
    texts = [text for text in TEXTS if text.strip()]
    for document, text in zip(data.train, texts, strict=True):
        assert document.input_ids == [1, *encode_text(nano_tokenizer, text), 2]
        assert document.train_mask == [False] + [True] * (len(document.input_ids) - 1)
    assert data.ledgers[0].dropped == {"without text": [f"{path}:3", f"{path}:4"]}


def test_overlong_rows_are_dropped_and_counted(loaded, file):
    path = file([*rows_of(9), row("word " * 80, "long"), *rows_of(2)])
    everything = loaded(path, "data.max_length=1024")
    data = loaded(path, "data.max_length=64")
    assert len(data.train) == 11
    (dropped,) = data.ledgers[0].dropped.values()
    assert dropped == [f"{path}:10"]
    assert data.ledgers[0].num_tokens_dropped == len(everything.train[9].input_ids)
    assert lengths_of(data.train) == [n for n in lengths_of(everything.train) if n <= 64]


def test_the_longest_row_that_fits_stays(loaded, file):
    path = file(rows_of(20))
    longest = max(lengths_of(loaded(path).train))
    assert len(loaded(path, f"data.max_length={longest}").train) == 20
    assert len(loaded(path, f"data.max_length={longest - 1}").train) < 20


def test_overlong_rows_are_refused_by_name(loaded, file):
    path = file([row("word " * 80, "long")] * 23 + rows_of(3))
    overrides = ("data.max_length=64", "data.on_overflow=error")
    findings = refusal(loaded, path, *overrides)
    assert len(findings) == 21
    assert findings[0].startswith(f"{path}:1: ")
    assert "tokens, over data.max_length 64; raise it, or data.on_overflow=drop" in findings[0]
    assert findings[20] == "and 3 more rows"
    assert len(loaded(file(rows_of(3)), *overrides).train) == 3


def test_overlong_text_is_split_and_no_token_lost(loaded, file):
    path = file([{"text": text} for text in TEXTS])
    whole = loaded(path, "data.max_length=512", recipe="pretrain")
    data = loaded(path, "data.max_length=16", "data.on_overflow=split", recipe="pretrain")
    ledger = data.ledgers[0]
    assert max(lengths_of(data.train)) == 16
    parts: dict[str, list[int]] = {}
    for document in data.train:
        parts.setdefault(document.example.where, []).extend(document.input_ids)
    assert list(parts.values()) == [d.input_ids for d in whole.train]
    assert ledger.num_rows_kept == 3
    assert ledger.as_json()["documents"] == len(data.train) > 3
    assert ledger.as_json()["tokens"] == sum(lengths_of(whole.train))
    # The first token of a piece has nothing of its own before it.
    assert ledger.num_tokens_trained == sum(lengths_of(data.train)) - len(data.train)
    long = [d for d in whole.train if len(d.input_ids) > 16]
    assert f"{len(long)} rows longer than data.max_length (16 tokens) are split" in ledger.notes[-1]


def sides(data: RunData) -> tuple[set[str], set[str]]:
    return tuple({d.example.messages[0]["content"] for d in s} for s in (data.train, data.heldout))


def test_the_split_follows_the_rows_content(loaded, file):
    rows = rows_of(400)
    overrides = ("data.heldout_fraction=0.2",)
    train, heldout = sides(loaded(file(rows), *overrides))
    assert train | heldout == {r["messages"][0]["content"] for r in rows}
    assert not train & heldout
    assert 50 < len(heldout) < 110  # 80 on average, 8 the standard deviation
    shuffled = random.Random(1).sample(rows, len(rows))
    assert sides(loaded(file(shuffled), *overrides)) == (train, heldout)
    grown = rows_of(600)
    more = sides(loaded(file(grown), *overrides))
    assert train < more[0] and heldout < more[1]
    wider = sides(loaded(file(rows), "data.heldout_fraction=0.3"))
    assert heldout < wider[1]
    ledgers = loaded(file(rows), *overrides).ledgers
    assert [ledger.num_rows_read for ledger in ledgers] == [len(train), len(heldout)]


def test_equal_rows_stay_on_one_side(loaded, file):
    data = loaded(file(rows_of(50) * 3), "data.heldout_fraction=0.3")
    assert len(data.heldout) % 3 == len(data.train) % 3 == 0
    train, heldout = sides(data)
    assert not train & heldout


def test_a_fraction_that_holds_nothing_out_is_refused(loaded, file):
    (finding,) = refusal(loaded, file(rows_of(3)), "data.heldout_fraction=0.0001")
    assert finding.startswith("data.heldout_fraction: 0.0001 of 3 rows holds none out")


def test_held_out_rows_that_are_trained_on_stop_the_run_unless_waived(loaded, file):
    train, heldout = file(rows_of(20)), file(rows_of(23)[17:], "heldout.jsonl")
    with pytest.raises(CheckFailed) as caught:
        loaded(train, f"data.heldout={heldout}")
    said = str(caught.value)
    assert "3 held-out rows are trained on" in said and "data.on_overlap: drop" in said
    assert f"{heldout}:3: exact {train}:20" in said and f"{heldout}:4" not in said

    kept = loaded(train, f"data.heldout={heldout}", "data.on_overlap=allow")
    assert len(kept.heldout) == 6
    assert any(n.startswith("3 rows are in the training data too") for n in kept.ledgers[1].notes)

    rest = loaded(train, f"data.heldout={heldout}", "data.on_overlap=drop")
    assert [d.example.where for d in rest.heldout] == [f"{heldout}:{n}" for n in (4, 5, 6)]
    ledger = rest.ledgers[1]
    assert ledger.dropped == {"exact in the training data": [f"{heldout}:{n}" for n in (1, 2, 3)]}
    assert (ledger.num_rows_read, ledger.num_rows_kept) == (6, 3)
    assert ledger.num_tokens_trained == sum(d.num_trained for d in rest.heldout)
    assert ledger.num_documents == 3
    assert ledger.num_tokens_dropped == sum(map(len, (d.input_ids for d in kept.heldout[:3])))
    hashes = [data.as_json()["documents_sha256"] for data in (kept, rest)]
    assert hashes[0] != hashes[1]
    assert [len(data.as_json()["overlap"]) for data in (kept, rest)] == [3, 3]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("Hi")], "data.train: no row is left to train on"),
        ([row("word " * 100, "x")], "data.train: no row is left to train on"),
    ],
)
def test_nothing_to_train_on_is_refused_with_the_reason(loaded, file, rows, says):
    findings = refusal(loaded, file(rows), "data.max_length=64")
    assert findings[0] == says
    assert any("dropped 1" in finding for finding in findings)


def test_held_out_rows_of_which_none_is_left_are_refused(loaded, file):
    heldout = file([row("Hi")], "heldout.jsonl")
    findings = refusal(loaded, file(rows_of(3)), f"data.heldout={heldout}")
    assert findings[0] == "data.heldout: no row is left to score"


def test_findings_of_all_files_come_together(loaded, file, tmp_path):
    bad = file([{"messages": 5}], "bad.jsonl")
    text = file([{"text": "plain"}], "text.jsonl")
    sources = f"data.train=[{tmp_path}/none.jsonl, {bad}, {text}]"
    findings = refusal(loaded, file(rows_of(1)), sources)
    assert [f.split(": ")[0] for f in findings] == [
        f"{tmp_path}/none.jsonl",
        f"{bad}:1",
        str(text),
    ]
    assert findings[2].endswith("holds text; recipe sft trains on conversations")


def test_pretraining_refuses_conversations(loaded, file):
    (finding,) = refusal(loaded, file(rows_of(2)), recipe="pretrain")
    assert "holds messages; recipe pretrain trains on plain text (a text column)" in finding


BROKEN = {
    "unknown roles": ([("human", "a"), ("gpt", "b"), ("assistant", "c")], "role 'human'"),
    "assistant first": ([("assistant", "b")], "turns are assistant"),
    "two system turns": (
        [("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")],
        "a system message stands after the first message",
    ),
    "two users": ([("user", "a"), ("user", "b"), ("assistant", "c")], "user, user, assistant"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_conversations_in_another_order_are_refused_with_their_place(loaded, file, name):
    turns, says = BROKEN[name]
    broken = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = file([*rows_of(2), *[broken] * 25])
    findings = refusal(loaded, path)
    assert len(findings) == 21
    assert findings[0].startswith(f"{path}:3: ")
    assert says in findings[0]
    assert findings[20] == "and 5 more rows"


def test_the_hash_of_documents_sees_ids_masks_and_sides(loaded, file):
    path = file(rows_of(6))
    seen = [loaded(path), loaded(path, "data.train_on=all")]
    seen.append(loaded(file(rows_of(7), "seven.jsonl")))
    for number in (3, 4):
        front, back = file(rows_of(6)[:number], "front.jsonl"), file(rows_of(6)[number:], "b.jsonl")
        seen.append(loaded(front, f"data.heldout={back}"))
    hashes = [data.as_json()["documents_sha256"] for data in seen]
    assert len(set(hashes)) == len(hashes)
    assert loaded(file(rows_of(6))).as_json()["documents_sha256"] == hashes[0]


def test_held_out_files_are_rendered_as_the_runs_own(config_of, loaded, file, nano_tokenizer):
    train, heldout = file(rows_of(4)), file(rows_of(9)[4:], "heldout.jsonl")
    data = loaded(train, f"data.heldout={heldout}", "data.max_length=64")
    documents, ledger = load_heldout(
        heldout, config_of(train, "data.max_length=64"), nano_tokenizer, NANO
    )
    assert documents == data.heldout[:]
    ledger.notes = data.ledgers[1].notes
    assert ledger.as_json() == data.ledgers[1].as_json()


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_every_embedded_row_is_kept(loaded, name):
    path = ROWS / f"{name}.jsonl"
    data = loaded(path, "data.max_length=256")
    num_lines = len(path.read_text().splitlines())
    assert len(data.train) == data.ledgers[0].num_rows_read == num_lines
    assert all(d.num_trained >= 2 for d in data.train)
    assert {"family", "template", "answer"} <= data.train[0].example.extra.keys()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "num_rows"), [("alpaca_en_demo.json", 999), ("instructions_1100.json", 1100)]
)
def test_real_alpaca_files_are_accounted_for(loaded, shared, nano_tokenizer, name, num_rows):
    path = shared(f"data/{name}")
    data = loaded(path, "data.max_length=512")
    ledger = data.ledgers[0]
    given = json.loads(path.read_text())
    assert ledger.num_rows_read == len(given) == num_rows
    assert ledger.num_rows_kept + ledger.num_rows_dropped == num_rows
    answered = [r for r in given if r["output"].strip()]
    assert len(ledger.dropped.get("without an answer", [])) == num_rows - len(answered)
    trained = tokens = 0
    for r in answered:
        question = r["instruction"] + ("\n\n" + r["input"] if r["input"].strip() else "")
        answer = encode_text(nano_tokenizer, r["output"])
        # BOS, two role tokens, two ends of turn
        num_tokens = 5 + len(encode_text(nano_tokenizer, question)) + len(answer)
        if num_tokens <= 512:
            trained += len(answer) + 1
            tokens += num_tokens
    assert ledger.num_tokens_trained == trained
    assert ledger.num_tokens_trained + ledger.num_tokens_context == tokens


def test_an_empty_ledger_is_printed():
    ledger = Ledger("heldout")
    assert ledger.as_json()["length_median"] == 0
    assert "0 of 0 rows" in ledger.lines()[0]
