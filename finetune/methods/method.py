"""What every method of fine-tuning says of itself, and the matrices it may act on.

Nothing here imports torch when it is imported: `plan` counts with the same formulas that training
is tested against.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finetune.config.adapter import AdapterSection
from finetune.errors import InputError
from finetune.llama.architecture import Architecture

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Matrix:
    """A linear layer of the base.

    Attributes:
        name: as transformers names it, `model.layers.0.self_attn.q_proj`.
        num_in: columns of its weight.
        num_out: rows of its weight.
    """

    name: str
    num_in: int
    num_out: int


class Method(abc.ABC):
    """A method: its settings -> PEFT's, and its number of trainable parameters in closed form.

    Attributes:
        name: `adapter.method`.
        why_not_merged: why no weights of the base's shape do what it does; None where some do.
    """

    name: ClassVar[str]
    why_not_merged: ClassVar[str | None] = None

    @abc.abstractmethod
    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's settings.

        Args:
            base_name: what the user wrote as the base; never made absolute.
        """

    @abc.abstractmethod
    def num_trainable(self, adapter: AdapterSection, arch: Architecture) -> int:
        """Trainable parameters."""

    def num_frozen(self, adapter: AdapterSection, arch: Architecture) -> int:
        """Numbers that it holds beside the base and never trains."""
        return 0

    @abc.abstractmethod
    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """What does not fit this base, as `adapter.key: …`; nothing where all is well."""


class MatrixMethod(Method):
    """A method that acts on each targeted matrix by itself."""

    @abc.abstractmethod
    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """Trainable parameters on one matrix."""

    def num_trainable(self, adapter: AdapterSection, arch: Architecture) -> int:
        """The sum over the targeted matrices."""
        return sum(self.num_of(matrix, adapter) for matrix in targeted(adapter, arch))

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """Targets and layers that the base does not have."""
        return list(_target_findings(adapter, arch))


def common(base_name: str) -> dict[str, Any]:
    """Settings that every method of PEFT has."""
    return {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name}


def where(adapter: AdapterSection) -> dict[str, Any]:
    """PEFT's settings of the layers that get an adapter."""
    return {
        "target_modules": list(adapter.target_modules),
        "layers_to_transform": list(adapter.layers) or None,
    }


def shapes_of_layer(arch: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer of a block, by PEFT's name."""
    kv_width = arch.n_kv_heads * arch.head_dim
    dim, wide = arch.dim, arch.intermediate_size
    return {
        "q_proj": (dim, dim),
        "k_proj": (dim, kv_width),
        "v_proj": (dim, kv_width),
        "o_proj": (dim, dim),
        "gate_proj": (dim, wide),
        "up_proj": (dim, wide),
        "down_proj": (wide, dim),
    }


def targeted(adapter: AdapterSection, arch: Architecture) -> list[Matrix]:
    """The matrices that `target_modules` and `layers` name.

    Raises:
        InputError: a name or a layer that the base does not have.
    """
    findings = list(_target_findings(adapter, arch))
    if findings:
        raise InputError(findings)
    shapes = shapes_of_layer(arch)
    return [
        Matrix(_full_name(layer, name), *shapes[name])
        for layer in adapter.layers or range(arch.n_layers)
        for name in adapter.target_modules
    ]


def _full_name(layer: int, name: str) -> str:
    part = "self_attn" if name in ATTENTION else "mlp"
    return f"model.layers.{layer}.{part}.{name}"


def _target_findings(adapter: AdapterSection, arch: Architecture) -> list[str]:
    findings, shapes = [], shapes_of_layer(arch)
    unknown = [name for name in adapter.target_modules if name not in shapes]
    if unknown:
        findings.append(
            f"adapter.target_modules: {', '.join(unknown)} matches no linear layer of the base; "
            f"it has {', '.join(sorted(shapes))}"
        )
    beyond = [str(layer) for layer in adapter.layers if layer >= arch.n_layers]
    if beyond:
        findings.append(
            f"adapter.layers: found {', '.join(beyond)}; the base has layers 0 to "
            f"{arch.n_layers - 1}"
        )
    return findings or _pattern_findings(adapter, arch)


def _pattern_findings(adapter: AdapterSection, arch: Architecture) -> list[str]:
    names = [
        _full_name(layer, name)
        for layer in adapter.layers or range(arch.n_layers)
        for name in adapter.target_modules
    ]
    return [
        f"adapter.{key}: {pattern!r} matches none of the targeted layers, such as {names[0]}"
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(adapter, key)
        if not any(_matches(pattern, name) for name in names)
    ]


def of_pattern(pattern: Mapping[str, int], name: str, default: int) -> int:
    """The value for a layer: of the first pattern that is the end of its name, as PEFT matches."""
    return next((value for key, value in pattern.items() if _matches(key, name)), default)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False
