"""Every weight of a merged folder: the base's with PEFT's own update, or the base's alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.model import Base
from finetune.skeleton import Skeleton, Weights

# Every merged entry is a nearest number of its type to W + s·B·A: half a unit in the last place,
# and what the float32 product B·A itself may be off, relative to its largest entry in the same
# block of rows. A limit relative to W would let a wrong scale pass wherever the update is small.
WEIGHT_ULPS = 0.51
UPDATE_ROUNDING = 1e-5
_BLOCK_ENTRIES = 1 << 18  # a few such blocks stay in the processor's cache
_READ_ENTRIES = 1 << 22
_MOST_THREADS = 4
_BITS = {
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}


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
        found = dict(merged.named_parameters())
        pairs = {key: (found[key], module) for key, module in targeted.items()}
        self._worst += errors_in_ulps(list(pairs.values()))
        for key, weight in found.items():
            if _same(weight, base[key]) == (key in targeted):
                (self._unchanged if key in targeted else self._unasked).append(f"{name}.{key}")

    def outside_layers(self, attached: Skeleton, merged: Skeleton) -> None:
        """Compares embedding and head, by rows, and the names of all weights."""
        names = self._attached.names()
        if self._base.architecture.tie_word_embeddings:
            names -= {"lm_head.weight"}
        self._unasked += sorted(names ^ self._merged.names())
        apart = [n for n in names & self._merged.names() if ".layers." not in n]
        for name in sorted(set(apart) - {"model.norm.weight"}):  # which was among the layers
            if not self._same_rows(name, attached.dtype, merged.dtype):
                self._unasked.append(name)

    def _same_rows(self, name: str, attached: torch.dtype, merged: torch.dtype) -> bool:
        shape = self._merged.shape(name)
        if shape != self._attached.shape(name):
            return False
        step = max(_READ_ENTRIES // max(shape[-1], 1), 1)
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


def errors_in_ulps(pairs: Sequence[tuple[torch.Tensor, Any]]) -> list[float]:
    """`error_in_ulps` of several matrices and their layers, where it can be one thread for each.

    All of torch's threads at one block would wait for one another at every step of it.
    """
    if not all(_is_plain_lora(layer) for _, layer in pairs):  # these take memory for a whole matrix
        return [error_in_ulps(found, layer) for found, layer in pairs]
    before = torch.get_num_threads()
    workers = min(before, _MOST_THREADS)
    try:
        with ThreadPoolExecutor(workers, "proof", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(lambda pair: error_in_ulps(*pair), pairs))
    finally:
        torch.set_num_threads(before)


def error_in_ulps(found: torch.Tensor, layer: Any) -> float:
    """Largest |merged - (W + delta)| of a matrix in units of the merged type's last place."""
    found = found.detach()
    if not _is_plain_lora(layer):
        whole = _merged_by_peft(layer)
        return _largest(_block_error(found[rows], whole[rows], None) for rows in _row_blocks(found))
    base = layer.get_base_layer().weight.detach()
    return _largest(
        _block_error(found[rows], base[rows], _delta_of(layer, rows)) for rows in _row_blocks(found)
    )


def _largest(values: Iterable[float]) -> float:
    """The largest, or NaN if one is: Python's own `max` may lose it."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _is_plain_lora(layer: Any) -> bool:
    return isinstance(layer, LoraLayer) and not getattr(layer, "use_dora", {}).get("default")


def _merged_by_peft(layer: Any) -> torch.Tensor:
    """PEFT's whole merged weight, float64."""
    merged: Any = copy.deepcopy(layer).double()
    merged.merge(adapter_names=["default"])
    whole: torch.Tensor = merged.get_base_layer().weight.detach()
    return whole


def _delta_of(layer: Any, rows: slice) -> torch.Tensor:
    """Some rows of PEFT's own update of a low-rank layer, float32: B is cut for the moment."""
    parameters = layer.lora_B["default"]._parameters
    whole = parameters["weight"]
    parameters["weight"] = torch.nn.Parameter(whole[rows], requires_grad=False)
    try:
        delta: torch.Tensor = layer.get_delta_weight("default").detach()
    finally:
        parameters["weight"] = whole
    return delta


def _row_blocks(matrix: torch.Tensor) -> Iterator[slice]:
    step = max(_BLOCK_ENTRIES // matrix.shape[-1], 1)
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


def _block_error(found: torch.Tensor, base: torch.Tensor, delta: torch.Tensor | None) -> float:
    """In a type with bits to spare: float32 for 16 bits, where it is off by 2^-13 places.

    Where base and delta nearly cancel, that rounding is far below what the product may be off.
    """
    wide = torch.float32 if found.itemsize == 2 and delta is not None else torch.float64
    expected = base.to(wide, copy=True)
    error = found.to(wide, copy=True).sub_(expected)
    slack = 0.0
    if delta is not None:
        slack = UPDATE_ROUNDING * float(torch.linalg.vector_norm(delta, torch.inf))
        error.sub_(delta)
        expected.add_(delta)
    error.abs_().sub_(slack)
    limits = torch.finfo(found.dtype)
    return float(error.div_(_power_of_two(expected, limits.smallest_normal)).max()) / limits.eps


def _power_of_two(numbers: torch.Tensor, smallest: float) -> torch.Tensor:
    """The power of two at or below the size of each number, made in their memory.

    A number just above one counts as below it: last places are half as wide there.
    """
    numbers.mul_(1 - 4 * torch.finfo(numbers.dtype).eps)
    bits, exponent = _BITS[numbers.dtype]
    numbers.view(bits).bitwise_and_(exponent)  # of NaN it leaves infinity
    return numbers.clamp_(min=smallest)


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
