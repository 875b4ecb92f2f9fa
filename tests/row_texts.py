"""Rows of a file as the texts that the data checks compare."""

from __future__ import annotations

from pathlib import Path

from finetune.overlap import RowText
from finetune.shapes import Example, read_examples


def row_text(example: Example) -> RowText:
    if example.text:
        return RowText(example.where, "", example.text)
    read = [m["content"] for m in example.messages if m["role"] != "assistant"]
    written = [m["content"] for m in example.messages if m["role"] == "assistant"]
    return RowText(example.where, "\n\n".join(read), "\n\n".join(written))


def text_rows(path: Path) -> list[RowText]:
    columns = None
    if "gsm8k" in path.name:
        columns = {"prompt": "question", "completion": "answer"}
    return [row_text(example) for example in read_examples(path, columns=columns)[1]]
