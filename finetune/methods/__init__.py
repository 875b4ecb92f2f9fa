"""The table of methods: `adapter.method` -> formula, PEFT's settings, cost. A family is a file."""

from __future__ import annotations

from finetune.config.adapter import AdapterSection
from finetune.methods.in_place import Boft, Hra, Ia3, LnTuning, Miss, Oft
from finetune.methods.inputs import PrefixTuning, PromptTuning, TrainableTokens
from finetune.methods.low_rank import AdaLora, Dora, LoHa, LoKr, Lora, LoraPlus, Vera
from finetune.methods.method import Matrix, Method, shapes_of_layer, targeted

_ALL: tuple[Method, ...] = (
    *(Lora(), Dora(), LoraPlus(), AdaLora(), Vera(), LoHa(), LoKr()),
    *(Oft(), Boft(), Hra(), Ia3(), Miss(), LnTuning()),
    *(TrainableTokens(), PromptTuning(), PrefixTuning()),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def method_of(adapter: AdapterSection) -> Method:
    """The method of a section that has one (`none` is no adapter)."""
    return METHODS[adapter.method]


def why_not_merged(adapter: AdapterSection) -> str | None:
    """Why this adapter cannot become weights of the base's shape; None where it can.

    The one place that `merge` asks before it starts.
    """
    return None if adapter.method == "none" else method_of(adapter).why_not_merged


__all__ = ["METHODS", "Matrix", "Method", "method_of", "shapes_of_layer", "targeted"]
__all__ += ["why_not_merged"]
