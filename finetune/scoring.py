"""One model's numbers on held-out rows and tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.answers import chosen_answers, sampling_of, written_answers
from finetune.config import EvalSection
from finetune.config.task import Task
from finetune.errors import InputError
from finetune.files import read_rows
from finetune.heldout import HeldoutLoss, RowScore, score, total_of
from finetune.inference import Opened, Sampling, continue_prompts
from finetune.llama.tokenizer import encode_text
from finetune.prepared import Document
from finetune.scorers.multiple_choice import MultipleChoice
from finetune.tasks import GROUP_COLUMNS, Question, groups_of
from finetune.tokens import text_bytes


@dataclass(frozen=True)
class Answer:
    """One question asked.

    Attributes:
        where: the row.
        prompt: as the model saw it.
        expected: the answers of the data; any of them is right.
        written: what the model wrote or chose.
        score: from 0 to 1.
        groups: column -> value, for the breakdown.
    """

    where: str
    prompt: str
    expected: tuple[str, ...]
    written: str
    score: float
    groups: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """A line of the answers' file."""
        names = ("where", "prompt", "expected", "written", "score")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TaskScore:
    """One model on one task.

    Attributes:
        task: as configured.
        scorer_version: of the scorer.
        score: of all answers together.
        answers: in the order of the rows.
        is_share: whether scores lie from 0 to 1; others are shown as they are.
        weights: how much each answer counts in the score; empty: all the same.
    """

    task: Task
    scorer_version: int
    score: float
    answers: tuple[Answer, ...]
    is_share: bool = True
    weights: tuple[float, ...] = ()

    @property
    def generates(self) -> bool:
        """Whether the model writes its answers."""
        return self.task.generates

    def by_group(self, column: str) -> dict[str, tuple[float, int]]:
        """Value of a column -> (sum of the scores, answers)."""
        result: dict[str, tuple[float, int]] = {}
        for answer in self.answers:
            if value := answer.groups.get(column):
                total, count = result.get(value, (0, 0))
                result[value] = (total + answer.score, count + 1)
        whole = {v: (int(s) if s == int(s) else s, n) for v, (s, n) in result.items()}
        return dict(sorted(whole.items()))

    def as_json(self) -> dict[str, Any]:
        """Of the result's files."""
        return {
            "scorer": self.task.scorer,
            "scorer_version": self.scorer_version,
            "version": self.task.version,
            "score": self.score,
            "answers": len(self.answers),
            "groups": {c: g for c in GROUP_COLUMNS if (g := self.by_group(c))},
        }


