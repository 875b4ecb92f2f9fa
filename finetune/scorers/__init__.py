"""The table of scorers: a measure's name -> how answers are scored. A measure is a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import InputError
from finetune.scorers.bleu import Bleu
from finetune.scorers.chrf import Chrf
from finetune.scorers.exact_match import ExactMatch
from finetune.scorers.json_validity import JsonValidity
from finetune.scorers.multiple_choice import MultipleChoice
from finetune.scorers.normalized_match import NormalizedMatch
from finetune.scorers.numeric import Numeric
from finetune.scorers.regex import Regex
from finetune.scorers.rouge_l import RougeL
from finetune.scorers.scorer import Scorer
from finetune.scorers.settings import did_you_mean, read_settings, show

SCORERS: dict[str, type[Scorer]] = {
    "exact_match": ExactMatch,
    "normalized_match": NormalizedMatch,
    "numeric": Numeric,
    "regex": Regex,
    "json": JsonValidity,
    "rouge_l": RougeL,
    "bleu": Bleu,
    "chrf": Chrf,
    "multiple_choice": MultipleChoice,
}


def make(name: str, kwargs: Mapping[str, Any]) -> Scorer:
    """The scorer of a task.

    Args:
        name: a key of SCORERS.
        kwargs: its settings, as they stand in the YAML file.

    Raises:
        InputError: there is no such scorer; or a setting that is unknown, missing, of the wrong
            type, a pattern that does not compile, a schema that is none: all findings together.
    """
    if name not in SCORERS:
        hint = did_you_mean(str(name), SCORERS)
        raise InputError(f"scorer: found {show(name)}; {hint}allowed: {', '.join(SCORERS)}")
    kind = SCORERS[name]
    values, findings, is_complete = read_settings(kind, kwargs)
    if is_complete:
        scorer = kind(**values)
        findings += scorer.findings()
    if findings:
        raise InputError([f"scorer_kwargs.{finding}" for finding in findings])
    return scorer


__all__ = ["SCORERS", "Scorer", "make"]
