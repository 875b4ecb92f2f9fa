"""The frozen weight below an adapter: as it is, or packed in 4 bits and unpacked for each product.

bitsandbytes' layers unpack a weight for each product too, forward and backward, to the same
numbers. Under autocast they multiply in their own type; here autocast decides, as over any base.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Packing:
    """How a packed weight is read.

    Attributes:
        dtype: of its products.
        unpack: (out, in) of the packed tensor, in a type.
    """

    dtype: torch.dtype
    unpack: Callable[[torch.Tensor, torch.dtype], torch.Tensor]


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
    return tensor.to(dtype) if packing is None else packing.unpack(tensor, dtype)


class PackedStandIn(torch.nn.Linear):
    """A layer of a plan: its products take the memory of a packed one's, without bitsandbytes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W', of a copy of W that is gone afterwards, as in the backward pass."""
        result: torch.Tensor = _Unpacking.apply(x, self.weight)
        return result


def _copied(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype, copy=True)


class _Unpacking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x, _copied(weight, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return torch.matmul(dy, _copied(weight, dy.dtype)), None


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
        return FrozenWeight(base.weight, Packing(base.weight.dtype, _copied))
    return FrozenWeight(base.weight) if type(base) is torch.nn.Linear else None


def _peft_4_bit_layer() -> type | None:
    """There where bitsandbytes is installed."""
    module = sys.modules.get("peft.tuners.lora.bnb")
    return getattr(module, "Linear4bit", None)


def _packed_in_4_bits(base: Any) -> FrozenWeight | None:
    import bitsandbytes

    state: Any = getattr(base.weight, "quant_state", None)
    known = type(base) is bitsandbytes.nn.Linear4bit and state is not None
    if not known or base.compute_dtype is None or getattr(state, "packing_format_for_cpu", False):
        return None

    def unpack(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        asked = copy.copy(state)
        asked.dtype = dtype  # rounded once, from bitsandbytes' float32
        return bitsandbytes.functional.dequantize_4bit(packed.detach(), asked)

    return FrozenWeight(base.weight, Packing(base.compute_dtype, unpack))
