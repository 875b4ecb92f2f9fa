"""The explicit table of recipes: one training method, one file."""

from __future__ import annotations

from collections.abc import Callable

from finetune.recipes import pretrain, sft
from finetune.recipes.assembly import Parts
from finetune.trainer import OurSeams

RECIPES: dict[str, Callable[[Parts], OurSeams]] = {
    "sft": sft.build,
    "pretrain": pretrain.build,
}

__all__ = ["RECIPES", "Parts"]
