"""The adapter's linear layers as one autograd function: no activation is copied or cast twice.

    y_i = x W_i' + s_i (x A_i') B_i'          for the projections i that read the same x

PEFT runs this as five operations a projection, keeps the activations of each, and computes the
adapter in float32 beside a bfloat16 base, with a copy of x in each type. Here x is read once for
all A_i, B_i is added by the matrix product itself, the gradients of x are summed by the products
too, and only x and x A' are kept; of the down projection, not x but gate and up, which make it.
Products are in the type of the base (or of autocast); A and B stay float32, and so do their
gradients.

Source: LoRA (arXiv 2106.09685), equation 3; the gradients are its chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable

from finetune.fast.frozen import FrozenWeight, Packing, frozen_weight_of, unpacked
from finetune.fast.pointwise import gated, swiglu_gradients
from finetune.fast.products import go_to_onednn, plus_times, times


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and its adapter.

    Attributes:
        weight: (out, in).
        down: A, (r, in).
        up: B, (out, r).
        scaling: factor of the adapter.
        dropout: on the adapter's input; None where it does nothing.
    """

    weight: FrozenWeight
    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    dropout: torch.nn.Module | None


def projection_of(layer: Any) -> Projection | None:
    """What `project` needs of a layer; None where it is not plain LoRA.

    Plain is: a `torch.nn.Linear` or bitsandbytes' of 4 bits under exactly one active adapter,
    without bias, without a variant (DoRA and its like), neither merged nor disabled. Everything
    else stays PEFT's own.
    """
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    weight, active = frozen_weight_of(layer), layer.active_adapters
    if weight is None:
        return None
    if len(active) != 1 or active[0] not in layer.lora_A or active[0] in layer.lora_variant:
        return None
    name = active[0]
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if up.bias is not None or _has_hooks(layer) or _has_hooks(layer.base_layer):
        return None
    acts = isinstance(dropout, torch.nn.Dropout) and dropout.p > 0 and layer.training
    return Projection(
        weight, down.weight, up.weight, layer.scaling[name], dropout if acts else None
    )


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def project(
    x: torch.Tensor, projections: Sequence[Projection], products: bool = True
) -> tuple[torch.Tensor, ...]:
    """y_i of every projection of one input.

    Args:
        x: (…, in).
        products: by the faster library.

    Returns:
        (…, out_i) each, in the type of the base, or of autocast where it is on.
    """
    dropped = [None if p.dropout is None else p.dropout(x) for p in projections]
    return _applied(x, None, projections, products, dropped)


def project_swiglu(
    gate: torch.Tensor, up: torch.Tensor, projection: Projection, products: bool = True
) -> torch.Tensor:
    """`project` of silu(gate) · up, which the backward pass makes again: gate and up are kept.

    Args:
        gate: (…, in), like up.
        projection: without dropout.
    """
    return _applied(gate, up, [projection], products, [None])[0]


def _applied(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    projections: Sequence[Projection],
    products: bool,
    dropped: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, ...]:
    tensors = [t for p in projections for t in (p.weight.tensor, p.down, p.up)]
    scalings = [p.scaling for p in projections]
    packings = [p.weight.packing for p in projections]
    dtype = type_of_products(x, projections[0].weight.dtype)
    result: tuple[torch.Tensor, ...] = _Projections.apply(
        x, factor, dtype, products, scalings, packings, *dropped, *tensors
    )
    return result


