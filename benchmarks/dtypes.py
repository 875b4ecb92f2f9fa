"""What bfloat16 costs in held-out loss: the demo's training in every type of base and products.

python -m benchmarks.dtypes --folder build/dtypes --json <result>.json

The same rows in the same order, three seeds; each run is the verb `train`, and the loss is that of
all held-out answers after its last step. The limit is half a percent of float32's, for the mean of
the seeds; the exit code is 1 where it is passed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import last_heldout_loss, today
from benchmarks.speed.workload import ROOT
from finetune import artifact

LIMIT = 0.005
WAYS = {
    "float32": ("base.dtype=float32", "train.bf16=false"),
    "bfloat16 base": ("base.dtype=bfloat16", "train.bf16=false"),
    "float32 base, bfloat16 products": ("base.dtype=float32", "train.bf16=true"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Every way and seed, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the runs; emptied")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--config", default="configs/lora_nano.yaml")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    args = parser.parse_intermixed_args(argv)
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in args.seeds:
        for number, (way, settings) in enumerate(WAYS.items()):
            overrides = (f"run.seed={seed}", *settings, *args.overrides)
            losses[way].append(_heldout_loss(args.config, folder, f"{number}-{seed}", overrides))
            print(f"{way}, seed {seed}: {losses[way][-1]:.5f}", flush=True)
    means = {way: statistics.mean(found) for way, found in losses.items()}
    apart = {way: mean / means["float32"] - 1 for way, mean in means.items()}
    for way in WAYS:
        print(f"{way}: {means[way]:.5f}, {100 * apart[way]:+.2f} %")
    if args.json:
        result = {"date": today(), "config": args.config, "overrides": args.overrides}
        result |= {"seeds": args.seeds, "losses": losses, "apart": apart}
        artifact.write_json(args.json.resolve(), result)
    return int(any(abs(share) > LIMIT for share in apart.values()))


def _heldout_loss(config: str, folder: Path, name: str, settings: Sequence[str]) -> float:
    command = [sys.executable, "-m", "finetune", "train", config]
    command += [f"run.dir={folder}", f"run.name={name}", *settings]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    loss = last_heldout_loss(folder / name)
    assert loss is not None, "a config without held-out rows"
    return loss


if __name__ == "__main__":
    raise SystemExit(main())
