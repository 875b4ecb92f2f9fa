"""`train.fit: auto`: micro-batch and checkpointing from the plan, at the same rows a step.

What is chosen is written to the run folder, and a run that goes on keeps to it: another machine's
memory must not change which rows share a sum.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from finetune.artifact import read_json, write_json
from finetune.config import RunConfig
from finetune.devices import GIB, Cluster, Device, this_machine
from finetune.errors import CheckFailed, InputError
from finetune.plan import Plan, plan_of

KEYS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    "activation_checkpointing",
)


def fitted(
    config: RunConfig,
    file: Path,
    num_ranks: int,
    is_first: bool,
    known: dict[str, Any] | None = None,
) -> RunConfig:
    """The config with what was chosen for it; itself without `train.fit: auto`.

    Args:
        file: where the choice lies, or will.
        is_first: the first rank chooses, the others take its answer.
        known: `arch` and `data`, where they are read already.

    Raises:
        InputError: no choice fits; what the plan advises.
    """
    if config.train.fit != "auto":
        return config
    answer: list[Any] = [None]
    if is_first:
        answer = [_kept(config, file) or _chosen(config, file, num_ranks, known or {})]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return _with(config, answer[0])


def choose(config: RunConfig, cluster: Cluster, **known: Any) -> Plan:
    """The largest micro-batch that fits, without recomputing activations where one does.

    Args:
        known: `arch` and `data` of `plan_of`.

    Raises:
        InputError: none does, or the machine's memory is not known.
    """
    if cluster.memory is None:
        raise InputError(
            "train.fit: found auto on a machine whose memory is not known; allowed: none, with "
            "train.per_device_train_batch_size as it fits"
        )
    plan = None
    for values in candidates(config):
        plan = plan_of(_with(config, values), cluster, with_time=False, **known)
        if plan.fits:
            return plan
    assert plan is not None
    raise InputError(
        f"train.fit: no micro-batch fits {cluster.device.name}: one row with its activations "
        f"recomputed takes {plan.peak / GIB:.1f} GiB. base.quantization=nf4 or a smaller "
        "data.max_length take less"
    )


def candidates(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Every way to the config's rows a step, the fastest first."""
    train = config.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    for recompute in [True] if train.activation_checkpointing else [False, True]:
        for size in sizes:
            yield dict(zip(KEYS, (size, rows // size, recompute), strict=True))


def _chosen(config: RunConfig, file: Path, num_ranks: int, known: dict[str, Any]) -> dict[str, Any]:
    device: Device = this_machine()
    plan = choose(config, Cluster(device, num_ranks), **known)
    chosen = {key: getattr(plan.config.train, key) for key in KEYS}
    facts = {"asked": _asked(config), "planned_bytes": plan.peak, "device": device.name}
    write_json(file, {**chosen, **facts})
    size, steps, recompute = chosen.values()
    how = ", activations recomputed" if recompute else ""
    print(
        f"fit      {size} rows x {steps} micro-batches{how}: {plan.peak / GIB:.2f} GiB planned on "
        f"{device.name}",
        file=sys.stderr,
    )
    return chosen


def _asked(config: RunConfig) -> dict[str, Any]:
    """What the config says, from which another choice would follow."""
    return {key: getattr(config.train, key) for key in KEYS}


def _kept(config: RunConfig, file: Path) -> dict[str, Any] | None:
    """What was chosen before, for the same config; None where there is nothing such."""
    if not file.exists():
        return None
    known = read_json(file)
    kinds = dict(zip(KEYS, (int, int, bool), strict=True))
    if not isinstance(known, dict) or any(type(known.get(k)) is not kinds[k] for k in KEYS):
        raise CheckFailed(f"{file}: is not what `train` wrote; remove the run folder")
    if known.get("asked") != _asked(config):
        return None
    return {key: known[key] for key in KEYS}


def _with(config: RunConfig, chosen: dict[str, Any]) -> RunConfig:
    train = config.train.model_copy(update=chosen)
    return config.model_copy(update={"train": train})
