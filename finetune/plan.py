"""`plan`: memory by part, time, steps, disk and whether it fits, before anything is loaded.

Weights, gradients and moments are arithmetic (`budget`); activations are counted by running a layer
on tensors without memory (`footprint`), and `peak` says what of both is alive at a time; time is
measured on a layer here (`calibration`) or follows from a named device's data sheet. Nothing of the
model's size is allocated, so 405B is planned on a laptop.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.budget import Budget, budget_of
from finetune.config import RunConfig
from finetune.config.loader import load
from finetune.devices import DEVICES, GIB, MFU, Cluster, this_machine
from finetune.errors import InputError
from finetune.llama.architecture import Architecture
from finetune.peak import peak_of
from finetune.workload import Workload, workload_of

if TYPE_CHECKING:
    from finetune.data import RunData

_SPARE = 0.05  # of the device's memory: the allocator's gaps


@dataclass(frozen=True)
class Plan:
    """What a config needs.

    Attributes:
        config: what was planned.
        budget: what is held for good.
        workload: what a step trains on.
        cluster: where.
        bytes_by_part: of one device at its peak.
        flops: of one step of one device.
        seconds: of one step; None where it is not known.
        timing: where `seconds` comes from, in words.
        checkpoint_bytes: of one checkpoint.
        checkpoints: that lie on the disk at once.
        offloaded_bytes: of activations in the computer's memory, for each device.
    """

    config: RunConfig
    budget: Budget
    workload: Workload
    cluster: Cluster
    bytes_by_part: dict[str, int]
    flops: float
    seconds: float | None
    timing: str
    checkpoint_bytes: int
    checkpoints: int
    offloaded_bytes: int = 0

    @property
    def peak(self) -> int:
        """Bytes of one device."""
        return sum(self.bytes_by_part.values())

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not known."""
        memory = self.cluster.memory
        return None if memory is None else self.peak <= memory * (1 - _SPARE)

    def as_json(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        work, device = self.workload, self.cluster.device
        return {
            "parameters": self.budget.parameters.total,
            "parameters_by_part": self.budget.parameters.as_dict(),
            "trainable": self.budget.trainable,
            "device": device.name,
            "devices": self.cluster.count,
            "sharding": self.cluster.sharding,
            "bytes_by_part": self.bytes_by_part,
            "bytes": self.peak,
            "offloaded_bytes": self.offloaded_bytes,
            "device_bytes": self.cluster.memory,
            "fits": self.fits,
            "flops_per_step": self.flops,
            "flops_per_token": self.budget.architecture.flops_per_token().total,
            "seconds_per_step": self.seconds,
            "timing": self.timing,
            **work.as_json(),
            "disk_bytes": self.checkpoint_bytes * self.checkpoints,
        }


def plan_of(
    config: RunConfig,
    cluster: Cluster | None = None,
    with_time: bool = True,
    arch: Architecture | None = None,
    data: RunData | None = None,
) -> Plan:
    """The plan of a config; nothing of the model's size is allocated, nothing fetched.

    Args:
        cluster: None is this machine.
        with_time: measure a layer here, where the cluster is this machine and the plan fits.
        arch: of the base, where it is known already.
        data: the rows, where they are read already.

    Raises:
        InputError: the base's architecture is not known without a download.
    """
    cluster = cluster or Cluster(this_machine())
    budget, work = budget_of(config, arch), workload_of(config, cluster.count, data)
    peak = peak_of(config, budget, work, cluster)
    saves = None if work.num_steps is None else config.train.most_saves(work.num_steps)
    plan = Plan(
        config,
        budget,
        work,
        cluster,
        peak.by_part,
        work.flops(budget, config),
        None,
        "not asked for",
        checkpoint_bytes=budget.gradients + budget.optimizer,
        checkpoints=config.train.checkpoints_at_once(saves),
        offloaded_bytes=peak.offloaded,
    )
    seconds, timing = _seconds(plan, with_time)
    return replace(plan, seconds=seconds, timing=timing)


def _seconds(plan: Plan, measure: bool) -> tuple[float | None, str]:
    config, budget, work, device = plan.config, plan.budget, plan.workload, plan.cluster.device
    if device.flops is not None:
        if config.base.dtype == "float32" and config.train.bf16 is False:
            return None, "not known: the data sheet's rate is of bfloat16 products"
        seconds = plan.flops / (MFU * device.flops)
        unpacked = "" if config.base.quantization == "none" else "; unpacking weights not counted"
        return seconds, f"{100 * MFU:.0f} % of the data sheet's rate, an assumption{unpacked}"
    if not measure:
        return None, "not asked for"
    if plan.fits is False:
        return None, "not measured: it does not fit"
    if config.base.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        return None, "not known: bitsandbytes is not installed (pip install plumbtune[quant])"
    from finetune import calibration

    found = calibration.measure(
        config, budget.architecture, work.usual, budget.trainable, device.kind
    )
    seconds = found.step(work.micro_batches)
    return seconds, f"measured here, a layer on {found.timed_tokens:,} tokens"


def lines(plan: Plan) -> list[str]:
    """The plan for the terminal."""
    budget, work, device = plan.budget, plan.workload, plan.cluster.device
    counts = budget.parameters.as_dict().items()
    share = 100 * budget.trainable / (budget.parameters.total or 1)
    memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.bytes_by_part.items())
    many = f"{plan.cluster.count} x " if plan.cluster.count > 1 else ""
    memory_of = plan.cluster.memory
    of = "" if memory_of is None else f" of {memory_of / GIB:.1f}"
    found = [
        f"base     {', '.join(f'{name} {count:,}' for name, count in counts if count)}",
        f"trained  {budget.trainable:,} parameters ({share:.3f} % of the base)",
        *work.lines(),
        f"memory   {memory} GiB",
        f"         {plan.peak / GIB:.2f}{of} GiB on {many}{device.name}: {_verdict(plan)}",
        f"flops    {plan.flops:.3g} a step and device",
        f"time     {_time(plan)}",
        f"disk     {plan.checkpoints} checkpoints of {plan.checkpoint_bytes / GIB:.2f} GiB",
    ]
    if plan.offloaded_bytes:
        each = f"{plan.offloaded_bytes / GIB:.2f} GiB of activations of each device"
        found.append(f"host     {each} wait in the computer's memory")
    if plan.config.train.fit == "auto":
        found.append("fit      train.fit=auto: `train` chooses micro-batch and recomputing itself")
    return found


