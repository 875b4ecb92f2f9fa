"""A linear layer without an adapter of ours, by the library that `products` chooses.

Layers that nothing is added to, those that train themselves, and the frozen ones inside PEFT's
other methods (DoRA and the rest) are torch's Linear, which takes float32 to MKL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.fast.products import go_to_onednn, times


def goes_to_onednn(layer: Any, x: torch.Tensor, products: bool) -> bool:
    """Whether `linear` is what the layer computes, and gains."""
    plain = layer.bias is None and layer.weight.dtype == x.dtype
    cast = torch.is_autocast_enabled(x.device.type)
    return plain and not cast and go_to_onednn(products, x)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W' by oneDNN.

    Args:
        x: (…, in), float32 on a CPU.
        weight: (out, in).
    """
    # a view that autograd knows of: PEFT's methods add to it in place
    result: torch.Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight)
    return result.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return times(x, weight, onednn=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()  # that of a sum has a stride of 0, which makes oneDNN slow
        dx = times(dy, weight.t(), onednn=True) if ctx.needs_input_grad[0] else None
        dweight = times(dy.t(), x.t(), onednn=True) if ctx.needs_input_grad[1] else None
        return dx, dweight
