"""RunConfig: the whole config, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from finetune.config.adapter import AdapterSection
from finetune.config.base import BaseSection
from finetune.config.conflicts import find_conflicts
from finetune.config.data import DataSection
from finetune.config.eval import EvalSection
from finetune.config.fast import FastSection
from finetune.config.run import RunSection
from finetune.config.section import Section
from finetune.config.train import TrainSection


class RunConfig(Section):
    """Everything a run depends on. Made by `finetune.config.loader.load`."""

    recipe: Literal["sft", "pretrain"]
    """The training method: instruction data (`sft`) or plain text (`pretrain`)."""

    run: RunSection = Field(default_factory=RunSection)
    base: BaseSection = Field(default_factory=BaseSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    fast: FastSection = Field(default_factory=FastSection)
    eval: EvalSection = Field(default_factory=EvalSection)

    @model_validator(mode="after")
    def _without_conflicts(self) -> RunConfig:
        conflicts = find_conflicts(self)
        if conflicts:
            raise ValueError("; ".join(f"{c.paths[0]}: {c.message}" for c in conflicts))
        return self


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

KNOWN_PATHS = ["recipe"] + [
    f"{name}.{key}" for name in SECTIONS for key in SECTIONS[name].model_fields
]
"""Every setting there is, as `section.key`."""


@dataclass(frozen=True)
class Loaded:
    """A config and where each of its values came from.

    Args:
        config: the config.
        origins: `section.key` -> `file:line`, `override` or `default`; for every setting.
        path: the file that was loaded.
    """

    config: RunConfig
    origins: Mapping[str, str]
    path: Path
