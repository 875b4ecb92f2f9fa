"""Matrix products of the library that uses the whole CPU.

torch takes float32 products to MKL, which stops at AVX2 on a CPU that is not Intel's. oneDNN, which
torch has for bfloat16, does not: with the AVX-512 of Zen 5 it is twice as fast. It adds in another
order; float32 stays float32. torch has no switch for it, but a function that its compiler uses.
"""

from __future__ import annotations

import functools
import os

import torch

from finetune import KERNELS_BY_CHOICE
from finetune.fast.place import on_cpu

_SMALL_KERNELS = 128  # those of five sizes of rows


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this machine has AVX-512 that MKL leaves alone; looked up, not timed: the same
    machine adds in the same order every time."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_f")) and str(cpu.get("cpu_name")).startswith("AMD")


def go_to_onednn(wanted: bool, tensor: torch.Tensor) -> bool:
    """Whether products of such a tensor do: what torch takes to MKL, if it is not empty."""
    to_mkl = tensor.dtype == torch.float32 and on_cpu(tensor)
    return wanted and to_mkl and tensor.numel() > 0 and onednn_is_faster()


def makes_kernels(wanted: bool, dtype: torch.dtype) -> bool:
    """Whether a CPU's products of a type are oneDNN's, which makes a kernel for every size of them,
    in 0.4 ms: as long as a product of a small model, so that a step gains by few sizes."""
    if dtype == torch.bfloat16:
        there = torch.backends.mkldnn.is_available()
        return wanted and there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return wanted and dtype == torch.float32 and onednn_is_faster()


def keep_small_kernels() -> None:
    """Keeps the kernels of more sizes, for bfloat16 products: theirs are small, where those of
    float32 have room for a weight each. Call it before the first product: oneDNN looks once."""
    if not KERNELS_BY_CHOICE:
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(_SMALL_KERNELS)


def times(x: torch.Tensor, weight: torch.Tensor, onednn: bool = False) -> torch.Tensor:
    """x · weight'.

    Args:
        x: (rows, in), in any order in memory, like the others.
        weight: (out, in).
        onednn: by `go_to_onednn`.
    """
    if onednn:
        linear = torch.ops.mkldnn._linear_pointwise.default
        return linear(x, weight, None, "none", [], "")
    return torch.mm(x, weight.t())


def plus_times(
    total: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    onednn: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    """total + scale · x · weight'; may be `total` itself, changed.

    Args:
        total: (rows, out), that nobody needs afterwards.
    """
    if onednn:
        linear = torch.ops.mkldnn._linear_pointwise.binary
        x = x if scale == 1 else x * scale
        return linear(x, total, weight, None, "add")
    return total.addmm_(x, weight.t(), alpha=scale)


@torch.library.register_fake("mkldnn::_linear_pointwise.binary")
def _result_of_linear(x: torch.Tensor, total: torch.Tensor, *_: object) -> torch.Tensor:
    """What a plan counts of `plus_times`; of `times`, torch says it itself."""
    return torch.empty_like(total)
