"""`data:` which rows, in which prompt format, cut to which length."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from finetune.config.section import Section, Text, as_tuple

COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "tools"),
    "question_answer": ("question", "answer"),
    "seed_tasks": ("instruction", "instances"),
    "text": ("text",),
}
"""The columns of each row format, under the names this toolkit gives them."""


class Source(Section):
    """One source of rows: a file, a folder or a pattern, and how to read it."""

    path: Text
    """A .json, .jsonl, .ndjson, .csv, .tsv, .parquet or .txt file (.gz as well, but for parquet), a
    folder of such files, or a pattern (data/*.jsonl); relative to the working directory."""

    format: Literal[
        "auto",
        "alpaca",
        "messages",
        "sharegpt",
        "prompt_completion",
        "question_answer",
        "seed_tasks",
        "text",
    ] = "auto"
    """What the rows look like; `auto` decides by the columns of the first row."""

    columns: dict[str, Text] | None = None
    """Names of the file's columns where they differ: {instruction: question, output: answer}."""

    @model_validator(mode="after")
    def _known_columns(self) -> Source:
        formats = COLUMNS if self.format == "auto" else {self.format: COLUMNS[self.format]}
        allowed = list(dict.fromkeys(name for columns in formats.values() for name in columns))
        unknown = [column for column in self.columns or {} if column not in allowed]
        if unknown:
            raise ValueError(
                f"format {self.format} has no column {', '.join(unknown)};"
                f" allowed: {', '.join(allowed)}"
            )
        theirs = list((self.columns or {}).values())
        twice = sorted({name for name in theirs if theirs.count(name) > 1})
        if twice:
            raise ValueError(f"columns names {', '.join(twice)} twice; each column has one meaning")
        return self


def _as_sources(value: Any) -> Any:
    return tuple({"path": item} if isinstance(item, str) else item for item in as_tuple(value))


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class DataSection(Section):
    """Training and held-out rows and how they become token ids and a train mask."""

    train: Sources = ()
    """Training rows: one source or a list; each a path or {path, format, columns}."""

    heldout: Sources = ()
    """Held-out rows, never trained on. At most one of `heldout`, `heldout_fraction`."""

    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows to hold out, chosen by a hash of each row's content: a row stays
    on its side when others are added."""

    date_string: Text = "26 Jul 2024"
    """The date that formats with a date print (Llama 3.1, 3.2): never the clock."""

    chat_format: Literal["auto", "nano", "llama2", "llama3", "llama3.1", "llama3.2"] = "auto"
    """Prompt format; `auto` takes the one that belongs to the base."""

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longest example, and length of a pack, in tokens."""

    on_overflow: Literal["drop", "error", "split"] = "drop"
    """What happens to a longer example: dropped and counted, refused, or (recipe pretrain) split
    into pieces of max_length."""

    packing: bool = True
    """Put several examples into one pack of max_length tokens; they cannot see each other."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens trained on: every assistant turn, only the last one, or everything but BOS."""
