"""`eval --lm-eval`: tasks of lm-evaluation-harness, asked and scored by the harness itself.

The harness is an optional package: it is imported inside functions, after `refuse_missing`.

Source: Gao et al., EleutherAI/lm-evaluation-harness 0.4.13, docs/interface.md, docs/task_guide.md.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import scoreboard
from finetune.errors import InputError
from finetune.harness.scores import scores_of, versions
from finetune.harness.tasks import HarnessTasks, find_tasks
from finetune.inference import Opened
from finetune.scoring import Scores
from finetune.subject import Subject

_NUM_DRAWS = 1000  # of the harness's bootstrap, for metrics without a formula of their error


def evaluate(
    subject: Subject, names: Sequence[str], folder: Path | None, limit: int | None
) -> tuple[list[Scores], dict[str, Any]]:
    """Every model of the subject on tasks of the harness.

    Args:
        names: tasks, groups or tags.
        folder: of YAML files that describe tasks; None: the harness's own alone.
        limit: documents of each task.

    Returns:
        each model's scores, and what the result says of the harness.

    Raises:
        InputError: the harness is not installed, or a task cannot be asked; before any model is
            loaded.
    """
    refuse_missing()
    _keep_quiet()
    tasks = find_tasks(names, folder)
    scores: list[Scores] = []
    about: dict[str, Any] = {"version": importlib.metadata.version("lm_eval"), "limit": limit}
    for name in subject.models:
        opened = subject.open(name)
        results, num_cut = _results(opened, subject, tasks, limit)
        scores.append(Scores(opened.name, None, scores_of(results, tasks)))
        print(f"eval     {opened.name}: {scoreboard.line(scores[-1])}", file=sys.stderr)
        about.setdefault("cut", {})[opened.name] = num_cut
        if results.get("groups"):
            about.setdefault("groups", {})[opened.name] = results["groups"]
    return scores, {"lm_eval": about | versions(scores[0])}


def refuse_missing() -> None:
    """Looks for the package.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "--lm-eval needs lm-evaluation-harness, which is not installed: "
            "`pip install plumbtune[lm-eval]`, or `make setup-lm-eval` in a clone"
        )


def _keep_quiet() -> None:
    """Metrics of the `evaluate` library are code from the hub: never fetched. What the harness says
    of itself is left out; what it cuts off is counted by `HarnessModel`.
    """
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    import datasets

    datasets.disable_progress_bars()


def _bars() -> contextlib.AbstractContextManager[Any]:
    """The harness's progress bars are for a terminal; a log would have a line for each step."""
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())


def _results(
    opened: Opened, subject: Subject, tasks: HarnessTasks, limit: int | None
) -> tuple[dict[str, Any], int]:
    """What the harness found, and how many prompts it cut."""
    from lm_eval.evaluator import simple_evaluate

    from finetune.harness.model import HarnessModel

    model = HarnessModel(opened, subject.config.eval.per_device_eval_batch_size)
    with _bars():
        results = simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=limit,
            bootstrap_iters=_NUM_DRAWS,
            apply_chat_template=opened.base.chat_format is not None,
        )
    if model.num_cut:
        print(
            f"eval     {opened.name}: {model.num_cut:,} prompts are longer than the model's "
            f"context of {model.max_length} and lost their beginning",
            file=sys.stderr,
        )
    return results, model.num_cut
