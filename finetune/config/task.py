"""A task of `eval.tasks`: questions, how they are asked, how the answers are scored."""

from __future__ import annotations

import functools
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from finetune.config.section import Section, Text, as_tuple
from finetune.errors import InputError
from finetune.scorers import SCORERS, Scorer, make

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]{0,63}$")]


class Task(Section):
    """Questions with known answers; a scorer's name alone asks the run's held-out rows."""

    name: Name
    """In tables, results and file names."""

    version: Annotated[int, Field(ge=1)] = 1
    """Of the task; raise it whenever its scores may change. It stands in the result."""

    scorer: Literal[
        "exact_match",
        "normalized_match",
        "numeric",
        "regex",
        "json",
        "rouge_l",
        "bleu",
        "chrf",
        "multiple_choice",
    ]
    """How an answer is judged; docs/evaluation.md has the table."""

    scorer_kwargs: dict[str, Any] = Field(default_factory=dict)
    """The scorer's own settings, such as {pattern: "([A-D])"} of regex."""

    data: Text | None = None
    """A file of rows, a folder or a pattern, as in data.train; null: the run's held-out rows."""

    prompt: Text | None = None
    """The question, a text with the row's columns in braces: "{question}"; null: the conversation
    in the row up to its last answer."""

    system: Text | None = None
    """A system message before the prompt, where the prompt format has one."""

    answer: Text = "answer"
    """Column with the right answer: a text, or a list of texts of which any is right. With choices,
    one of them or its index from 0. Without `prompt`, the row's last answer is the right one."""

    choices: Text | None = None
    """Column with the list of answers to choose from (multiple_choice)."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many rows."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """Longest answer, in tokens; null: eval.max_new_tokens."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 is greedy; above it answers are drawn."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of probability that is drawn from."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the draws; each row has its own, whatever it is batched with."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The row's columns that the prompt needs."""
        return columns_of(self.prompt) if self.prompt else ()

    @functools.cached_property
    def judge(self) -> Scorer:
        """The scorer with its settings."""
        return make(self.scorer, self.scorer_kwargs)

    @property
    def generates(self) -> bool:
        """Whether the model writes; else it only says how likely the choices are."""
        return self.scorer != "multiple_choice"

    @model_validator(mode="after")
    def _fits_together(self) -> Task:
        found = [
            *self._question_findings(),
            *self._idle("temperature: 0", ("top_p", "seed"), self.temperature > 0),
            *self._idle("multiple_choice", _OF_TEXT, self.generates),
        ]
        try:
            _ = self.judge
        except InputError as error:
            found += error.findings
        if found:
            raise ValueError("; ".join(found))
        return self

    def _question_findings(self) -> list[str]:
        found = []
        if self.prompt is not None:
            found += _prompt_findings(self.prompt)
            if self.data is None:
                found.append("prompt has no effect on held-out rows; name the rows: data")
        else:
            found += self._idle("the row's own conversation", ("answer", "system"), False)
        if self.generates == (self.choices is not None):
            only = "only multiple_choice chooses: leave choices out"
            found.append(only if self.choices else "multiple_choice needs choices: their column")
        if self.choices is not None and self.prompt is None:
            found.append("choices need a prompt and data")
        return found

    def _idle(self, why: str, keys: tuple[str, ...], has_effect: bool) -> list[str]:
        given = [] if has_effect else [key for key in keys if self.was_given(key)]
        return [f"{', '.join(given)} has no effect with {why}; leave it out"] if given else []


_OF_TEXT = ("max_new_tokens", "temperature", "top_p", "seed")


def columns_of(prompt: str) -> tuple[str, ...]:
    """The names in braces.

    Raises:
        ValueError: a brace without its other half.
    """
    return tuple(dict.fromkeys(name for _, name, _, _ in _FORMATTER.parse(prompt) if name))


_FORMATTER = string.Formatter()


def filled(prompt: str, row: dict[str, str]) -> str:
    """The prompt with a row's texts in the places of its columns."""
    parts = []
    for literal, name, _, _ in _FORMATTER.parse(prompt):
        parts += [literal, row[name] if name else ""]
    return "".join(parts)


def _prompt_findings(prompt: str) -> list[str]:
    try:
        fields = [(name, form, turn) for _, name, form, turn in _FORMATTER.parse(prompt)]
    except ValueError as error:
        return [f"prompt: {error}; a brace that is meant as such is written twice"]
    odd = [name for name, form, turn in fields if name == "" or form or turn]
    if odd:
        return ["prompt: only a column's name may stand in braces, as {question}"]
    if not any(name for name, _, _ in fields):
        return ["prompt has no column in braces; every row would be asked the same"]
    return []


def _as_task(value: Any) -> Any:
    """A scorer's name as the task that asks the held-out rows and is judged by it."""
    if not isinstance(value, str):
        return value
    texts = [name for name, kind in SCORERS.items() if kind.is_text]
    if value not in texts:
        raise ValueError(
            f"allowed: {', '.join(texts)}, or a mapping {{name, scorer, data, prompt, …}}"
        )
    return {"name": value, "scorer": value}


def _named_once(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is there twice; each name stands once")
    if "loss" in names:
        raise ValueError("a task may not be called loss; the held-out loss is")
    return tasks


OneTask = Annotated[Task, BeforeValidator(_as_task)]
Tasks = Annotated[tuple[OneTask, ...], BeforeValidator(as_tuple), AfterValidator(_named_once)]
