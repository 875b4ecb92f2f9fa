"""`plan`: parameters, FLOPs and the memory of weights and optimiser, before anything is loaded.

All of it is arithmetic on the architecture, so that a config of 405 B parameters is planned on a
laptop. Activations and time are not in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import artifact
from finetune.config import RunConfig
from finetune.config.loader import load
from finetune.errors import InputError
from finetune.llama.architecture import (
    HUB_IDS,
    Architecture,
    PartCounts,
    architecture_of,
    from_llama_config,
)
from finetune.methods import method_of

GIB = 2**30
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# bitsandbytes: 4 bits, an 8-bit scale for 64 of them, a float32 for 256 scales (double
# quantisation); or 8 bits. The float32 scale of a row of int8 is too little to show.
_QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_QUANTIZED_BYTES["fp4"] = _QUANTIZED_BYTES["nf4"]
# Moments that an optimiser keeps for each trained parameter, in the parameter's own type.
_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}


@dataclass(frozen=True)
class Plan:
    """What a config needs, as far as arithmetic on its architecture tells.

    Attributes:
        architecture: of the base.
        parameters: of the base, by part.
        trainable: parameters that train.
        bytes_by_part: base, adapter, gradients, optimizer (None where it is not known).
        flops_per_token: forward pass of the base for one token, without attention scores.
    """

    architecture: Architecture
    parameters: PartCounts
    trainable: int
    bytes_by_part: dict[str, int | None]
    flops_per_token: int

    def as_json(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        known = [n for n in self.bytes_by_part.values() if n is not None]
        return {
            "parameters": self.parameters.total,
            "parameters_by_part": self.parameters.as_dict(),
            "trainable": self.trainable,
            "bytes_by_part": self.bytes_by_part,
            "bytes": sum(known),
            "flops_per_token": self.flops_per_token,
            "not_counted": ["activations", "logits", "time"],
        }

    def lines(self) -> list[str]:
        """The plan for the terminal."""
        parts = ", ".join(f"{n} {c:,}" for n, c in self.parameters.as_dict().items() if c)
        share = 100 * self.trainable / (self.parameters.total or 1)
        memory = [
            f"{name} {'unknown' if size is None else f'{size / GIB:.2f} GiB'}"
            for name, size in self.bytes_by_part.items()
        ]
        return [
            f"base     {parts}",
            f"trained  {self.trainable:,} parameters ({share:.3f} % of the base)",
            f"memory   {', '.join(memory)}",
            f"flops    {self.flops_per_token:,} a token forward, without attention scores",
            "         not counted: activations, logits, time",
        ]


def plan_of(config: RunConfig) -> Plan:
    """The plan of a config; nothing is allocated, nothing fetched.

    Raises:
        InputError: the base's architecture is not known without a download.
    """
    arch = architecture_of_base(config)
    parameters = arch.num_parameters()
    is_full = config.adapter.method == "none"
    trained = parameters.total if is_full else num_adapter_parameters(arch, config)
    moments = _MOMENTS.get(config.train.optim)
    size = _BYTES[config.base.dtype if is_full else "float32"]  # adapters are float32
    sizes = {
        "base": _base_bytes(arch, config),
        "adapter": 0 if is_full else int(size * trained),
        "gradients": int(size * trained),
        "optimizer": None if moments is None else int(moments * size * trained),
    }
    return Plan(arch, parameters, trained, sizes, arch.flops_per_token().total)


def num_adapter_parameters(arch: Architecture, config: RunConfig) -> int:
    """Trainable parameters of the config's adapter: its method's closed formula.

    Raises:
        InputError: a setting that does not fit the base.
    """
    method = method_of(config.adapter)
    if findings := method.findings(config.adapter, arch):
        raise InputError(findings)
    return method.num_trainable(config.adapter, arch)


def _base_bytes(arch: Architecture, config: RunConfig) -> int:
    """The base's weights as they are held: quantisation leaves embedding, norms and head."""
    counts, size = arch.num_parameters(), _BYTES[config.base.dtype]
    linear = counts.attention + counts.mlp
    in_blocks = _QUANTIZED_BYTES.get(config.base.quantization, size)
    return int(linear * in_blocks + (counts.total - linear) * size)


def architecture_of_base(config: RunConfig) -> Architecture:
    """The architecture that `base:` names: a preset, a documented hub id, or a local folder.

    Raises:
        InputError: neither; only a download would tell.
    """
    base = config.base
    if base.architecture is not None:
        return architecture_of(base.architecture)
    assert base.path is not None
    folder = Path(base.path)
    if (folder / "config.json").is_file():
        return from_llama_config(artifact.read_json(folder / "config.json"))
    if (folder / "params.json").is_file():
        from finetune.llama.meta_checkpoint import read_checkpoint

        return read_checkpoint(folder).arch  # the weights tell vocabulary and tied head
    if base.path in HUB_IDS:
        return architecture_of(HUB_IDS[base.path])
    raise InputError(
        f"base.path {base.path}: neither a folder nor a documented hub id, so its architecture is "
        "not known without a download; name a local folder"
    )


def main(argv: Sequence[str]) -> int:
    """The verb `plan`."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune plan", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_intermixed_args(list(argv))
    plan = plan_of(load(args.config, args.overrides).config)
    print(json.dumps(plan.as_json(), indent=2) if args.json else "\n".join(plan.lines()))
    return 0
