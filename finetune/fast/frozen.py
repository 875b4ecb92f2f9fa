"""The frozen weight below an adapter: as it is, or packed in 4 bits and unpacked for each product.

bitsandbytes' layers unpack a weight for each product too, forward and backward; what is read here
are the same numbers. No layer keeps them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear


@dataclass(frozen=True)
class Packing:
    """How a packed weight is read.

    Attributes:
        dtype: of its products.
        unpack: (out, in) of the packed tensor.
    """

    dtype: torch.dtype
    unpack: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FrozenWeight:
    """Of a linear layer.

    Attributes:
        tensor: (out, in), or packed.
        packing: None where it is not packed.
    """

    tensor: torch.Tensor
    packing: Packing | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of its products."""
        return self.tensor.dtype if self.packing is None else self.packing.dtype


def unpacked(tensor: torch.Tensor, packing: Packing | None, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a `FrozenWeight`, (out, in)."""
    return (tensor if packing is None else packing.unpack(tensor)).to(dtype)


class PackedStandIn(torch.nn.Linear):
    """A layer of a plan: its products take the memory of a packed one's, without bitsandbytes."""


def stand_in_for_packed(model: torch.nn.Module) -> None:
    """Makes a `PackedStandIn` of every linear layer."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = PackedStandIn


def frozen_weight_of(layer: Any) -> FrozenWeight | None:
    """Of PEFT's LoRA layer; None where its frozen layer is neither plain nor packed in 4 bits.

    8 bits are not: on a GPU, their products round the input too.
    """
    kind: type = type(layer)
    if kind not in (Linear, _peft_4_bit_layer()):
        return None
    base = layer.base_layer
    if base.bias is not None or base.weight.requires_grad:
        return None
    if kind is not Linear:
        return _packed_in_4_bits(base)
    if type(base) is PackedStandIn:
        return FrozenWeight(base.weight, Packing(base.weight.dtype, torch.clone))
    return FrozenWeight(base.weight) if type(base) is torch.nn.Linear else None


def _peft_4_bit_layer() -> type | None:
    """There where bitsandbytes is installed."""
    module = sys.modules.get("peft.tuners.lora.bnb")
    return getattr(module, "Linear4bit", None)


def _packed_in_4_bits(base: Any) -> FrozenWeight | None:
    import bitsandbytes

    state = getattr(base.weight, "quant_state", None)
    known = type(base) is bitsandbytes.nn.Linear4bit and state is not None
    if not known or base.compute_dtype is None or getattr(state, "packing_format_for_cpu", False):
        return None

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return bitsandbytes.functional.dequantize_4bit(packed.detach(), state)

    return FrozenWeight(base.weight, Packing(base.compute_dtype, unpack))
