"""Where tensors are, or would be: a plan counts a GPU's memory on tensors of the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_as_on_gpu: ContextVar[bool] = ContextVar("as_on_gpu", default=False)


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether it is the CPU that computes with a tensor."""
    return tensor.device.type == "cpu" and not _as_on_gpu.get()


@contextlib.contextmanager
def as_on_gpu(yes: bool) -> Iterator[None]:
    """What is done with tensors on the CPU is what would be done with a GPU's."""
    token = _as_on_gpu.set(yes)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)
