"""Held-out rows scored two ways: loss per trained token, and exact match of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.files import read_rows
from finetune.heldout import HeldoutLoss, score
from finetune.inference import Opened, Sampling, continue_prompts
from finetune.llama.tokenizer import encode_text
from finetune.prepared import Document
from finetune.shapes import Example

GROUP_COLUMNS = ("family", "template")


@dataclass(frozen=True)
class Answer:
    """One question asked.

    Attributes:
        where: the row.
        expected: the answer of the data.
        written: what the model wrote.
        groups: column -> value, for the breakdown.
    """

    where: str
    expected: str
    written: str
    groups: dict[str, str]

    @property
    def is_right(self) -> bool:
        """Equal but for spaces around."""
        return self.written.strip() == self.expected.strip()


@dataclass(frozen=True)
class Scores:
    """One model on one set of rows.

    Attributes:
        name: the model's.
        heldout: loss sums; None where only answers were asked for.
        answers: to the rows' last questions; empty where none were asked for.
        places: where each row of `heldout` is from.
    """

    name: str
    heldout: HeldoutLoss | None
    answers: tuple[Answer, ...]
    places: tuple[str, ...] = ()

    @property
    def exact_match(self) -> float | None:
        """Share of right answers."""
        if not self.answers:
            return None
        return sum(a.is_right for a in self.answers) / len(self.answers)

    def by_group(self, column: str) -> dict[str, tuple[int, int]]:
        """Value of a column -> (right answers, answers)."""
        result: dict[str, tuple[int, int]] = {}
        for answer in self.answers:
            if value := answer.groups.get(column):
                right, count = result.get(value, (0, 0))
                result[value] = (right + answer.is_right, count + 1)
        return dict(sorted(result.items()))

    def as_json(self) -> dict[str, Any]:
        """The numbers of the command-line contract, and the exact match where it was asked."""
        result: dict[str, Any] = {"model": self.name}
        if self.heldout:
            result |= self.heldout.as_json()
        if self.answers:
            result |= {"exact_match": self.exact_match, "answers": len(self.answers)}
            result["groups"] = {c: g for c in GROUP_COLUMNS if (g := self.by_group(c))}
        return result


def score_model(
    opened: Opened, documents: Sequence[Document], batch_size: int, max_new_tokens: int, ask: bool
) -> Scores:
    """Loss on the documents and, if asked, greedy answers to their last question."""
    heldout = score(opened.model, documents, batch_size, opened.device)
    answers = ask_last_questions(opened, documents, max_new_tokens) if ask else ()
    places = tuple(document.example.where for document in documents)
    return Scores(opened.name, heldout, tuple(answers), places)


def ask_last_questions(
    opened: Opened, documents: Sequence[Document], max_new_tokens: int
) -> list[Answer]:
    """The model's own greedy answer to the last question of every conversation."""
    chat_format = opened.base.chat_format
    assert chat_format is not None, "plain text asks nothing"
    asked = [d for d in documents if d.example.messages[-1]["role"] == "assistant"]
    tokenizer = opened.base.tokenizer
    prompts = [
        chat_format.prompt(tokenizer, d.example.messages[:-1], tools=d.example.tools) for d in asked
    ]
    written = continue_prompts(opened, prompts, Sampling(max_new_tokens))
    stops = set(chat_format.stop_ids(tokenizer))
    return [
        _answer(d.example, _expected(d, prompt, stops, tokenizer), tokenizer.decode(ids))
        for d, prompt, ids in zip(asked, prompts, written, strict=True)
    ]


def _expected(document: Document, prompt: list[int], stops: set[int], tokenizer: Any) -> str:
    """The last answer: its text, or a tool call as the prompt format writes it."""
    message = document.example.messages[-1]
    if not message.get("tool_calls"):
        return str(message["content"])
    ids = [i for i in document.input_ids[len(prompt) :] if i not in stops]
    return str(tokenizer.decode(ids))


def _answer(example: Example, expected: str, written: str) -> Answer:
    groups = {c: str(example.extra[c]) for c in GROUP_COLUMNS if c in example.extra}
    return Answer(example.where, expected, written, groups)


def probe(opened: Opened, path: Path) -> Scores:
    """Plain-notation skills: rows of `prompt` and `answer`, continued greedily without a format.

    The continuation up to the answer's length must be the answer.

    Raises:
        InputError: rows without a prompt or an answer.
    """
    tokenizer, answers = opened.base.tokenizer, []
    rows = [(row.where, row.columns) for row in read_rows(path)]
    findings = [
        f"{where}: {key} is not text; a probe's row has prompt and answer"
        for where, row in rows
        for key in ("prompt", "answer")
        if not isinstance(row.get(key), str)
    ]
    if findings:
        raise InputError(findings)
    bos = [tokenizer.bos_token_id]
    prompts = [bos + encode_text(tokenizer, row["prompt"]) for _, row in rows]
    longest = max(len(encode_text(tokenizer, row["answer"])) for _, row in rows)
    continued = continue_prompts(opened, prompts, Sampling(longest + 4))
    for (where, row), prompt, ids in zip(rows, prompts, continued, strict=True):
        # Decoded together with the prompt: the space between them belongs to the text.
        start = len(tokenizer.decode(prompt, skip_special_tokens=True))
        text = tokenizer.decode(prompt + ids, skip_special_tokens=True)[start:].strip()
        groups = {c: str(row[c]) for c in GROUP_COLUMNS if c in row}
        answers.append(Answer(where, row["answer"], text[: len(row["answer"])], groups))
    return Scores(opened.name, None, tuple(answers))
