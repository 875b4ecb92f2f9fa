"""How long a training step takes on this machine: one decoder layer and the head are timed.

    step = micro-batches · (layers · layer + head) + update of the trained parameters

A layer with its adapter runs forward and backward on random numbers exactly as in `train`, so that
a model of any size is timed in the memory of one layer. Where its micro-batch is too large to run
in seconds, fewer tokens are timed and the time grows with them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune.config import RunConfig
from finetune.fast.allocator import keep_freed_memory
from finetune.footprint import build_layer, head_pass, layer_pass
from finetune.llama.architecture import Architecture

_FLOPS_AT_ONCE = 2e11  # of a timed pass: about a second on two cores
_REPEATS, _ENOUGH_SECONDS = (3, 9), 2.0  # at least and at most; as many as there is time for


@dataclass(frozen=True)
class Seconds:
    """Measured parts of a step.

    Attributes:
        layer: of one decoder layer, forward and backward, on a micro-batch.
        head: of head and loss on its supervised tokens.
        update: of clipping and the optimizer, for all that trains.
        timed_tokens: of the pass that was timed.
    """

    layer: float
    head: float
    update: float
    timed_tokens: int

    def step(self, num_layers: int, micro_batches: int) -> float:
        """Of one optimizer step."""
        return micro_batches * (num_layers * self.layer + self.head) + self.update


def measure(
    config: RunConfig,
    arch: Architecture,
    lengths: list[int],
    supervised: int,
    num_trained: int,
    device: str,
) -> Seconds:
    """Times the parts on `device`.

    Args:
        lengths: tokens of each document of a micro-batch.
        supervised: its trained tokens.
        num_trained: parameters that train.
    """
    if config.fast.allocator and device == "cpu":
        keep_freed_memory()  # as `train` does
    tokens = sum(lengths)
    counts = arch.num_parameters()
    per_token = 4 * (counts.attention + counts.mlp) / arch.n_layers
    chosen = _first(lengths, max(int(_FLOPS_AT_ONCE / per_token), 16))
    with torch.device(device):
        one = layer_pass(build_layer(config, arch), config, arch, chosen, device)
        layer = _timed(lambda: one().sum().backward()) * tokens / sum(chosen)
        few = max(min(supervised, int(_FLOPS_AT_ONCE / (4 * arch.dim * arch.vocab_size))), 1)
        scored = head_pass(config, arch, few, device)
        head = _timed(lambda: scored().sum().backward()) * supervised / few
        update = _timed_update(num_trained)
    recomputed = 4 / 3 if config.train.activation_checkpointing else 1.0
    return Seconds(layer * recomputed, head, update, sum(chosen))


def _first(lengths: list[int], tokens: int) -> list[int]:
    """The first documents, the last of them cut, of so many tokens at most."""
    chosen: list[int] = []
    for length in lengths:
        room = tokens - sum(chosen)
        if room <= 0:
            break
        chosen.append(min(length, room))
    return chosen


def _timed_update(num_trained: int) -> float:
    """AdamW and the norm of the gradients, on a part of the parameters at most."""
    few = min(num_trained, 1 << 24)
    parameter = torch.nn.Parameter(torch.zeros(few))
    optimizer = torch.optim.AdamW([parameter], fused=True)

    def run() -> None:
        parameter.grad = torch.ones_like(parameter)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()

    return _timed(run) * num_trained / few


def _timed(run: Callable[[], Any]) -> float:
    """Median seconds; the first call warms up."""
    least, most = _REPEATS
    run()
    seconds: list[float] = []
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < _ENOUGH_SECONDS):
        _wait()
        began = time.perf_counter()
        run()
        _wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
