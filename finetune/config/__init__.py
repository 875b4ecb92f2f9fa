"""The config of a run: one frozen, typed RunConfig out of YAML and overrides."""

from __future__ import annotations

from finetune.config.adapter import PROJECTIONS, AdapterSection
from finetune.config.base import BaseSection
from finetune.config.data import DataSection, Source
from finetune.config.eval import EvalSection
from finetune.config.fast import FastSection
from finetune.config.run import RunSection
from finetune.config.schema import RunConfig
from finetune.config.train import TrainSection

__all__ = [
    "PROJECTIONS",
    "AdapterSection",
    "BaseSection",
    "DataSection",
    "EvalSection",
    "FastSection",
    "RunConfig",
    "RunSection",
    "Source",
    "TrainSection",
]
