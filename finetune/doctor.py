"""`doctor`: what this machine can run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.devices import memory_of_machine
from finetune.run_folder import environment


def main(argv: Sequence[str]) -> int:
    """The verb `doctor`."""
    parser = argparse.ArgumentParser(prog="python -m finetune doctor", description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(list(argv))
    facts = examine()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return 0


def examine() -> dict[str, Any]:
    """Versions, devices, types and free disk space of this machine."""
    import torch

    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
        }
        for index in range(torch.cuda.device_count())
    ]
    memory = memory_of_machine()
    return {
        **environment(),
        "gpus": gpus,
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "bfloat16_units": torch.cuda.is_bf16_supported()
        if gpus
        else torch.cpu._is_avx512_bf16_supported(),
        "quantization": importlib.util.find_spec("bitsandbytes") is not None,
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    packages = ", ".join(
        f"{name} {version or 'missing'}" for name, version in facts["packages"].items()
    )
    gpus = ", ".join(f"{g['name']} ({g['memory_gib']} GiB)" for g in facts["gpus"]) or "none"
    machine = f"{facts['system']} {facts['machine']}, {facts['cores']} cores"
    bfloat16 = "in hardware" if facts["bfloat16_units"] else "emulated: train.bf16=false is faster"
    bits = "bitsandbytes is there" if facts["quantization"] else "no: pip install plumbtune[quant]"
    return [
        f"python        {facts['python']} on {machine}",
        f"packages      {packages}",
        f"gpus          {gpus}",
        f"memory        {facts['memory_gib']} GiB; disk free here {facts['disk_free_gib']} GiB",
        f"bfloat16      {bfloat16}",
        f"quantization  {bits}",
    ]