@dataclass(frozen=True)
class Scores:
    """One model on one set of rows.

    Attributes:
        name: the model's.
        heldout: loss sums; None where only answers were asked for.
        tasks: what was asked, by name.
        places: where each row of `heldout` is from.
        num_bytes: of the text of each row's answers.
        divergence: KL(trained ‖ this model) in nats a token, and at how many tokens; None where the
            run kept nothing to compare with.
    """

    name: str
    heldout: HeldoutLoss | None
    tasks: Mapping[str, TaskScore]
    places: tuple[str, ...] = ()
    num_bytes: tuple[int, ...] = ()
    divergence: tuple[float, int] | None = None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for each byte of the scored text; comparable between tokenizers."""
        total = sum(self.num_bytes)
        return self.heldout.loss_sum / math.log(2) / total if self.heldout and total else None

    def by_source(self) -> dict[str, HeldoutLoss]:
        """File -> its rows alone."""
        assert self.heldout is not None
        files: dict[str, list[RowScore]] = {}
        for place, row in zip(self.places, self.heldout.rows, strict=True):
            files.setdefault(place.rpartition(":")[0], []).append(row)
        scored = {name: rows for name, rows in files.items() if any(r.num_tokens for r in rows)}
        return {name: total_of(rows) for name, rows in scored.items()}

    def by_turn(self) -> dict[str, HeldoutLoss]:
        """Number of the trained answer in its row, from 1 -> the loss on these answers alone."""
        assert self.heldout is not None
        turns: dict[int, list[RowScore]] = {}
        for row in self.heldout.rows:
            for number, span in enumerate(row.spans, start=1):
                turns.setdefault(number, []).append(RowScore((span,)))
        return {str(number): total_of(rows) for number, rows in sorted(turns.items())}

    def as_json(self) -> dict[str, Any]:
        """The numbers of the command-line contract, and those of the tasks."""
        result: dict[str, Any] = {"model": self.name}
        if self.heldout:
            result |= self.heldout.as_json()
            result |= {"bits_per_byte": self.bits_per_byte, "bytes": sum(self.num_bytes)}
            for name, groups in (("by_source", self.by_source()), ("by_turn", self.by_turn())):
                result[name] = {key: loss.as_json() for key, loss in groups.items()}
        if self.divergence:
            result["kl_from_trained"], result["kl_tokens"] = self.divergence
        if self.tasks:
            result["tasks"] = {name: task.as_json() for name, task in self.tasks.items()}
        if exact := self.tasks.get("exact_match"):
            result |= {"exact_match": exact.score, "answers": len(exact.answers)}
            result["groups"] = exact.as_json()["groups"]
        return result


def score_rows_and_tasks(
    opened: Opened,
    documents: Sequence[Document],
    questions: Mapping[str, Sequence[Question]],
    settings: EvalSection,
    store: Path | None = None,
) -> Scores:
    """Loss on the documents, and the answers to each task's questions.

    Args:
        questions: task's name -> its questions; tasks without any are left out.
        store: folder in which answers are kept while they are written.
    """
    heldout = score(opened.model, documents, settings.per_device_eval_batch_size, opened.device)
    places = tuple(document.example.where for document in documents)
    num_bytes = tuple(sum(text_bytes(opened.base.tokenizer, d)) for d in documents)
    tasks, written = {}, _Written(opened, settings, store)
    for task in settings.tasks:
        if asked := questions.get(task.name):
            tasks[task.name] = _judged(opened, task, asked, written.answers(task, asked))
    return Scores(opened.name, heldout, tasks, places, num_bytes)


class _Written:
    """Answers by how they were asked for, so that two scorers of one question ask once."""

    def __init__(self, opened: Opened, settings: EvalSection, store: Path | None) -> None:
        self._opened, self._settings, self._store = opened, settings, store
        self._known: dict[tuple[tuple[tuple[int, ...], ...], Sampling], list[str]] = {}

    def answers(self, task: Task, questions: Sequence[Question]) -> list[str]:
        if isinstance(task.judge, MultipleChoice):
            batch_size = self._settings.per_device_eval_batch_size
            return chosen_answers(self._opened, questions, task.judge, batch_size)
        sampling = sampling_of(task, self._settings.max_new_tokens)
        key = (tuple(question.prompt for question in questions), sampling)
        if key not in self._known:
            texts = written_answers(self._opened, questions, sampling, self._store)
            self._known[key] = texts
        return self._known[key]


def _judged(
    opened: Opened, task: Task, questions: Sequence[Question], written: Sequence[str]
) -> TaskScore:
    """The answers with their scores.

    Raises:
        InputError: a scorer could not judge an answer; all rows of that kind together.
    """
    scorer, findings, answers = task.judge, [], []
    for question, text in zip(questions, written, strict=True):
        try:
            found = scorer.score(text, question.expected)
        except InputError as error:
            findings += [f"eval.tasks.{task.name}, {question.where}: {f}" for f in error.findings]
            continue
        prompt = opened.base.tokenizer.decode(list(question.prompt))
        answers.append(
            Answer(question.where, prompt, question.expected, text, found, question.groups)
        )
    if findings:
        raise InputError(findings)
    total = scorer.total(written, [question.expected for question in questions])
    return TaskScore(task, scorer.version, total, tuple(answers))


def probe(opened: Opened, path: Path) -> Scores:
    """Plain-notation skills: rows of `prompt` and `answer`, continued greedily without a format.

    The continuation up to the answer's length must be the answer.

    Raises:
        InputError: rows without a prompt or an answer.
    """
    rows = _probe_rows(path)
    tokenizer, task = opened.base.tokenizer, Task(name="exact_match", scorer="exact_match")
    bos = [tokenizer.bos_token_id]
    prompts = [bos + encode_text(tokenizer, row["prompt"]) for _, row in rows]
    longest = max(len(encode_text(tokenizer, row["answer"])) for _, row in rows)
    continued = continue_prompts(opened, prompts, Sampling(longest + 4))
    scorer, answers = task.judge, []
    for (where, row), prompt, ids in zip(rows, prompts, continued, strict=True):
        # Decoded together with the prompt: the space between them belongs to the text.
        start = len(tokenizer.decode(prompt, skip_special_tokens=True))
        text = tokenizer.decode(prompt + ids, skip_special_tokens=True)[start:].strip()
        expected, said = (row["answer"],), text[: len(row["answer"])]
        right = scorer.score(said, expected)
        answers.append(Answer(where, row["prompt"], expected, said, right, groups_of(row)))
    share = scorer.total([a.written for a in answers], [a.expected for a in answers])
    scores = TaskScore(task, scorer.version, share, tuple(answers))
    return Scores(opened.name, None, {"exact_match": scores})


def _probe_rows(path: Path) -> Sequence[tuple[str, Mapping[str, Any]]]:
    rows = [(row.where, row.columns) for row in read_rows(path)]
    findings = [
        f"{where}: {key} is not text; a probe's row has prompt and answer"
        for where, row in rows
        for key in ("prompt", "answer")
        if not isinstance(row.get(key), str)
    ]
    if findings:
        raise InputError(findings)
    return rows