def _verdict(plan: Plan) -> str:
    if plan.fits is not False:
        return "fits" if plan.fits else "the device's memory is not known"
    return f"does not fit; {_advice(plan)}"


def _advice(plan: Plan) -> str:
    """What to change first, by the largest part."""
    parts, train = plan.bytes_by_part, plan.config.train
    if parts["activations"] > parts["base"]:
        ways = [] if train.activation_checkpointing else ["train.activation_checkpointing=true"]
        if plan.cluster.device.kind != "cpu" and not train.activation_offloading:
            ways.append("train.activation_offloading=true")
        if train.per_device_train_batch_size > 1:
            ways.append(
                "fewer rows in train.per_device_train_batch_size and more in "
                "train.gradient_accumulation_steps"
            )
        return ", or ".join([*ways, "a smaller data.max_length"])
    if plan.budget.trainable == plan.budget.parameters.total:
        return "train an adapter (adapter.method=lora), or shard (--devices N --sharding fsdp)"
    sharded = "shard (--devices N --sharding fsdp)"
    return (
        sharded
        if plan.config.base.quantization == "nf4"
        else f"base.quantization=nf4, or {sharded}"
    )


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return plan.timing
    rate = plan.workload.tokens_per_step / plan.seconds
    known = plan.workload.num_steps
    whole = "" if known is None else f", {known * plan.seconds / 3600:.2f} h for {known:,} steps"
    return f"{plan.seconds:.3g} s a step{whole}; {rate:,.0f} tokens/s ({plan.timing})"


def main(argv: Sequence[str]) -> int:
    """The verb `plan`."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune plan", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--device", choices=DEVICES, help="plan for it; default: this machine")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many")
    parser.add_argument("--sharding", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--no-time", action="store_true", help="measure nothing here")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_intermixed_args(list(argv))
    if args.devices < 1:
        raise InputError(f"--devices: found {args.devices}; allowed: 1 or more")
    config = load(args.config, args.overrides).config
    device = DEVICES[args.device] if args.device else this_machine()
    cluster = Cluster(device, args.devices, args.sharding)
    plan = plan_of(config, cluster, not args.no_time)
    print(json.dumps(plan.as_json(), indent=2) if args.json else "\n".join(lines(plan)))
    return 0
