"""What an adapter does to one matrix: the one object that knows a method's arithmetic.

Low-rank updates are added here; every other method PEFT can merge goes through
`adapters.merged_weight`, PEFT's own arithmetic on that one layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key

from finetune import artifact
from finetune.adapters import ADAPTER_FILES
from finetune.errors import CheckFailed
from finetune.identity import settings_of
from finetune.layer_merge import SHARED, merged_weight
from finetune.llama.safetensors_pieces import Stored, stored_tensors

PREFIX = "base_model.model."
# Trainable tokens of a tied base are in the file twice; a merge writes the embedding alone.
TIED_TWIN = f"{PREFIX}lm_head.trainable_tokens_delta"
_CACHED_ENTRIES = 1 << 19  # 2 MiB in float32; on whole blocks of 16 MiB it took twice as long
_LOW_RANK = {"lora_A.weight", "lora_B.weight"}
_MergedWeight = Callable[[PeftConfig, Mapping[str, torch.Tensor], str, torch.Tensor], torch.Tensor]


class Update(Protocol):
    """The change of one matrix."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of the adapter's tensors it is made of."""
        ...

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(out, in) of the matrix it fits, or None where only applying it tells."""
        ...

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The merged matrix, computed in float32 at least; `weight` is (out, in), of any type."""
        ...


def by_rows(
    shape: torch.Size, dtype: torch.dtype, num_entries: int, wide: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """A matrix made of some rows at a time, in float32, each rounded to the type when it is made.

    Args:
        num_entries: at once, or one row where that is longer.
        wide: rows -> them in float32.
    """
    merged = torch.empty(shape, dtype=dtype)
    step = max(num_entries // shape[1], 1)
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        merged[rows] = wide(rows)
    return merged


@dataclass(frozen=True)
class LowRank:
    """W + s·B·A with A (r, in), B (out, r). Source: Hu et al. 2021, arXiv:2106.09685.

    A and B stay in the file until they are asked for: memory does not grow with the model.
    """

    stored_a: Stored
    stored_b: Stored
    scale: float

    @property
    def a(self) -> torch.Tensor:
        """(r, in), float32."""
        return self.stored_a.read().float()

    @property
    def b(self) -> torch.Tensor:
        """(out, r), float32."""
        return self.stored_b.read().float()

    @property
    def parts(self) -> Sequence[str]:
        """Names of A and B in the adapter."""
        return (self.stored_a.name, self.stored_b.name)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of B·A."""
        return (self.stored_b.shape[0], self.stored_a.shape[1])

    def rows(self, start: int, stop: int) -> LowRank:
        """The update of some rows of the matrix."""
        return replace(self, stored_b=self.stored_b.rows(start, stop))

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W + s·B·A in float32, rounded once; as many rows at a time as stay in a cache."""
        a, b = self.a, self.b

        def wide(rows: slice) -> torch.Tensor:
            base = weight[rows].to(torch.float32, copy=True)
            return base.addmm_(b[rows], a, alpha=self.scale)

        return by_rows(weight.shape, dtype, _CACHED_ENTRIES, wide)


@dataclass(frozen=True)
class ByPeft:
    """Any method that PEFT merges, on one layer at a time.

    Attributes:
        config: the adapter's settings.
        stored: its tensors of this layer, by their name in the adapter.
        module: the layer's name in the base.
        merge: `adapters.merged_weight`.
    """

    config: PeftConfig
    stored: Mapping[str, Stored]
    module: str
    merge: _MergedWeight
    shape: tuple[int, ...] | None = None

    @property
    def parts(self) -> Sequence[str]:
        """Names of the tensors."""
        return tuple(self.stored)

    def apply(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """PEFT's merged matrix, computed in float64, rounded to float32 and then to the type.

        In float32, norms (DoRA), products (LoHa) and rotations (OFT) are off by many units in the
        last place of the small entries.
        """
        tensors = {name: stored.read() for name, stored in self.stored.items()}
        return self.merge(self.config, tensors, self.module, weight.double()).float().to(dtype)


def read_updates(folder: Path) -> dict[str, Update]:
    """The update of every matrix a PEFT folder changes, by the base's tensor name.

    Raises:
        CheckFailed: an A without its B, a key that is neither, settings that cannot be used, or a
            method that is not merged.
    """
    every = stored_tensors(folder / ADAPTER_FILES[1])
    with settings_of(folder, _modules_of(every)):
        return _updates_in(folder, every)


def _modules_of(every: Sequence[Stored]) -> set[str]:
    """The modules that the tensors name, and those that these lie in."""
    modules = {_split(stored.name)[0] for stored in every}
    return {name for module in modules for name in itertools.accumulate(module.split("."), _join)}


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}"


def _updates_in(folder: Path, every: Sequence[Stored]) -> dict[str, Update]:
    settings = artifact.read_json(folder / ADAPTER_FILES[0])
    by_module: dict[str, dict[str, Stored]] = {}
    shared = {stored.name: stored for stored in every if stored.name in SHARED}
    for stored in every:
        if stored.name in shared or stored.name.startswith(TIED_TWIN):
            continue
        module, part = _split(stored.name)
        by_module.setdefault(module, {})[part] = stored
    if not _is_low_rank(settings):
        return _by_peft(folder, {m: {**parts, **shared} for m, parts in by_module.items()})
    broken = [module for module, parts in by_module.items() if set(parts) != _LOW_RANK]
    if broken or not by_module:
        named = ", ".join(broken[:8]) or "empty"
        raise CheckFailed(f"{folder}: not pairs of lora_A and lora_B: {named}")
    return {
        f"{module}.weight": LowRank(
            parts["lora_A.weight"], parts["lora_B.weight"], scale_of(settings, module, parts)
        )
        for module, parts in sorted(by_module.items())
    }


def _split(key: str) -> tuple[str, str]:
    """`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`: the module, `lora_A.weight`."""
    names = key.removeprefix(PREFIX).split(".")
    if names[-1] == "trainable_tokens_delta":
        return ".".join(names[:-1]), names[-1]
    depth = next((n for n, name in enumerate(names) if name.endswith("_proj")), len(names) - 3)
    return ".".join(names[: depth + 1]), ".".join(names[depth + 1 :])


def _is_low_rank(settings: Mapping[str, Any]) -> bool:
    variants = ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "alora_invocation_tokens")
    return settings.get("peft_type") == "LORA" and not any(settings.get(v) for v in variants)


def scale_of(settings: Mapping[str, Any], module: str, parts: Mapping[str, Stored]) -> float:
    """lora_alpha / r, or / sqrt(r) for rsLoRA; r is A's own, alpha may be the module's own."""
    rank = parts["lora_A.weight"].shape[0]
    pattern: Mapping[str, float] = settings.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(list(pattern), module), settings["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _by_peft(folder: Path, by_module: Mapping[str, Mapping[str, Stored]]) -> dict[str, Update]:
    config = PeftConfig.from_pretrained(str(folder))
    return {
        f"{module}.weight": ByPeft(
            config, {stored.name: stored for stored in parts.values()}, module, merged_weight
        )
        for module, parts in sorted(by_module.items())
    }
