"""What the backward pass needs of a GPU's forward pass waits in the computer's memory.

Everything that autograd saves goes there but weights, which stay where they are, and what is small.
Copies run on the stream that computes, in its order: nothing is read before it is written, and
nothing overlaps. Pinned memory is torch's own cache; numbers do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

_SMALL = 1 << 16  # bytes that are not worth a copy


@dataclass(frozen=True)
class Away:
    """A saved tensor that left its device.

    Attributes:
        copy: in the computer's memory, with the strides of the original where it fills its memory.
        device: where it came from.
    """

    copy: torch.Tensor
    device: torch.device


def offloaded(model: torch.nn.Module, kind: str = "cuda") -> saved_tensors_hooks:
    """A context for the forward pass.

    Args:
        model: its parameters and buffers stay.
        kind: of the devices that activations leave.
    """
    held = [*model.parameters(), *model.buffers()]
    stays = {tensor.untyped_storage().data_ptr() for tensor in held}

    def pack(tensor: torch.Tensor) -> torch.Tensor | Away:
        is_small = tensor.nbytes < _SMALL
        if tensor.device.type != kind or is_small or tensor.untyped_storage().data_ptr() in stays:
            return tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return Away(copy.copy_(tensor, non_blocking=True), tensor.device)

    def unpack(saved: torch.Tensor | Away) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return saved.copy.to(saved.device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
