"""Memory of one device at the peak of a step, by part.

Weights, gradients and moments are there all the time (`budget`); of activations, as much as the
layers and the head have at once (`footprint`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.budget import BYTES, Budget
from finetune.config import RunConfig
from finetune.config.adapter import SOFT_PROMPTS
from finetune.devices import CONTEXT_BYTES, GIB, Cluster, Device, this_machine
from finetune.errors import InputError
from finetune.workload import Workload

# A process after its imports and the trainer's (`benchmarks.plan_check --size tiny`).
LIBRARIES_BYTES = int(0.55 * GIB)
# What glibc's heap holds beyond the tensors that are alive: blocks of a step, freed and cut up. It
# is nothing one can derive; these shares of a layer's own peak, and of what comes and goes as a
# whole (gradients, logits), fit what was measured (docs/scaling.md). Where products are oneDNN's,
# its copies take a share of a layer too, and its kernels so many bytes, by their type.
_HEAP_OF_LAYER, _HEAP_OF_COPIES, _HEAP_OF_WHOLE = 1.8, 1.0, 0.5
_HEAP_OF_BFLOAT16, _HEAP_OF_FLOAT32 = int(0.02 * GIB), int(0.05 * GIB)


@dataclass(frozen=True)
class Peak:
    """Bytes of one device.

    Attributes:
        by_part: their sum is the peak.
        offloaded: of activations in the computer's memory.
    """

    by_part: dict[str, int]
    offloaded: int


def refuse_offloading(config: RunConfig, device: Device | None = None) -> None:
    """On a machine whose activations are in the computer's memory already.

    Args:
        device: None is this machine, which is looked at only where the config offloads: on a GPU
            that costs memory, in every rank.

    Raises:
        InputError: the config asks for it there.
    """
    if config.train.activation_offloading and (device or this_machine()).kind == "cpu":
        raise InputError(
            "train.activation_offloading: found true on a machine without a GPU, whose activations "
            "are in the computer's memory already; allowed: false"
        )


def peak_of(config: RunConfig, budget: Budget, work: Workload, cluster: Cluster) -> Peak:
    """The peak of a config's steps.

    Raises:
        InputError: activations cannot be offloaded from that device.
    """
    refuse_offloading(config, cluster.device)
    on_cpu = cluster.device.kind == "cpu"
    alive = _alive(config, budget, work, cluster)
    parts = {
        "libraries": LIBRARIES_BYTES if on_cpu else CONTEXT_BYTES,
        **_held(budget, cluster),
        "activations": alive.activations,
        "logits": alive.logits,
    }
    if on_cpu:
        parts["heap"] = _heap(config, alive.layer, budget.gradients + alive.logits)
    return Peak(parts, alive.offloaded)


def _held(budget: Budget, cluster: Cluster) -> dict[str, int]:
    """Bytes of one device for weights, gradients and moments."""
    parts, count = budget.by_part(), cluster.count
    if count == 1:
        return parts
    if cluster.sharding == "ddp":
        return {**parts, "buckets": budget.gradients}
    counts, arch = budget.parameters, budget.architecture
    per_parameter = budget.base / counts.total
    layer = (counts.attention + counts.mlp) / arch.n_layers
    gathered = int(per_parameter * (2 * layer + max(counts.embedding, counts.head)))
    return {**{name: size // count for name, size in parts.items()}, "gathered": gathered}


@dataclass(frozen=True)
class _Alive:
    """Bytes of a micro-batch at the peak of its step.

    Attributes:
        activations: of all layers, and the gradients of one.
        logits: of head and loss beyond that.
        layer: of these, what one layer holds at most while it is worked on.
        offloaded: in the computer's memory.
    """

    activations: int
    logits: int
    layer: int
    offloaded: int


def _alive(config: RunConfig, budget: Budget, work: Workload, cluster: Cluster) -> _Alive:
    """The peak is where the head runs, or where the backward pass begins.

    Gradients of what trains are counted by themselves. Those of a single micro-batch are there only
    as its activations go, and not yet at the beginning, but for the head's.
    """
    from finetune.footprint import head_footprint, layer_footprints, pinned

    arch, kind = budget.architecture, cluster.device.kind
    vectors = config.adapter.num_virtual_tokens if config.adapter.method in SOFT_PROMPTS else 0
    layers = layer_footprints(config, arch, work.largest.behind_vectors(vectors), kind)
    head = head_footprint(config, arch, work.most_supervised, kind)
    tokens = work.largest.tokens + vectors * len(work.largest.lengths)
    width = tokens * arch.dim * int(BYTES[config.base.dtype])
    middle, last = layers.middle, layers.last
    if config.train.activation_checkpointing:  # a layer keeps its input alone
        middle, last = (
            replace(layer, kept=width, kept_pinned=pinned(width)) for layer in (middle, last)
        )
    offloads, others = config.train.activation_offloading, arch.n_layers - 1
    here = 0 if offloads else others * middle.kept
    # the backward pass of the last layer, or of the one before it
    in_layers = width + max(here + last.peak, max(here - middle.kept, 0) + middle.peak)
    at_head = width + here + (0 if offloads else last.kept) + head.peak
    if work.micro_batches == cluster.count == 1:
        of_head = 0
        if config.adapter.method == "none":
            heads = budget.parameters.head or budget.parameters.embedding
            of_head = heads * int(BYTES[config.base.dtype])
        in_layers = max(in_layers + of_head - budget.gradients, width + middle.peak)
        at_head -= budget.gradients
    return _Alive(
        activations=in_layers,
        logits=max(at_head - in_layers, 0),
        layer=middle.peak,
        offloaded=others * middle.kept_pinned + last.kept_pinned if offloads else 0,
    )


def _heap(config: RunConfig, layer: int, whole: int) -> int:
    from finetune.fast.products import onednn_is_faster
    from finetune.precision import multiplies_in_bf16

    shares = _HEAP_OF_LAYER * layer + _HEAP_OF_WHOLE * whole
    if multiplies_in_bf16(config, "cpu"):
        kernels = _HEAP_OF_BFLOAT16
    elif config.fast.products and onednn_is_faster():
        kernels = _HEAP_OF_FLOAT32
    else:
        return int(shares)
    return int(shares + _HEAP_OF_COPIES * layer) + kernels
