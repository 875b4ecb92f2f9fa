"""The questions of a task: each row's prompt as ids, and the answers that are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune.config import RunConfig
from finetune.config.task import Task, filled
from finetune.data import load_heldout
from finetune.errors import InputError
from finetune.files import Findings, find_files, iter_rows
from finetune.llama.chat import ChatFormat
from finetune.llama.tokenizer import encode_text
from finetune.prepared import Document
from finetune.shapes import Example

GROUP_COLUMNS = ("family", "template")


@dataclass(frozen=True)
class Question:
    """One row of a task.

    Attributes:
        where: `file:row`.
        prompt: ids, BOS first.
        expected: the answers that are right; any of them is.
        groups: column -> value, for the breakdown.
        choices: text -> the whole conversation with it, of which only the choice is trained; empty
            where the model writes.
    """

    where: str
    prompt: tuple[int, ...]
    expected: tuple[str, ...]
    groups: Mapping[str, str]
    choices: Mapping[str, Document]


@dataclass(frozen=True)
class Asker:
    """How a model is asked.

    Attributes:
        config: of the run; says how rows are read and rendered.
        tokenizer: of the model.
        chat_format: None for models of plain text, which go on from the prompt.
    """

    config: RunConfig
    tokenizer: PreTrainedTokenizerFast
    chat_format: ChatFormat | None

    def questions(self, task: Task, heldout: Sequence[Document]) -> list[Question]:
        """All questions of a task, in the order of its rows.

        Args:
            heldout: the run's held-out rows; asked where the task brings none of its own.

        Raises:
            InputError: rows that cannot be asked, all of them together; or none at all.
        """
        if task.prompt is not None:
            found = list(self._of_columns(task))
        elif self.chat_format is None:
            raise InputError(
                f"eval.tasks.{task.name}: plain text asks nothing; give the task data and a prompt"
            )
        else:
            found = [self._last_question(d) for d in self._conversations(task, heldout)]
        if not found:
            raise InputError(f"eval.tasks.{task.name}: no row has a question to ask")
        return found[: task.limit]

    def _conversations(self, task: Task, heldout: Sequence[Document]) -> Iterator[Document]:
        documents: Sequence[Document] = heldout
        if task.data is not None:
            documents = [
                document
                for path in find_files(task.data)
                for document in load_heldout(path, self.config, self.tokenizer, self.chat_format)[0]
            ]
        return (d for d in documents if d.example.messages[-1]["role"] == "assistant")

    def _last_question(self, document: Document) -> Question:
        """The last question of a conversation; its answer in the data is the right one."""
        assert self.chat_format is not None
        example = document.example
        prompt = self.chat_format.prompt(self.tokenizer, example.messages[:-1], tools=example.tools)
        expected = self._answer_as_written(document, len(prompt))
        groups = groups_of(example.extra)
        return Question(example.where, tuple(prompt), (expected,), groups, {})

    def _answer_as_written(self, document: Document, start: int) -> str:
        """The last answer: its text, or a tool call as the prompt format writes it."""
        assert self.chat_format is not None
        message = document.example.messages[-1]
        if not message.get("tool_calls"):
            return str(message["content"])
        stops = set(self.chat_format.stop_ids(self.tokenizer))
        ids = [i for i in document.input_ids[start:] if i not in stops]
        return str(self.tokenizer.decode(ids))

    def _of_columns(self, task: Task) -> Iterator[Question]:
        assert task.data is not None, "the config asks for data with a prompt"
        findings, questions = Findings(), []
        for path in find_files(task.data):
            for row in iter_rows(path, findings):
                try:
                    questions.append(self._question(task, row.where, row.columns))
                except (ValueError, InputError) as error:
                    findings.add(f"{row.where}: {error}")
        findings.refuse()
        return iter(questions)

    def _question(self, task: Task, where: str, row: Mapping[str, Any]) -> Question:
        text = filled(task.prompt or "", {name: _text(row, name) for name in task.columns})
        choices = _choices(row, task.choices) if task.choices else ()
        expected = _expected(row, task.answer, choices, task.judge.needs_expected)
        task.judge.check_expected(expected)
        prompt = tuple(self._prompt(text, task.system))
        documents = {c: self._with_answer(where, prompt, text, task.system, c) for c in choices}
        return Question(where, prompt, expected, groups_of(row), documents)

    def _prompt(self, text: str, system: str | None) -> list[int]:
        if self.chat_format is not None:
            return self.chat_format.prompt(self.tokenizer, _messages(text, system))
        if system is not None:
            raise ValueError("a system message has no place in plain text; leave system out")
        return [self.tokenizer.bos_token_id, *encode_text(self.tokenizer, text)]

    def _with_answer(
        self, where: str, prompt: Sequence[int], text: str, system: str | None, choice: str
    ) -> Document:
        """The prompt with one of its choices, which alone is scored: with the token that ends the
        answer where there is a prompt format; behind a space where there is none.
        """
        if self.chat_format is not None:
            messages = [*_messages(text, system), {"role": "assistant", "content": choice}]
            row = self.chat_format.render(self.tokenizer, messages, train_on="last")
            return Document(Example(where), row.input_ids, row.train_mask)
        whole = encode_text(self.tokenizer, f"{text.rstrip()} {choice.lstrip()}")
        ids = [self.tokenizer.bos_token_id, *whole]
        # Where a token spans the border, it belongs to the choice.
        same = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), None)
        start = min(len(prompt), len(ids) - 1) if same is None else same
        return Document(Example(where), ids, [position >= start for position in range(len(ids))])


def groups_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns that answers are counted by, where the row has them."""
    return {column: str(row[column]) for column in GROUP_COLUMNS if column in row}


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"no column {name}; there are {', '.join(sorted(row))}")
    value = row[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"column {name} is {type(value).__name__}; allowed: a text or a number")
    return value


def _choices(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    if name not in row:
        raise ValueError(f"no column {name}; there are {', '.join(sorted(row))}")
    value = row[name]
    texts = [c for c in value if isinstance(c, str) and c] if isinstance(value, list) else []
    if len(texts) < 2 or len(texts) < len(value) or len(set(texts)) < len(texts):
        raise ValueError(f"column {name}: needs a list of two or more texts that differ")
    return tuple(texts)


def _expected(
    row: Mapping[str, Any], name: str, choices: tuple[str, ...], is_needed: bool
) -> tuple[str, ...]:
    if name not in row and not is_needed:
        return ()
    value = row.get(name)
    if choices and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(choices):
            raise ValueError(f"column {name} is {value}; allowed: 0 to {len(choices) - 1}")
        return (choices[value],)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        expected = tuple(value)
    else:
        expected = (_text(row, name),)
    if choices and not set(expected) & set(choices):
        raise ValueError(f"column {name} is {expected[0]!r}, which is none of the choices")
    return expected
