"""What preview shows is what is trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from finetune import preview
from finetune.data import load_data
from finetune.errors import InputError
from finetune.fast.loss import IGNORED, pack
from finetune.llama.chat import FORMATS
from finetune.prepared import Document
from finetune.shapes import Example

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
        shown = preview.labels_of(Document(document.example, document.input_ids, mask))
        assert shown == pack([(document.input_ids, mask)]).labels[0].tolist()
        assert shown[0] == IGNORED


def test_brackets_hold_the_answers_and_their_end(document, nano_tokenizer):
    shown = preview.show_example(nano_tokenizer, document, io.StringIO())
    head, text = shown.split("\n", 1)
    assert head == "example  t.jsonl:1, trained tokens between [[ and ]]:"
    assert "[[Blue, i.e. the sky</s>]]" in text.replace("[[ ", "[[")
    assert "[[Red</s>]]" in text.replace("[[ ", "[[")
    assert text.count("[[") == 3  # two answers, and the user's own brackets
    assert "\x1b" not in shown


def test_colour_is_for_terminals_without_no_color(document, nano_tokenizer, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = preview.show_example(nano_tokenizer, document, Terminal())
    green = [part.split("\x1b[0m")[0] for part in shown.split("\x1b[32m")[1:]]
    assert [text.strip() for text in green] == ["Blue, i.e. the sky</s>", "Red</s>"]
    assert "trained tokens green" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in preview.show_example(nano_tokenizer, document, Terminal())


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
