"""What ranks tell each other: sums of tensors, and small objects. One rank tells itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def sum_over_ranks(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sums a float64 tensor over the ranks; one rank: the value itself."""
    if not dist.is_initialized():
        return value
    value = value.clone().to(device)
    dist.all_reduce(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, by rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
