"""A model's answers to questions: written in batches, kept as they come, gone on with after a stop.

`eval/answers/.asking-<key>.jsonl` holds what one model has written so far; the key is a hash of the
model's weights, the prompts and how they are drawn from. It goes when the last answer is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from finetune import artifact
from finetune.config.task import Task
from finetune.errors import CannotContinue
from finetune.heldout import RowScore, score_rows
from finetune.inference import Opened, Sampling, iter_continued
from finetune.scorers.multiple_choice import MultipleChoice
from finetune.tasks import Question

BATCH_SIZE = 32
_PARTIAL = ".asking-"
Item = TypeVar("Item")


def sampling_of(task: Task, max_new_tokens: int) -> Sampling:
    """How a task's answers are drawn.

    Args:
        max_new_tokens: of tasks that do not say.
    """
    longest = task.max_new_tokens or max_new_tokens
    return Sampling(longest, task.temperature, task.top_p, task.seed)


def written_answers(
    opened: Opened, questions: Sequence[Question], sampling: Sampling, store: Path | None
) -> list[str]:
    """What the model writes to each question, in order.

    Args:
        store: folder in which answers are kept until all are there; None: nowhere.
    """
    kept = _Kept(_partial_file(store, opened, questions, sampling) if store else None)
    left = {n: q.prompt for n, q in enumerate(questions) if n not in kept.texts}
    if kept.texts:
        _say(f"answers  {len(kept.texts):,} of {len(questions):,} are there from an earlier start")
    answered = iter_continued(opened, left, sampling, BATCH_SIZE)
    for number, ids in shown(answered, len(left), "answers"):
        kept.add(number, opened.base.tokenizer.decode(ids))
    kept.remove()
    return [kept.texts[number] for number in range(len(questions))]


def _partial_file(
    store: Path, opened: Opened, questions: Sequence[Question], sampling: Sampling
) -> Path:
    """Named by all that an answer depends on."""
    key = artifact.sha256_of_json(
        {
            "weights": opened.weights_sha256(),
            "prompts": [question.prompt for question in questions],
            "sampling": vars(sampling),
            "stops": opened.stop_ids(),
            "torch": torch.__version__,
        }
    )
    return store / f"{_PARTIAL}{key[:16]}.jsonl"


def chosen_answers(
    opened: Opened, questions: Sequence[Question], scorer: MultipleChoice, batch_size: int
) -> list[str]:
    """The choice of each question that the model finds likeliest."""
    documents = [document for question in questions for document in question.choices.values()]
    starts = range(0, len(documents), batch_size)
    rows: list[RowScore] = []
    for start in shown(starts, len(starts), "choices"):
        batch = documents[start : start + batch_size]
        rows += score_rows(opened.model, batch, batch_size, opened.device)
    scored = iter(rows)
    return [_likeliest(question, scorer, scored) for question in questions]


def _likeliest(question: Question, scorer: MultipleChoice, scored: Iterator[RowScore]) -> str:
    texts = list(question.choices)
    rows = [next(scored) for _ in texts]
    sums, tokens = [row.loss_sum for row in rows], [row.num_tokens for row in rows]
    return texts[scorer.choose(sums, [len(text.encode()) for text in texts], tokens)]


def shown(items: Iterator[Item] | Sequence[Item], total: int, what: str) -> Iterator[Item]:
    """The items, with a bar on a terminal where they take more than two seconds."""
    yield from tqdm(items, what, total, leave=False, file=sys.stderr, disable=None, delay=2)


class _Kept:
    """Answers in a file, so that a stop loses none of them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.texts: dict[int, str] = {}
        if path is not None and path.exists():
            # A line that a killed process left half-written is asked again.
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                number, text = json.loads(line)
                self.texts[number] = text

    def add(self, number: int, text: str) -> None:
        self.texts[number] = text
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, text]) + "\n")
        except OSError as error:
            raise CannotContinue(f"{self._path}: could not be written: {error}") from error

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
