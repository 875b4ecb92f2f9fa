"""Weights as a quantised base holds them: rounded to bitsandbytes' codes, then numbers again.

An adapter trained on a quantised base has learnt to correct those rounded weights. Merged into
them it gives the model that was trained; merged into the weights on disk it gives a model whose
base is better and whose adapter is slightly off. Never into the codes: 4 bits cannot hold the sum.
Source: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314.
"""

from __future__ import annotations

import torch


def is_quantized(quantization: str, name: str) -> bool:
    """Whether a quantised base holds this tensor in codes: the linear layers but the head."""
    return quantization != "none" and name.endswith("_proj.weight")


def dequantized(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """A matrix after a way into the codes and back, in its own type."""
    from bitsandbytes import functional

    if quantization == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(codes, scales).to(weight.dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type=quantization
    )
    return functional.dequantize_4bit(packed, state).to(weight.dtype)
