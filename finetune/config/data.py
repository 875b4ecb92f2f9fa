"""`data:` which rows, in which prompt format, cut to which length."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from finetune.config.section import Section, Text, as_tuple

HUB_PREFIX = "hf://datasets/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

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
    folder of such files, or a pattern (data/*.jsonl); relative to the working directory. Or a
    dataset of the hub: hf://datasets/owner/name."""

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

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in every epoch, by trained tokens, relative to the other sources'. Null
    for all: every row once an epoch."""

    split: Text | None = None
    """Which split of a dataset of the hub; needed there."""

    revision: Text | None = None
    """Branch, tag or commit hash of a dataset of the hub; null is its `main`. A run stays at the
    commit that it began with."""

    columns: dict[str, Text] | None = None
    """Names of the file's columns where they differ: {instruction: question, output: answer}."""

    @property
    def hub_dataset(self) -> str | None:
        """`owner/name` where the path is a dataset of the hub."""
        is_hub = self.path.startswith(HUB_PREFIX)
        return self.path.removeprefix(HUB_PREFIX) if is_hub else None

    @model_validator(mode="after")
    def _hub_settings(self) -> Source:
        if self.hub_dataset is None:
            idle = [name for name in ("split", "revision") if getattr(self, name) is not None]
            if idle:
                raise ValueError(
                    f"{', '.join(idle)} has no effect on {self.path}; allowed with a dataset of the"
                    f" hub ({HUB_PREFIX}owner/name)"
                )
        elif not _HUB_ID.fullmatch(self.hub_dataset) or self.split is None:
            raise ValueError(
                f"{self.path} needs owner/name after {HUB_PREFIX}, and a split: {{path, split}}"
            )
        return self

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

    chat_format: Literal[
        "auto",
        "nano",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama3.1-verbatim",
    ] = "auto"
    """Prompt format; `auto` takes the one that belongs to the base. `llama3.1-verbatim` writes
    contents as they are, without dates, in any order of turns."""

    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 2048
    """Longest example, and length of a pack, in tokens."""

    on_overflow: Literal["drop", "error", "split", "truncate_history"] = "drop"
    """What happens to a longer example: dropped and counted, refused, split into pieces of
    max_length (recipe pretrain), or shortened by its oldest turns (recipe sft); an answer is never
    cut."""

    on_overlap: Literal["error", "drop", "allow"] = "error"
    """What happens to held-out rows that the training rows have too, or almost: the run is refused,
    they are dropped from the held-out side and counted, or they are kept and reported."""

    packing: bool = True
    """Put several examples into one pack of max_length tokens; they cannot see each other."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens trained on: every assistant turn, only the last one, or everything but BOS."""
