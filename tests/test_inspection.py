"""The verb `data`: every number is the ledger's, every text stays a text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from page_reader import Element, read_page
from small_runs import trainer_of, write_rows

from finetune import inspection
from finetune.__main__ import main as command
from finetune.ledger import Ledger
from finetune.pages import seen
from finetune.summary import bins_of, explanation_of, histogram_lines, overlap_lines, side_lines

STORY = " ".join(f"w{number}" for number in range(30))
TRAIN = [
    *[
        {"instruction": f"How many are {n} and {n}?", "output": f"{2 * n} of them"}
        for n in range(9)
    ],
    {
        "instruction": '"><img src=x onerror="alert(1)">',
        "output": "\ufffd</script><script>alert(1)",
    },
    {"instruction": "Steer", "output": "\x1b[31mred \x08 "},
    {"instruction": "Nobody answers", "output": ""},
    {"instruction": "Too long", "output": "x " * 300},
    {"instruction": "HOW many are 3 and 3?", "output": "6 of them."},
    {"instruction": "Tell <b>it</b>", "output": STORY},
]
HELDOUT = [
    {"instruction": "How many are 4 and 4?", "output": "8 of them"},
    {"instruction": "how many are 5 and 5", "output": "10 of them"},
    {"instruction": "Once more", "output": f"{STORY} </pre><script>x</script>"},
    {"instruction": "How many are 6 and 6?", "output": "a dozen"},
    {"instruction": "New?", "output": "yes"},
]


@pytest.fixture
def config(bench) -> Path:
    write_rows(bench.train_file, TRAIN)
    write_rows(bench.heldout_file, HELDOUT)
    return bench.config_file


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = command(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_is_the_runs_data_and_what_follows(config, bench, capsys):
    code, out, err = run(capsys, config, "data.on_overlap=drop", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    trainer = trainer_of(bench.load("data.on_overlap=drop"))
    written = json.loads((bench.run_folder().path / "data.json").read_text())
    for finding in found["overlap"]:
        assert finding.pop("blocks") == (finding["kind"] != "same prompt")
    assert {key: found[key] for key in written} == written
    reasons = {r for side in ("train", "heldout") for r in found[side]["suspicious"]}
    assert reasons == set(found["explanations"]) > {"replacement characters", "empty answer"}
    assert all(found["explanations"].values())
    assert found["steps"]["num_packs"] == len(trainer.ours.plan.packs)
    assert found["steps"]["per_epoch"] == trainer.ours.plan.steps_per_epoch
    assert found["steps"]["total"] == 4
    room = found["steps"]["num_packs"] * 128
    assert found["steps"]["empty_share"] == 1 - found["train"]["tokens"] / room
    assert not found["blocked"]
    documented = set(re.findall(r"^\| ([\w, ]+?) \|", inspection.__doc__, re.MULTILINE))
    assert {key for keys in documented for key in keys.split(", ")} - {"key"} == set(found)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_overlap_that_stops_training_is_shown_and_ends_as_training_does(config, capsys, flags):
    code, out, err = run(capsys, config, *flags)
    assert code == 3
    assert command(["train", str(config)]) == 3
    message = capsys.readouterr().err.split("error: ")[-1]
    assert err == f"error: {message}"
    assert message.startswith("3 held-out rows are trained on as well")
    if flags:
        found = json.loads(out)
        assert found["blocked"]
        kinds = [finding["kind"] for finding in found["overlap"]]
        assert kinds == ["exact", "folded", "near", "same prompt"]
    else:
        assert "overlap  3 held-out rows" in out
        assert "same prompt" in out
        assert "steps    " in out


def test_the_text_has_every_reason_with_its_explanation_and_places(config, capsys):
    code, out, _ = run(capsys, config, "data.on_overlap=allow")
    assert code == 0
    assert "\x1b" not in out
    found = json.loads(run(capsys, config, "data.on_overlap=allow", "--json")[1])
    said = " ".join(out.split())
    for side in ("train", "heldout"):
        for reasons in (found[side]["dropped"], found[side]["suspicious"]):
            for reason, places in reasons.items():
                assert f"{len(places)} {reason}" in said
                assert explanation_of(reason) in said
                assert places[0] in said
        rows = f"{found[side]['rows_kept']} of {found[side]['rows_read']} rows kept"
        assert f"{side} {rows}" in said
    assert "train.jsonl:14 (= " in said
    for finding in found["overlap"]:
        assert f"{finding['where']} = {finding['other']}" in said


def test_histograms_hold_every_document_once():
    lengths = {1: 2, 2: 1, 3: 4, 4: 1, 5: 7, 64: 3, 65: 1, 300: 2}
    ledger = Ledger("train", lengths=lengths)
    bins = bins_of(ledger)
    assert sum(count for _, _, count in bins) == ledger.num_documents == sum(lengths.values())
    assert [first for first, _, _ in bins[1:]] == [last + 1 for _, last, _ in bins[:-1]]
    for first, last, count in bins:
        assert count == sum(n for length, n in lengths.items() if first <= length <= last)
    _, *lines = histogram_lines(ledger)
    assert [int(line.split()[-1]) for line in lines] == [count for _, _, count in bins]
    bars = [line.count("█") for line in lines]
    assert max(bars) == 40
    assert list(histogram_lines(Ledger("train"))) == []


def test_shortened_rows_and_lengthy_lists_are_counted():
    ledger = Ledger("train", num_rows_read=9)
    ledger.keep((3, 2))
    ledger.shorten("t:1", 2, 10)
    for number in range(7):
        ledger.drop("why", f"t:{number}", 3)
    said = "\n".join(side_lines(ledger))
    assert "shortened by 2 turns" in said
    assert "dropped 7 rows, 31 tokens" in said
    assert "t:4, and 2 more" in said
    assert "t:5" not in said
    assert next(iter(overlap_lines([], "drop"))).startswith("overlap  0 held-out rows")


def cards(section: Element) -> dict[str, int]:
    boxes = [box for box in section.all("div") if box.inside and box.all("b")]
    found = {}
    for box in boxes:
        if len(box.inside) == 2:
            number, label = box.inside
            found[str(label)] = int(number.text.replace(",", ""))
    return found


@pytest.fixture
def page(config, capsys, tmp_path):
    """The page, and the JSON of the same call."""
    target = tmp_path / "data.html"
    code, out, err = run(capsys, config, "--json", "--html", target)
    assert code == 3
    assert f"page     {target}" in err
    return read_page(target.read_text(encoding="utf-8")), json.loads(out)


def test_the_page_counts_what_the_ledger_counts(page):
    root, found = page
    sections = {s.attributes["id"]: s for s in root.all("section")}
    for side in ("train", "heldout"):
        ledger = found[side]
        assert cards(sections[side]) == {
            "rows read": ledger["rows_read"],
            "rows kept": ledger["rows_kept"],
            "rows dropped": ledger["rows_dropped"],
            "documents": ledger["documents"],
            "tokens": ledger["tokens"],
            "tokens trained": ledger["tokens_trained"],
            "tokens of context": ledger["tokens_context"],
            "tokens dropped": ledger["tokens_dropped"],
        }
        rows = sections[side].all("table", "bars")[0].all("tr")
        counts = [int(row.all("td")[2].text) for row in rows]
        assert counts == [count for _, count in ledger["length_histogram"]]
        assert sum(counts) == ledger["documents"]
        for reasons in (ledger["dropped"], ledger["suspicious"]):
            for reason, places in reasons.items():
                assert f"{len(places)} {reason}" in sections[side].text
                assert all(place in sections[side].text for place in places)
    assert "Training refuses these data: 3 held-out rows" in root.text
    assert f"{found['steps']['per_epoch']} steps an epoch" in sections["packing"].text
    assert "nothing is computed for them" in sections["packing"].text


def test_the_page_shows_suspicious_rows_and_pairs_as_they_are(page):
    root, found = page
    texts = [element.text for element in root.all("div", "text")]
    for row in TRAIN[9:12]:
        assert seen(row["instruction"]) in texts
        assert seen(row["output"]) in texts
    pairs = root.all("article")
    assert len(pairs) == len(found["overlap"]) == 4
    for pair, finding in zip(pairs, found["overlap"], strict=True):
        sides = pair.all("div", "pair")[0].inside
        held, trained = (x for x in sides if isinstance(x, Element))
        assert held.all("div", "place")[0].text == f"held out: {finding['where']}"
        assert trained.all("div", "place")[0].text == f"trained on: {finding['other']}"
        place = int(finding["where"].rsplit(":", 1)[1])
        said = [element.text for element in held.all("div", "text")]
        assert said == [HELDOUT[place - 1][key] for key in ("instruction", "output")]
    assert [bool(pair.all("mark")) for pair in pairs] == [False, True, True, True]
    near = pairs[2].all("mark")
    assert "".join(m.text for m in near) == "Once more </pre><script>x</script>Tell <b>it</b>"


def test_one_side_alone_and_a_mixture(config, bench, capsys, tmp_path):
    other = write_rows(bench.folder / "other.jsonl", TRAIN[:4])
    sources = f"data.train=[{{path: {bench.train_file}, weight: 1}}, {{path: {other}, weight: 1}}]"
    target = tmp_path / "page.html"
    call = (config, sources, "data.heldout=[]", "data.packing=false", "--html", target)
    code, out, _ = run(capsys, *call)
    assert code == 0
    assert "no row is held out" in out
    assert "mixture  source" in out
    assert "packing  off" in out
    root = read_page(target.read_text(encoding="utf-8"))
    assert [s.attributes["id"] for s in root.all("section")] == [
        *("train", "overlap", "packing", "sources")
    ]
    table = root.all("section")[-1].all("tr")
    assert [row.all("td")[0].text for row in table[1:]] == [str(bench.train_file), str(other)]
    assert json.loads(run(capsys, *call[:4], "--json")[1])["steps"]["empty_share"] is None


def test_plain_text_that_is_split(config_of, capsys, tmp_path):
    texts = ["one two three " * 60, "\ufffd <b>"]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    config_of(file, recipe="pretrain")
    overrides = ["data.max_length=64", "data.on_overflow=split"]
    target = tmp_path / "page.html"
    call = (tmp_path / "config.yaml", *overrides, "--json", "--html", target)
    code, out, _ = run(capsys, *call)
    found = json.loads(out)
    assert code == 0
    assert found["chat_format"] is None
    assert found["train"]["documents"] > found["train"]["rows_kept"] == 2
    root = read_page(target.read_text(encoding="utf-8"))
    assert [element.text for element in root.all("div", "role")] == ["text"]
    assert [element.text for element in root.all("div", "text")] == texts[1:]


def test_ranks_share_the_steps(config, capsys):
    call = (config, "data.on_overlap=allow", "--json", "--ranks")
    one, three = (json.loads(run(capsys, *call, n)[1])["steps"] for n in (1, 3))
    assert one["per_epoch"] == -(-one["num_packs"] // 2)
    assert three["per_epoch"] == -(-one["num_packs"] // 6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ranks=0"], "--ranks 0: allowed: 1 or more"),
        (["--html=rows.jsonl"], "ends in .html"),
        (["--html=none/page.html"], "no folder"),
        (["data.max_lenght=4"], "max_length"),
        (["data.train=none.jsonl"], "none.jsonl"),
    ],
)
def test_nonsense_is_refused_in_one_message(config, capsys, flags, says):
    code, out, err = run(capsys, config, *flags)
    assert (code, out) == (2, "")
    assert err.count("error:") == 1
    assert says in err


def test_a_page_that_cannot_be_written_ends_with_4(config, capsys, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.pages.os.replace", refuse)
    code, _, err = run(capsys, config, "data.on_overlap=allow", "--html", tmp_path / "page.html")
    assert code == 4
    assert "No space left" in err
    assert not list(tmp_path.glob("*page.html*"))
