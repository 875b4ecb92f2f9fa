"""What preview shows is what is trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from page_reader import read_page
from small_runs import trainer_of, write_rows

from finetune import preview
from finetune.__main__ import main as command
from finetune.data import load_data
from finetune.errors import InputError
from finetune.fast.loss import IGNORED, pack
from finetune.llama.chat import FORMATS
from finetune.pages import seen
from finetune.prepared import Document
from finetune.shapes import Example
from finetune.tokens import control_ids, labels_of

ROWS = Path(__file__).resolve().parents[1] / "assets" / "llama-nano" / "data" / "train.jsonl"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour. [[not this]]"},
    {"role": "assistant", "content": "Blue, i.e. the sky"},
    {"role": "user", "content": "Another"},
    {"role": "assistant", "content": "Red"},
]


@pytest.fixture
def document(nano_tokenizer) -> Document:
    rendered = FORMATS["nano"].render(nano_tokenizer, TALK)
    return Document(Example("t.jsonl:1"), rendered.input_ids, rendered.train_mask)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_labels_are_the_batchs(document):
    for mask in (document.train_mask, [True] * len(document.input_ids)):
        shown = labels_of(Document(document.example, document.input_ids, mask))
        assert shown == pack([(document.input_ids, mask)]).labels[0].tolist()
        assert shown[0] == IGNORED


def test_brackets_hold_the_answers_and_their_end(document, nano_tokenizer):
    shown = preview.show_example(nano_tokenizer, document, io.StringIO())
    head, text = shown.split("\n", 1)
    counts = f"{document.num_trained} of {len(document.input_ids)} tokens trained"
    marks = "trained tokens between [[ and ]], control tokens between ⟨ and ⟩"
    assert head == f"example  t.jsonl:1, {counts}, {marks}:"
    assert "[[Blue, i.e. the sky⟨</s>⟩]]" in text.replace("[[ ", "[[")
    assert "[[Red⟨</s>⟩]]" in text.replace("[[ ", "[[")
    assert text.count("[[") == 3  # two answers, and the user's own brackets
    assert "\x1b" not in shown


def test_colour_is_for_terminals_without_no_color(document, nano_tokenizer, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = preview.show_example(nano_tokenizer, document, Terminal())
    green = [part.split("\x1b[0m")[0] for part in shown.split("\x1b[32m")[1:]]
    end = "\x1b[7m</s>"  # green as well, and reversed
    assert [text.strip() for text in green] == ["Blue, i.e. the sky", end, "Red", end]
    assert "trained tokens green" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in preview.show_example(nano_tokenizer, document, Terminal())


HOSTILE = [
    '"><img src=x onerror="alert(1)">',
    "</script><script>alert(1)</script></style>&amp;</div>",
    " two  spaces\n\n\tand\r\nlines \n",
    "\x1b[31mred\x1b]0;title\x07 \u202ebidi",
    "漢字 🦙 &lt;b&gt; {{ 7 * 7 }} {% raw %}",
]


@pytest.fixture
def hostile(bench) -> Path:
    """A config whose rows would break a page, if texts were taken for anything else."""
    write_rows(bench.train_file, [{"instruction": text, "output": text} for text in HOSTILE])
    return bench.config_file


@pytest.fixture
def run(config_of, tmp_path, capsys):
    """`run("--json")`: standard output and standard error of the verb."""

    def call(*arguments: str) -> tuple[str, str]:
        config_of(ROWS)
        capsys.readouterr()
        overrides = ["data.max_length=256", "data.chat_format=nano"]
        assert preview.main([str(tmp_path / "config.yaml"), *overrides, *arguments]) == 0
        return capsys.readouterr()

    return call


def test_json_rows_are_the_runs_documents(run, config_of, nano_tokenizer):
    out, err = run("--json", "--rows", "40")
    rows = json.loads(out)["rows"]
    data = load_data(config_of(ROWS, "data.max_length=256"), nano_tokenizer, FORMATS["nano"])
    assert len(rows) == 40
    for row, document in zip(rows, data.train, strict=False):
        packed = pack([(document.input_ids, document.train_mask)])
        assert row["input_ids"] == packed.input_ids[0].tolist()
        assert row["labels"] == packed.labels[0].tolist()
        assert row["text"] == nano_tokenizer.decode(document.input_ids)
        assert row["where"] == document.example.where
        messages = document.example.messages
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        trained = nano_tokenizer.decode([i for i in row["labels"] if i != IGNORED])
        assert trained.replace(" ", "") == "".join(f"{a}</s>" for a in answers).replace(" ", "")
    assert "train" in err and "rows" in err


def test_text_goes_to_standard_output_and_the_ledger_to_standard_error(run):
    out, err = run("--rows", "3")
    assert out.count("trained tokens between [[ and ]]") == 3
    assert "\x1b" not in out
    assert "tokens:" in err and "example" not in err


@pytest.mark.parametrize("number", ["0", "-1"])
def test_fewer_than_one_row_is_refused(run, number):
    with pytest.raises(InputError, match=f"--rows {number}: allowed: 1 or more"):
        run(f"--rows={number}")


NONSENSE = {
    "--packs=0": "--packs 0: allowed: 1 or more",
    "--packs=2 --rows=3": "neither --rows nor --where",
    "--packs=2 --where=x": "neither --rows nor --where",
    "--where=": "--where '': allowed",
    "--raw --json": "--raw is for the terminal",
    "--html=page.txt": "ends in .html",
    "--where=none.jsonl:7": "no document's place has it; the first is",
}


@pytest.mark.parametrize("flags", NONSENSE)
def test_nonsense_is_refused_in_one_message(flags, bench, capsys):
    assert command(["preview", str(bench.config_file), *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    assert NONSENSE[flags] in captured.err


def test_where_chooses_rows_by_their_place(bench, capsys):
    call = ["preview", str(bench.config_file), "--json", "--where"]
    assert command([*call, "train.jsonl:2", "--rows", "3"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["where"].split(":")[-1] for row in rows] == ["2", "20", "21"]


def test_where_says_that_a_row_is_dropped(bench, capsys):
    write_rows(bench.train_file, [{"instruction": "x", "output": o} for o in ("yes", "")])
    assert command(["preview", str(bench.config_file), "--where", "train.jsonl:2"]) == 2
    assert "train.jsonl:2 is dropped: without an answer" in capsys.readouterr().err


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (2, 3)])
def test_packs_are_the_loaders_batches(bench, capsys, layout, weighted):
    per_device, accumulation = layout
    overrides = [
        f"train.per_device_train_batch_size={per_device}",
        f"train.gradient_accumulation_steps={accumulation}",
        *([f"data.train=[{{path: {bench.train_file}, weight: 2}}]"] if weighted else []),
    ]
    trainer = trainer_of(bench.load(*overrides))
    batches = list(trainer.get_train_dataloader())
    num_packs = len(trainer.ours.plan.packs)
    capsys.readouterr()
    call = ["preview", str(bench.config_file), *overrides, "--json", "--packs"]
    for count in (1, num_packs, num_packs + 5):
        assert command([*call, str(count)]) == 0
        shown = json.loads(capsys.readouterr().out)
        packs = shown["packs"]
        assert len(packs) == min(count, num_packs)
        assert [i for one in packs for i in one["rows"]] == list(range(len(shown["rows"])))
        places = [(one["step"], one["micro_batch"], one["pack"]) for one in packs]
        assert places == sorted(set(places))
        micro: dict[int, list[dict]] = {}
        for one in packs:
            rows = [shown["rows"][i] for i in one["rows"]]
            assert one["tokens"] == sum(len(row["input_ids"]) for row in rows) <= 128
            assert one["trained"] == sum(i != IGNORED for row in rows for i in row["labels"])
            number = (one["step"] - 1) * accumulation + one["micro_batch"] - 1
            micro.setdefault(number, []).extend(rows)
        for number, rows in micro.items():
            for key in ("input_ids", "labels", "position_ids"):
                found = [value for row in rows for value in row[key]]
                whole = batches[number][key][0].tolist()
                assert found == (whole if count >= num_packs else whole[: len(found)])


def test_the_text_of_packs_goes_document_by_document(bench, capsys):
    assert command(["preview", str(bench.config_file), "--packs", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert command(["preview", str(bench.config_file), "--packs", "2"]) == 0
    out = capsys.readouterr().out
    heads = [line for line in out.splitlines() if line.startswith(("step ", "example  "))]
    expected = []
    for number, one in enumerate(shown["packs"], start=1):
        expected.append(f"step 1, micro-batch 1, pack {number}: {len(one['rows'])} documents")
        expected += [f"example  {shown['rows'][i]['where']}," for i in one["rows"]]
    assert len(heads) == len(expected)
    assert all(head.startswith(start) for head, start in zip(heads, expected, strict=True))


@pytest.mark.parametrize("raw", [False, True])
def test_rows_cannot_steer_the_terminal(hostile, capsys, raw):
    assert command(["preview", str(hostile), *["--raw"] * raw]) == 0
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\r", "\u202e"}
    assert "<U+001B>" in out if not raw else "<0x1B>" in out


@pytest.mark.parametrize("selection", [[], ["--packs", "9"]])
def test_the_page_marks_exactly_the_labels(hostile, tmp_path, capsys, nano_tokenizer, selection):
    target = tmp_path / "page.html"
    call = ["preview", str(hostile), *selection, "--json", "--html", str(target)]
    assert command(call) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    page = read_page(target.read_text(encoding="utf-8"))
    articles = page.all("article")
    assert len(articles) == len(rows) == len(HOSTILE)
    for article, row in zip(articles, rows, strict=True):
        place, text = article.all("div")
        trained = sum(i != IGNORED for i in row["labels"])
        assert place.text == f"{row['where']}: {len(row['labels'])} tokens, {trained} trained"
        tokens = [element for element in text.inside if not isinstance(element, str)]
        assert text.text == seen(row["text"])
        for number, (element, label) in enumerate(zip(tokens, row["labels"], strict=True)):
            token = row["input_ids"][number]
            piece = nano_tokenizer.convert_ids_to_tokens(token)
            assert element.attributes["title"] == f"{number}: {token} {piece}"
            assert (element.tag == "b") == (label != IGNORED)
            assert ("control" in element.classes) == (token in control_ids(nano_tokenizer))


def test_the_page_is_written_in_place_of_the_text(hostile, tmp_path, capsys):
    assert command(["preview", str(hostile), "--html", str(tmp_path / "p.html")]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "page     " in captured.err
