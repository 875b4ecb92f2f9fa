"""Devices that `plan --device` knows: memory and the rate of bfloat16 products.

Rates are dense, with float32 accumulation, from the makers' data sheets; a training step reaches a
part of them. MFU is that part as assumed here for packed rows; `make bench` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MFU = 0.4
CONTEXT_BYTES = int(0.8 * GIB)  # CUDA's context, its libraries and their workspaces


@dataclass(frozen=True)
class Device:
    """One accelerator, or this machine.

    Attributes:
        name: as `--device` takes it.
        kind: `cuda` or `cpu`.
        memory: bytes that a process may use; None where it is not known.
        flops: of bfloat16 products in a second; None where only a measurement tells.
    """

    name: str
    kind: str
    memory: int | None
    flops: float | None


@dataclass(frozen=True)
class Cluster:
    """How many devices, and what each of them holds.

    Attributes:
        device: each of them.
        count: of devices.
        sharding: `ddp`: each holds everything; `fsdp`: each holds its part of weights, gradients
            and moments, and one layer as a whole while it runs.
    """

    device: Device
    count: int = 1
    sharding: str = "ddp"

    @property
    def memory(self) -> int | None:
        """Bytes of each process; on a CPU they share the machine's."""
        memory, shared = self.device.memory, self.device.kind == "cpu"
        return memory // self.count if memory is not None and shared else memory


def _cuda(name: str, memory_gib: float, tflops: float) -> Device:
    return Device(name, "cuda", int(memory_gib * GIB), tflops * 1e12)


DEVICES = {
    device.name: device
    for device in (
        _cuda("a10g", 22.0, 70),
        _cuda("l4", 22.2, 121),
        _cuda("rtx3090", 23.6, 71),
        _cuda("rtx4090", 23.5, 165.2),
        _cuda("rtx5090", 31.4, 209.5),
        _cuda("l40s", 44.4, 362),
        _cuda("a100-40gb", 39.4, 312),
        _cuda("a100-80gb", 79.1, 312),
        _cuda("h100", 79.1, 989.4),
        _cuda("h200", 139.8, 989.4),
        _cuda("b200", 178.0, 2250),
    )
}
"""By name. Memory is the driver's total, a little less than what is printed on the box."""


def this_machine() -> Device:
    """The first GPU, else the CPU and its memory."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(torch.cuda.get_device_name(0), "cuda", properties.total_memory, None)
    return Device("cpu", "cpu", _within_limit(memory_of_machine()), None)


def memory_of_machine() -> int | None:
    """MemTotal, in bytes; Linux only."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemTotal"))
    except OSError:
        return None
    return int(line.split()[1]) * 1024


def _within_limit(total: int | None) -> int | None:
    """A container's limit where that is less."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
    except OSError:
        return total
    return min(total, int(limit)) if total is not None and limit.isdigit() else total
