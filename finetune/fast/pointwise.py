"""RMSNorm, rotary embedding and SwiGLU, each as one autograd function that keeps its inputs alone.

transformers writes them as five to ten operations each, all of which keep an activation. Between
matrix products these passes over memory are what a step spends its remaining time on. Arithmetic is
in float32, as there; the result has the input's type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension.

    Source: arXiv 1910.07467, equation 4.
    """
    result: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return result


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the layout of Hugging Face: halves, not pairs.

    Args:
        x: (batch, heads, tokens, head_dim).
        cos: (batch, tokens, head_dim), of which both halves are equal; sin likewise.

    Source: arXiv 2104.09864, equation 34.
    """
    result: torch.Tensor = _Rotation.apply(x, cos, sin)
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up. Source: arXiv 2002.05202, equation 6."""
    result: torch.Tensor = _SwiGlu.apply(gate, up)
    return result


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What `swiglu` is, for whoever writes its gradients himself."""
    return F.silu(gate).mul_(up)


def swiglu_gradients(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of gate and up.

    Args:
        dy: gradient of `swiglu`.
        out: takes that of gate; may be `dy` itself.
    """
    dup = F.silu(gate).mul_(dy)
    dgate = torch.mul(dy, up, out=out)
    return torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate), dup


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(_wide(x.dtype))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, dnormed = x.to(scale.dtype), dy.to(scale.dtype)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dnormed * wide * scale).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        dnormed = dnormed * weight
        along = (dnormed * wide).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        dx = dnormed.mul_(scale).addcmul_(wide, along)
        return dx.to(x.dtype), dweight, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.dtype = x.dtype
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, -1).to(ctx.dtype), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    result, sin = x * cos.unsqueeze(1), sin[..., :half].unsqueeze(1)
    result[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    result[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return result


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_gradients(gate, up, dy)
