"""In which type the products of a step are taken."""

from __future__ import annotations

import torch

from finetune.config import RunConfig


def uses_bf16_autocast(config: RunConfig, device: str | None = None) -> bool:
    """Whether the forward pass is autocast: `auto` is yes where the device has bfloat16 units and
    the base is not held in bfloat16 already.

    Args:
        device: `cuda` or `cpu`; None is the one that would train.
    """
    if config.train.bf16 != "auto":
        return config.train.bf16
    if config.base.dtype != "float32":
        return False
    if device == "cuda" and not torch.cuda.is_available():
        return True  # a device that is planned for
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def multiplies_in_bf16(config: RunConfig, device: str | None = None) -> bool:
    """Whether a step's products are in bfloat16: those of the base, or under autocast."""
    return config.base.dtype == "bfloat16" or uses_bf16_autocast(config, device)
