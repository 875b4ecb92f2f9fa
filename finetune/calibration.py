"""How long a training step takes on this machine: a decoder layer and the head are timed.

    step = micro-batches · (first + (layers - 2) · middle + last + head) + update of what trains

A layer with its adapter runs forward and backward on random numbers exactly as in `train`, once in
each place, so that a model of any size is timed in the memory of one layer. Where its micro-batch
is too large to run in seconds, fewer tokens are timed and the time grows with them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.config import RunConfig
from finetune.fast.allocator import keep_freed_memory
from finetune.fast.loss import to_device
from finetune.footprint import FIRST, LAST, MIDDLE, build_layer, head_pass, layer_pass, layout_of
from finetune.llama.architecture import Architecture
from finetune.workload import MicroBatch

# Of a timed pass: about a second on two cores; on a GPU enough that starting kernels is not it.
_FLOPS_AT_ONCE, _ON_GPU = 2e11, 1e14
_REPEATS, _ENOUGH_SECONDS = (3, 9), 2.0  # at least and at most; as many as there is time for


@dataclass(frozen=True)
class Seconds:
    """Measured parts of a step.

    Attributes:
        layers: of all decoder layers, forward and backward, on a micro-batch.
        head: of head and loss on its supervised tokens.
        update: of clipping and the optimizer, for all that trains.
        timed_tokens: of the passes that were timed.
    """

    layers: float
    head: float
    update: float
    timed_tokens: int

    def step(self, micro_batches: int) -> float:
        """Of one optimizer step."""
        return micro_batches * (self.layers + self.head) + self.update


def measure(
    config: RunConfig, arch: Architecture, batch: MicroBatch, num_trained: int, device: str
) -> Seconds:
    """Times the parts on `device`.

    Args:
        batch: of usual size.
        num_trained: parameters that train.
    """
    if config.fast.allocator and device == "cpu":
        keep_freed_memory()  # as `train` does
    counts = arch.num_parameters()
    per_token = 4 * (counts.attention + counts.mlp) / arch.n_layers
    at_once = _FLOPS_AT_ONCE if device == "cpu" else _ON_GPU
    chosen = batch.first(max(int(at_once / per_token), 16))
    if chosen.row is not None:
        chosen = replace(chosen, row=to_device(chosen.row, torch.device(device)))
    with torch.device(device):
        layers = _timed_layers(config, arch, chosen, device) * batch.tokens / chosen.tokens
        few = max(min(batch.supervised, int(at_once / (4 * arch.dim * arch.vocab_size))), 1)
        scored = head_pass(config, arch, few, device)
        head = _timed(lambda: scored().sum().backward()) * batch.supervised / few
        update = _timed_update(num_trained)
    recomputed = 4 / 3 if config.train.activation_checkpointing else 1.0
    return Seconds(layers * recomputed, head, update, chosen.tokens)


def _timed_layers(config: RunConfig, arch: Architecture, batch: MicroBatch, device: str) -> float:
    """Of all layers: of one in each place, each of the middle ones like the other."""
    layer = build_layer(config, arch, is_run=True)
    layout = layout_of(layer, config, batch, device)

    def seconds(place: str) -> float:
        one = layer_pass(layer, config, arch, batch, layout, place, device)
        return _timed(lambda: one().sum().backward())

    total = seconds(LAST)
    if arch.n_layers > 1:
        total += seconds(FIRST)
    if arch.n_layers > 2:
        total += (arch.n_layers - 2) * seconds(MIDDLE)
    return total


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
