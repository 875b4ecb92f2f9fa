"""What `plan` says beside what a run takes: peak memory and time of a step.

python -m benchmarks.plan_check --folder build/speed --json <result>.json

Each config is planned and trained in a process of its own, alone on the machine. Memory is the
kernel's high-water mark of the process; time is the median step after the first three. The speed of
the machine drifts, so plans are made before and after a run, and the mean of their times counts.
The limits are 10 % and 20 %; the exit code is 1 where one is passed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peaks import run_measured
from benchmarks.records import steps_of, today
from benchmarks.speed.workload import ROOT, SIZES, config_of, make
from finetune import artifact
from finetune.config import FastSection
from finetune.llama.safetensors_pieces import stored_tensors

MEMORY_LIMIT, TIME_LIMIT = 0.10, 0.20
NUM_STEPS, WARM = 10, 3
CASES: dict[str, tuple[str, ...]] = {
    "lora, 2 packs": (),
    "lora, 8 packs": ("train.per_device_train_batch_size=8",),
    "lora, 8 packs, recomputed": (
        "train.per_device_train_batch_size=8",
        "train.activation_checkpointing=true",
    ),
    "lora on q and v, r 64": (
        "adapter.target_modules=[q_proj, v_proj]",
        "adapter.r=64",
        "adapter.lora_alpha=128",
    ),
    "dora, 2 packs": ("adapter.method=dora",),
    "all weights, 2 packs": ("adapter.method=none",),
    "lora, rows alone": (  # an epoch: the largest micro-batch is among them
        "data.packing=false",
        "train.per_device_train_batch_size=8",
        "train.max_steps=32",
    ),
    "lora on nf4, 2 packs": ("base.quantization=nf4",),
    "dora on nf4, 2 packs": ("base.quantization=nf4", "adapter.method=dora"),
    "lora with nothing fast": tuple(f"fast.{part}=false" for part in FastSection.model_fields),
}
# For machines with bfloat16 units (--only); others take minutes for a step.
IN_BFLOAT16 = {
    f"{name}, bfloat16": CASES[name]
    for name in ("lora, 2 packs", "lora, 8 packs", "lora on nf4, 2 packs")
}


def main(argv: Sequence[str] | None = None) -> int:
    """Every case, planned and trained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the speed benchmark; kept")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--size", choices=SIZES, default="58m")
    parser.add_argument("--only", nargs="*", choices=[*CASES, *IN_BFLOAT16], default=list(CASES))
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    make(folder, SIZES[args.size])
    cases = {}
    for name in args.only:
        cases[name] = _checked(folder, args.size, name)
        print(f"{name}: {cases[name]}", flush=True)
    date = today()
    if args.json:
        result = {"date": date, "size": args.size, "cases": cases}
        artifact.write_json(args.json.resolve(), result)
    return int(not all(is_good(case) for case in cases.values()))


def is_good(case: dict[str, float]) -> bool:
    """Whether both are within their limits."""
    return (
        abs(case["planned_mib"] / case["peak_mib"] - 1) <= MEMORY_LIMIT
        and abs(case["planned_seconds"] / case["seconds"] - 1) <= TIME_LIMIT
        and case["planned_trained"] == case["trained"]
    )


def _checked(folder: Path, size: str, name: str) -> dict[str, Any]:
    run_name = re.sub(r"\W+", "-", name)
    file = folder / f"plan-{run_name}.yaml"
    dtype = "bfloat16" if name in IN_BFLOAT16 else "float32"
    values = config_of(folder, SIZES[size], dtype, run_name, max_steps=NUM_STEPS)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    shutil.rmtree(folder / "runs" / run_name, ignore_errors=True)
    command = [sys.executable, "-m", "finetune"]
    overrides = (CASES | IN_BFLOAT16)[name]

    def planned() -> Any:
        asked = [*command, "plan", str(file), "--json", *overrides]
        answer = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True)
        return json.loads(answer.stdout)

    plan = planned()
    measured = run_measured([*command, "train", str(file), *overrides], ROOT, lambda: "train")
    steps = [line["seconds"] for line in steps_of(folder / "runs" / run_name)]
    seconds = [plan["seconds_per_step"], planned()["seconds_per_step"]]
    return {
        "planned_mib": round(plan["bytes"] / 2**20),
        "peak_mib": round(measured.peak_gib * 1024),
        "planned_seconds": round(statistics.mean(seconds), 3),
        "planned_before_and_after": [round(each, 3) for each in seconds],
        "seconds": round(statistics.median(steps[WARM:]), 3),
        "planned_trained": plan["trainable"],
        "trained": _num_trained(folder / "runs" / run_name),
        "parts_mib": {k: round(v / 2**20) for k, v in plan["bytes_by_part"].items()},
    }


def _num_trained(run: Path) -> int:
    """Numbers in the file of the adapter, or of the whole model."""
    whole = (run / "model").is_dir()
    paths = (run / ("model" if whole else "adapter")).glob("*.safetensors")
    return sum(math.prod(tensor.shape) for path in paths for tensor in stored_tensors(path))


if __name__ == "__main__":
    raise SystemExit(main())