def type_of_products(x: torch.Tensor, weight: torch.dtype) -> torch.dtype:
    """The weight's type, or that of autocast where it is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and weight != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight


class _Projections(torch.autograd.Function):
    """`project`, with its gradients written out; of silu(x) · factor where there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        factor: torch.Tensor | None,
        dtype: torch.dtype,
        products: bool,
        scalings: list[float],
        packings: list[Packing | None],
        *tensors: Any,
    ) -> tuple[torch.Tensor, ...]:
        n = len(scalings)
        dropped, weights = tensors[:n], tensors[n:]
        triples = [weights[i : i + 3] for i in range(0, 3 * n, 3)]
        flat = _input(x, factor, dtype)
        inputs = [None if d is None else _rows(d, dtype) for d in dropped]
        onednn = go_to_onednn(products, flat)
        with torch.autocast(x.device.type, enabled=False):
            downs = [down.to(dtype) for _, down, _ in triples]
            hidden = _through_downs(flat, inputs, downs, onednn)
            outputs = []
            of_each = zip(hidden, triples, packings, scalings, strict=True)
            for h, (weight, _, up), packing, s in of_each:
                y = times(flat, unpacked(weight, packing, dtype), onednn)
                y = plus_times(y, h, up.to(dtype), onednn, scale=s)
                outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.dtype, ctx.scalings, ctx.shape, ctx.x_dtype = dtype, scalings, x.shape, x.dtype
        ctx.packings, ctx.onednn = packings, onednn
        kept = flat if factor is None else x
        ctx.save_for_backward(kept, factor, *inputs, *hidden, *weights)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        n, dtype, onednn = len(ctx.scalings), ctx.dtype, ctx.onednn
        kept, factor, *saved = ctx.saved_tensors
        inputs, hidden, weights = saved[:n], saved[n : 2 * n], saved[2 * n :]
        triples = [weights[i : i + 3] for i in range(0, 3 * n, 3)]
        # the gradient of a sum is one number with a stride of 0, which makes oneDNN slow
        dys = [_rows(grad, dtype).contiguous() for grad in grads]
        ups = [up.to(dtype) * s for (_, _, up), s in zip(triples, ctx.scalings, strict=True)]
        with torch.autocast(kept.device.type, enabled=False):
            dups = [
                _transposed(h, dy, onednn).to(up.dtype).mul_(s)
                for dy, h, (_, _, up), s in zip(dys, hidden, triples, ctx.scalings, strict=True)
            ]
            dhidden = [times(dy, up.t(), onednn) for dy, up in zip(dys, ups, strict=True)]
            flat = _input(kept, factor, dtype)
            ddowns = _down_gradients(flat, inputs, dhidden, [d for _, d, _ in triples], onednn)
            del flat  # where it was made anew, the products below want its memory
            downs = [down.to(dtype) for _, down, _ in triples]
            dx: torch.Tensor | None = None
            dfactor: torch.Tensor | None = None
            ddropped: list[torch.Tensor | None] = [None] * n
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                bases = [weight for weight, _, _ in triples]
                dx = _through_weights(dys, bases, ctx.packings, dtype, onednn)
            for i, (dh, down) in enumerate(zip(dhidden, downs, strict=True)):
                if inputs[i] is not None and ctx.needs_input_grad[6 + i]:
                    ddropped[i] = times(dh, down.t(), onednn).view(ctx.shape).to(ctx.x_dtype)
            if dx is not None:
                shared = [i for i in range(n) if inputs[i] is None]
                if shared:
                    together = torch.cat([dhidden[i] for i in shared], 1)
                    back = torch.cat([downs[i] for i in shared]).t()
                    dx = plus_times(dx, together, back, onednn)
                dx = dx.view(ctx.shape).to(ctx.x_dtype)
                if factor is not None:
                    dx, dfactor = swiglu_gradients(kept, factor, dx, out=dx)
        of_weights = [g for i in range(n) for g in (None, ddowns[i], dups[i])]
        return (dx, dfactor, None, None, None, None, *ddropped, *of_weights)


def _input(x: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What the projections read, (rows, in)."""
    return _rows(x if factor is None else gated(x, factor), dtype)


def _rows(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, width) of (…, width)."""
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)


def _transposed(h: torch.Tensor, dy: torch.Tensor, onednn: bool) -> torch.Tensor:
    """dy' h. Of few rows, oneDNN is eight times as fast as of few columns."""
    return times(h.t(), dy.t(), onednn).t() if onednn else torch.mm(dy.t(), h)


def _through_downs(
    flat: torch.Tensor,
    inputs: Sequence[torch.Tensor | None],
    downs: Sequence[torch.Tensor],
    onednn: bool,
) -> list[torch.Tensor]:
    """x A_i' of all; one product reads x for those that dropout leaves alone."""
    shared = [i for i, own in enumerate(inputs) if own is None]
    found: dict[int, torch.Tensor] = {}
    if shared:
        together = times(flat, torch.cat([downs[i] for i in shared]), onednn)
        parts = together.split([len(downs[i]) for i in shared], dim=1)
        found = dict(zip(shared, parts, strict=True))
    return [
        found[i] if own is None else times(own, downs[i], onednn) for i, own in enumerate(inputs)
    ]


def _through_weights(
    dys: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    packings: Sequence[Packing | None],
    dtype: torch.dtype,
    onednn: bool,
) -> torch.Tensor:
    """The sum of dy_i W_i; one W_i at a time is unpacked."""
    first, *rest = zip(dys, weights, packings, strict=True)
    dx = times(first[0], unpacked(first[1], first[2], dtype).t(), onednn)
    for dy, weight, packing in rest:
        dx = plus_times(dx, dy, unpacked(weight, packing, dtype).t(), onednn)
    return dx


def _down_gradients(
    flat: torch.Tensor,
    inputs: Sequence[torch.Tensor | None],
    dhidden: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    onednn: bool,
) -> list[torch.Tensor]:
    """The gradients of A_i, in its own type."""
    shared = [i for i, own in enumerate(inputs) if own is None]
    found: dict[int, torch.Tensor] = {}
    if shared:
        together = times(torch.cat([dhidden[i] for i in shared], 1).t(), flat.t(), onednn)
        parts = together.split([len(downs[i]) for i in shared])
        found = dict(zip(shared, parts, strict=True))
    return [
        (found[i] if own is None else times(dhidden[i].t(), own.t(), onednn)).to(downs[i].dtype)
        for i, own in enumerate(inputs)
    ]
