"""What lm-evaluation-harness found, as scores by document: they feed the paired comparison.

A task has one score here: its first metric that is a number for each document, under its first
filter; `metrics` has all of them. A metric that is better the lower it is gets a minus sign. Plain
text (`loglikelihood_rolling`) is scored in bits per byte, each document with its bytes as weight:

    score = -bits per byte = sum over documents of log2 p(text) / sum of their bytes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune import artifact
from finetune.config.task import Task
from finetune.errors import InputError
from finetune.harness.tasks import HarnessTasks
from finetune.scoring import Answer, Scores, TaskScore

ROLLING = "loglikelihood_rolling"
Sample = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HarnessScore(TaskScore):
    """One model on one task of the harness.

    Attributes:
        metrics: all that the harness reports, standard errors among them.
        stderr: of the score, as the harness estimates it; None where it does not.
        config_sha256: of the task's settings and its documents.
        is_written: whether the model writes its answers.
    """

    metrics: Mapping[str, float | None]
    stderr: float | None
    config_sha256: str
    is_written: bool

    @property
    def generates(self) -> bool:
        """Whether the model writes."""
        return self.is_written

    def as_json(self) -> dict[str, Any]:
        """Of the result's files."""
        return {
            "scorer": self.task.scorer,
            "version": self.task.version,
            "score": self.score,
            "answers": len(self.answers),
            "stderr": self.stderr,
            "metrics": dict(self.metrics),
            "groups": {},
        }


def scores_of(results: Mapping[str, Any], tasks: HarnessTasks) -> dict[str, TaskScore]:
    """Task's name -> its score, from what `simple_evaluate` returned with its samples.

    Raises:
        InputError: a task without any metric that is a number for each document.
    """
    return {name: _Found(name, results, tasks.tasks[name]).score() for name in results["samples"]}


def versions(scores: Scores) -> dict[str, Any]:
    """Task's name -> the hash of its settings and documents."""
    found = {n: t.config_sha256 for n, t in scores.tasks.items() if isinstance(t, HarnessScore)}
    return {"config_sha256": found}


class _Found:
    """One task's part of the harness's result."""

    def __init__(self, name: str, results: Mapping[str, Any], task: Any) -> None:
        samples = results["samples"][name]
        self._name, self._task = name, task
        self._filter = samples[0]["filter"]
        mine = [sample for sample in samples if sample["filter"] == self._filter]
        self._samples = sorted(mine, key=lambda sample: sample["doc_id"])
        self._totals = results["results"][name]
        self._config = results["configs"][name]
        self._version = results["versions"][name]
        self._lower_is_better = {
            metric
            for metric, higher in results["higher_is_better"][name].items()
            if higher is False
        }

    def score(self) -> HarnessScore:
        if self._config.get("output_type") == ROLLING:
            return self._of_text()
        metric, values = self._by_document()
        sign = -1.0 if metric in self._lower_is_better else 1.0
        key = f"{metric},{self._filter}"
        error = self._totals.get(f"{metric}_stderr,{self._filter}")
        return self._made(
            ("-" if sign < 0 else "") + key.removesuffix(",none"),
            sign * float(self._totals[key]),
            [sign * value for value in values],
            stderr=float(error) if isinstance(error, float) else None,
            is_share=sign > 0 and all(0.0 <= value <= 1.0 for value in values),
        )

    def _of_text(self) -> HarnessScore:
        sums = [sample["filtered_resps"][0] / math.log(2) for sample in self._samples]
        sizes = [len(sample["arguments"][0][0].encode()) for sample in self._samples]
        if not sum(sizes):
            raise InputError(f"--lm-eval {self._name}: its documents have no text")
        each = [total / size if size else 0.0 for total, size in zip(sums, sizes, strict=True)]
        score = math.fsum(sums) / sum(sizes)
        return self._made("-bits_per_byte", score, each, weights=tuple(map(float, sizes)))

    def _by_document(self) -> tuple[str, list[float]]:
        """The first metric that is a finite number for every document."""
        metrics = self._samples[0]["metrics"]
        for metric in metrics:
            total = self._task.aggregation().get(metric)
            values = [_number(sample.get(metric), total) for sample in self._samples]
            if all(value is not None and math.isfinite(value) for value in values):
                return metric, [value for value in values if value is not None]
        raise InputError(
            f"--lm-eval {self._name}: none of its metrics ({', '.join(metrics)}) is a number for "
            "each document; there is nothing to compare"
        )

    def _made(
        self, metric: str, score: float, values: Sequence[float], **more: Any
    ) -> HarnessScore:
        label: Any = f"lm-eval:{metric}"  # none of our own scorers' names
        named = Task.model_construct(name=self._name, version=self._version, scorer=label)
        answers = [
            _answer(self._name, sample, value)
            for sample, value in zip(self._samples, values, strict=True)
        ]
        settings = {"stderr": None, "is_share": False, **more}
        return HarnessScore(
            named,
            0,
            score,
            tuple(answers),
            metrics=self._metrics(),
            config_sha256=self._config_sha256(),
            is_written=self._config.get("output_type") == "generate_until",
            **settings,
        )

    def _metrics(self) -> dict[str, float | None]:
        found = {key: value for key, value in self._totals.items() if "," in key}
        return {
            key.removesuffix(",none"): float(v) if _is_number(v) and math.isfinite(v) else None
            for key, v in found.items()
        }

    def _config_sha256(self) -> str:
        """Not of where the file lies: the same task in another folder is the same."""
        settings = {k: v for k, v in self._config.items() if k != "dataset_kwargs"}
        metadata = settings.pop("metadata", None)
        if isinstance(metadata, dict):
            settings["metadata"] = {k: v for k, v in metadata.items() if k != "config_source"}
        documents = [sample["doc_hash"] for sample in self._samples]
        text = {key: repr(value) for key, value in settings.items()}
        return artifact.sha256_of_json({"settings": text, "documents": documents})


def _answer(name: str, sample: Sample, value: float) -> Answer:
    """One document: what was asked, what is right, what was written or chosen."""
    prompt, target = sample["arguments"][0][0], sample["target"]
    responses = sample["filtered_resps"]
    written = responses[0] if isinstance(responses[0], str) else ""
    if len(responses) > 1 and all(len(response) == 2 for response in responses):
        choices = [arguments[1].strip() for arguments in sample["arguments"]]
        if len(set(choices)) == 1:  # the questions differ, not the answers
            choices = [str(number) for number in range(len(choices))]
        written = choices[max(range(len(choices)), key=lambda number: responses[number][0])]
        if isinstance(target, int) and 0 <= target < len(choices):
            target = choices[target]
    expected = target if isinstance(target, (list, tuple)) else [target]
    where = f"{name}:{sample['doc_id']}"
    return Answer(where, prompt, tuple(map(str, expected)), written, value, {})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or hasattr(value, "__float__")


def _number(value: Any, total: Callable[[list[Any]], Any] | None) -> float | None:
    """A document's value; where it is none yet (bleu), what the metric is of that one alone."""
    if _is_number(value):
        return float(value)
    if value is None or total is None:
        return None
    try:
        found = total([value])
    except Exception:  # a metric's own, of one document
        return None
    return float(found) if _is_number(found) else None
