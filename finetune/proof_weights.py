"""Every weight of a merged folder: the base's with PEFT's own update, or the base's alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.model import Base
from finetune.skeleton import Skeleton, Weights

# Every merged entry is a nearest number of its type to W + s·B·A: half a unit in the last place,
# and what the float32 product B·A itself may be off, relative to its largest entry. A limit
# relative to W would let a wrong scale pass wherever the update is small.
WEIGHT_ULPS = 0.51
UPDATE_ROUNDING = 1e-5
_BLOCK_ENTRIES = 1 << 22


class WeightCheck:
    """Collects what is wrong with the weights of a merged model, layer by layer.

    Args:
        base: the base.
        attached: its weights, as they are under the adapter.
        merged: the weights under test.
    """

    def __init__(self, base: Base, attached: Weights, merged: Weights) -> None:
        self._base, self._attached, self._merged = base, attached, merged
        self._worst: list[float] = []
        self._unchanged: list[str] = []
        self._unasked: list[str] = []

    def layer(self, name: str, attached: Any, merged: Any) -> None:
        """Compares two filled layers, the first under PEFT."""
        targeted = {
            f"{path}.weight": module
            for path, module in attached.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        base = {
            key.replace(".base_layer", ""): weight
            for key, weight in attached.named_parameters()
            if ".default" not in key
        }
        for key, found in merged.named_parameters():
            if key in targeted:
                self._worst.append(error_in_ulps(found, targeted[key]))
            if _same(found, base[key]) == (key in targeted):
                (self._unchanged if key in targeted else self._unasked).append(f"{name}.{key}")

    def outside_layers(self, attached: Skeleton, merged: Skeleton) -> None:
        """Compares embedding, final norm and head, by rows, and the names of all weights."""
        names = self._attached.names()
        if self._base.architecture.tie_word_embeddings:
            names -= {"lm_head.weight"}
        self._unasked += sorted(names ^ self._merged.names())
        for name in sorted(n for n in names & self._merged.names() if ".layers." not in n):
            if not self._same_rows(name, attached.dtype, merged.dtype):
                self._unasked.append(name)

    def _same_rows(self, name: str, attached: torch.dtype, merged: torch.dtype) -> bool:
        shape = self._merged.shape(name)
        if shape != self._attached.shape(name):
            return False
        step = max(_BLOCK_ENTRIES // max(shape[-1], 1), 1)
        return all(
            _same(self._merged.rows(name, i, i + step), self._attached.rows(name, i, i + step))
            for i in range(0, shape[0], step)
        )

    def as_json(self) -> dict[str, Any]:
        """The proof's figures."""
        return {
            "max_weight_error_ulps": float(torch.tensor(self._worst).max()),
            "unchanged": self._unchanged,
            "changed_unasked": self._unasked,
        }


def _same(found: torch.Tensor, base: torch.Tensor) -> bool:
    return torch.equal(found, base.detach().to(found.dtype))


def error_in_ulps(found: torch.Tensor, layer: Any) -> float:
    """Largest |merged - (W + delta)| of a matrix in units of the merged type's last place."""
    worst = []
    delta, whole = _delta_of(layer)
    slack = UPDATE_ROUNDING * float(delta.abs().max()) if whole is None else 0.0
    base = layer.get_base_layer().weight.detach()
    for rows in _row_blocks(found):
        expected = whole[rows] if whole is not None else base[rows].double() + delta[rows].double()
        worst.append(_block_error(found[rows].detach(), expected, slack))
    return float(torch.tensor(worst).max())


def _delta_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """PEFT's own update of a low-rank layer, float32; or PEFT's whole merged weight, float64."""
    if isinstance(layer, LoraLayer) and not getattr(layer, "use_dora", {}).get("default"):
        delta: torch.Tensor = layer.get_delta_weight("default").detach()
        return delta, None
    merged: Any = copy.deepcopy(layer).double()
    merged.merge(adapter_names=["default"])
    whole: torch.Tensor = merged.get_base_layer().weight.detach()
    return whole, whole


def _row_blocks(matrix: torch.Tensor) -> Iterator[slice]:
    step = max(_BLOCK_ENTRIES // matrix.shape[-1], 1)
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


def _block_error(found: torch.Tensor, expected: torch.Tensor, slack: float) -> float:
    limits = torch.finfo(found.dtype)
    _, exponent = torch.frexp(expected.abs().clamp(min=limits.smallest_normal))
    last_place = torch.ldexp(torch.full_like(expected, limits.eps / 2), exponent)
    return float((((found.double() - expected).abs() - slack) / last_place).max())


def bnb_dequantized(name: str, weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """A weight as a quantised base computes with it, through bitsandbytes' parameters."""
    if quantization == "none" or not name.endswith("_proj.weight"):
        return weight
    import bitsandbytes
    from peft.utils.integrations import dequantize_bnb_weight

    if quantization == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, False, has_fp16_weights=False)
        layer = layer.to("cpu")
        return dequantize_bnb_weight(layer.weight, layer.state).to(weight.dtype)
    packed = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type=quantization
    ).to("cpu")
    return dequantize_bnb_weight(packed).to(weight.dtype)
