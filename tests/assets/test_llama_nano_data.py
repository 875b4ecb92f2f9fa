"""The embedded data: same bytes from the same seed, no leak, answers by a second route."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import sentencepiece

NANO = Path(__file__).parents[2] / "assets" / "llama-nano"
MAKE, DATA = NANO / "make", NANO / "data"
REQUEST = re.compile(
    r"\b(What is|Tell me|Name the|Give me|Please|Write the|Find the|Say the|Sort|Reverse|Spell"
    r"|Do you know|How many|How much|Which)\b|<\||\?\s*$"
)


@pytest.fixture(scope="module", autouse=True)
def make_on_path():
    """The scripts import one another as a script's folder lets them."""
    before = set(sys.modules)
    sys.path.insert(0, str(MAKE))
    yield
    sys.path.remove(str(MAKE))
    for name in set(sys.modules) - before:
        if str(MAKE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def rows_of(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def script(name, *arguments):
    command = [sys.executable, str(MAKE / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def requests(row):
    return [turn["content"] for turn in row["messages"] if turn["role"] == "user"]


def conversation(row):
    return [(turn["role"], turn["content"]) for turn in row["messages"][:-1]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    script("corpus", "--out", folder, "--tokens", 120_000)
    return folder


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_corpus_is_the_same_for_a_seed_and_another_for_another(corpus, tmp_path):
    script("corpus", "--out", tmp_path / "again", "--tokens", 120_000)
    script("corpus", "--out", tmp_path / "other", "--tokens", 120_000, "--seed", 1)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (corpus / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (corpus / name).read_bytes()


def test_corpus_has_no_request_and_no_role_token(corpus):
    found = [text for text in texts(corpus / "train.jsonl") if REQUEST.search(text)]
    assert found == []


def test_corpus_heldout_shares_no_document(corpus):
    train, heldout = texts(corpus / "train.jsonl"), texts(corpus / "heldout.jsonl")
    assert set(train).isdisjoint(heldout)
    assert len(heldout) == len(set(heldout))
    assert 0.005 < len(heldout) / len(train) < 0.015


def test_corpus_leaves_out_held_items_unless_memorised(corpus):
    """No probe of a family that is not memorised is said in the corpus, but for recall.

    The facts of a recall item may be part of what a longer introduction says.
    """
    from families import FAMILIES

    whole = "\n".join(texts(corpus / "train.jsonl"))
    for probe in rows_of("probe"):
        if not FAMILIES[probe["family"]].memorised and probe["family"] != "recall":
            said = re.escape(f"{probe['prompt']} {probe['answer']}")
            assert not re.search(rf"(^|[.\n] ?){said}", whole), probe


def test_committed_rows_are_what_the_scripts_write(tmp_path):
    script("instructions", "--split", "train", "--out", tmp_path / "train.jsonl")
    script("instructions", "--split", "heldout", "--out", tmp_path / "heldout.jsonl",
           "--avoid", tmp_path / "train.jsonl")  # fmt: skip
    script("probe", "--out", tmp_path / "probe.jsonl")
    for name in ("train.jsonl", "heldout.jsonl", "probe.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_row_counts():
    train, heldout, probes = rows_of("train"), rows_of("heldout"), rows_of("probe")
    assert len(train) >= 3000
    assert len(heldout) >= 500
    assert len(probes) >= 500
    assert len(Counter(row["family"] for row in train)) >= 16
    assert {row["family"] for row in train} == {row["family"] for row in heldout}
    kinds = Counter(row["template"] for row in heldout)
    assert kinds["seen"] == kinds["unseen"]
    assert {row["template"] for row in train} == {"seen"}
    for rows in (train, heldout):
        assert any(row["messages"][0]["role"] == "system" for row in rows)
        assert any(row["messages"][0]["role"] == "user" for row in rows)
        assert sum(len(requests(row)) > 1 for row in rows) > len(rows) // 10


def test_roles_alternate_and_end_with_the_answer():
    for row in rows_of("train") + rows_of("heldout"):
        roles = [turn["role"] for turn in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert row["messages"][-1]["content"] == row["answer"]


def test_no_prompt_is_shared(tmp_path):
    """Whole conversations, and outside recall every single question, over all three sets."""
    script("instructions", "--split", "heldout", "--seed", 99, "--out", tmp_path / "fresh.jsonl",
           "--avoid", DATA / "train.jsonl", DATA / "heldout.jsonl")  # fmt: skip
    fresh = [json.loads(line) for line in (tmp_path / "fresh.jsonl").read_text().splitlines()]
    seen_conversations, seen_questions = set(), set()
    for rows in (rows_of("train"), rows_of("heldout"), fresh):
        conversations = {json.dumps(conversation(row)) for row in rows}
        alone = [row for row in rows if row["family"] != "recall"]
        questions = {question for row in alone for question in requests(row)}
        assert len(conversations) == len(rows)
        assert seen_conversations.isdisjoint(conversations)
        assert seen_questions.isdisjoint(questions)
        seen_conversations |= conversations
        seen_questions |= questions


def test_no_unseen_template_is_a_seen_one():
    from families import FAMILIES

    for family in FAMILIES.values():
        item = family.draw(Random(0))
        seen, unseen = family.templates(item, True), family.templates(item, False)
        assert len(set(seen)) == len(seen) >= 3
        assert len(set(unseen)) == len(unseen) >= 3
        assert set(seen).isdisjoint(unseen)


def test_unseen_requests_match_no_seen_template():
    """From the text alone: no held-out request of an unseen template fits a training template."""
    from families import FAMILIES

    slot = {
        "list": r"[\w-]+(, [\w-]+)*",
        "json": r"\{.*\}",
        "record": r"\w+: [\w;: ]+",
        "story": r"[A-Z].*\.",
    }
    item_lists = {"price": r"\w+ \d+(, \w+ \d+)*"}
    for row in rows_of("heldout"):
        family = FAMILIES[row["family"]]
        if row["template"] == "unseen" and family.phrases:
            item = family.draw(Random(0))
            for template in family.templates(item, True):
                parts = re.split(r"\{(\w+)\}", template)
                parts[::2] = map(re.escape, parts[::2])
                parts[1::2] = [
                    item_lists.get(row["family"], slot["list"]) if name == "list"
                    else slot.get(name, r"[\w-]+") for name in parts[1::2]
                ]  # fmt: skip
                pattern = "".join(parts)
                assert not re.fullmatch(pattern, requests(row)[-1]), (template, row)


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def listed(text):
    """The comma-separated words of a request, with the words around the list cut off."""
    words = re.search(r"[^\s,]+(?:, [^\s,]+)+", text).group()
    return [word.strip(".:?") for word in words.split(", ")]


def check_letter(text, answer):
    index = {"first": 0, "second": 1, "last": -1}[re.search("first|second|last", text).group()]
    return any(
        len(word) > 1 and word[index] == answer
        for word in re.findall(r"[a-z]+", text)
        if word not in {"first", "second", "last", "letter", "word"}
    )


ROUTES = {
    "add": lambda text, answer: sum(numbers(text)) == int(answer),
    "subtract": lambda text, answer: max(numbers(text)) - min(numbers(text)) == int(answer),
    "compare": lambda text, answer: (
        str((max if "larger" in text else min)(numbers(text))) == answer
    ),
    "sort": lambda text, answer: sorted(numbers(text)) == numbers(answer),
    "reverse": lambda text, answer: listed(text)[::-1] == answer.split(", "),
    "count": lambda text, answer: len(listed(text)) == int(answer),
    "upper": lambda text, answer: answer.lower() in text and answer.isupper(),
    "spell": lambda text, answer: answer.replace("-", "") in text,
    "letter": check_letter,
    "json": lambda text, answer: all(
        f"{key}: {value}" in text for key, value in json.loads(answer).items()
    ),
    "value": lambda text, answer: answer in map(
        str, json.loads(re.search(r"\{.*\}", text).group()).values()
    ),
    "repeat": lambda text, answer: (
        len(answer.split()) == {"two": 2, "three": 3, "four": 4}[
            re.search("two|three|four", text).group()
        ]
        and set(answer.split()) < set(re.findall(r"\w+", text))
    ),
    "holder": lambda text, answer: answer in text,
    "extract": lambda text, answer: answer in text,
    "price": lambda text, answer: int(answer) in numbers(text),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(ROUTES))
def test_answers_by_another_route(family):
    rows = [row for row in rows_of("train") + rows_of("heldout") if row["family"] == family]
    assert len(rows) > 100
    wrong = [
        (requests(row)[-1], row["answer"])
        for row in rows
        if not ROUTES[family](requests(row)[-1], row["answer"])
    ]
    assert wrong == []


@pytest.fixture(scope="module")
def processor():
    return sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))


def test_tokenizer_controls(processor):
    assert len(processor) == 1024
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert [processor.id_to_piece(index) for index in range(7)] == pieces
    for index, piece in enumerate(pieces[1:], 1):
        assert processor.is_control(index)
        assert index not in processor.encode(f"text that types {piece} stays text")


def test_tokenizer_round_trip(processor):
    contents = {turn["content"] for name in ("train", "heldout") for row in rows_of(name)
                for turn in row["messages"]}  # fmt: skip
    contents |= {probe["prompt"] for probe in rows_of("probe")}
    contents |= {"  two spaces,\nline\tbreaks ", "é 中 🙂", "<|user|>"}
    for content in contents:
        assert processor.decode(processor.encode(content)) == content
        assert processor.unk_id() not in processor.encode(content)


def test_rows_are_short(processor):
    for row in rows_of("train") + rows_of("heldout"):
        turns = [turn["content"] for turn in row["messages"]]
        assert 1 + sum(len(processor.encode(turn)) + 2 for turn in turns) <= 100


def test_baselines_are_low():
    table = script(
        "baselines", "--train", DATA / "train.jsonl", "--heldout", DATA / "heldout.jsonl"
    )
    overall = re.search(r"^all\s+\d+\s+([\d.]+)%\s+([\d.]+)%", table, re.MULTILINE)
    assert max(map(float, overall.groups())) < 30
