"""What a safe save takes: staged, fsynced, hashed, published, and older ones verified.

python -m benchmarks.save_cost --folder <folder> --json <result>.json

Two parts. The demo's run with a checkpoint at the default interval: the time of a save over that of
the steps between two. And a checkpoint of the size that LoRA (r 16, seven projections) on Llama 3.1
8B has, by the same functions, beside a plain `torch.save` of the same numbers without fsync: how
long a step must be for a save at the default interval to be less than 5 % of the steps' time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import steps_of, today

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "lora_nano.yaml"
INTERVAL = 100  # steps; train.save_steps
LIMIT = 0.05
SHAPE_8B = {"num_layers": 32, "dim": 4096, "kv": 1024, "inner": 14336, "r": 16}
SHAPE_SMALL = {"num_layers": 2, "dim": 64, "kv": 32, "inner": 128, "r": 4}


def main(argv: Sequence[str] | None = None) -> int:
    """Both parts; exit code 1 where the demo's saves take 5 % or more."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work; it is emptied")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--small", action="store_true", help="the same in seconds")
    args = parser.parse_args(argv)
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    interval = 4 if args.small else INTERVAL
    result = {
        "date": today(),
        "interval": interval,
        "demo": _in_a_run(args.folder, interval),
        "8b": _alone(args.folder / "large", SHAPE_SMALL if args.small else SHAPE_8B, interval),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(result["demo"]["share"] >= LIMIT)


def _in_a_run(folder: Path, interval: int) -> dict[str, Any]:
    """The demo for three intervals, in a process of its own."""
    overrides = [f"run.dir={folder}", "train.num_train_epochs=null", "train.eval_steps=null"]
    overrides += [f"train.max_steps={interval * 3 + 1}", f"train.save_steps={interval}"]
    command = [sys.executable, "-c", _TIMED_RUN, str(folder / "saves.json"), str(CONFIG)]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    saves = json.loads((folder / "saves.json").read_text(encoding="utf-8"))
    steps = [line["seconds"] for line in steps_of(folder / "lora_nano")]
    newest = max((folder / "lora_nano" / "checkpoints").glob("step-*"))
    step, save = statistics.median(steps), statistics.median(saves)
    return {
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "seconds_a_step": round(step, 4),
        "seconds_a_save": [round(seconds, 4) for seconds in saves],
        "share": round(save / (interval * step), 5),
    }


_TIMED_RUN = """
import json, pathlib, sys, time
from finetune.trainer import OurSeams
from finetune.__main__ import main
right, seconds = OurSeams._save_checkpoint, []
def timed(*args):
    began = time.monotonic()
    right(*args)
    seconds.append(time.monotonic() - began)
OurSeams._save_checkpoint = timed
code = main(["train", *sys.argv[2:]])
pathlib.Path(sys.argv[1]).write_text(json.dumps(seconds))
sys.exit(code)
"""


def _alone(folder: Path, shape: dict[str, int], interval: int) -> dict[str, Any]:
    """Five saves of an adapter with AdamW's moments; the last two also prune."""
    import torch

    model = _adapter_of(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    def plain() -> None:
        state = {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "plain.pt")

    folder.mkdir()
    safe, unsafe = [], []
    for step in range(1, 6):
        safe.append(_seconds(lambda step=step: _save(model, optimizer, folder, step)))  # type: ignore[misc]
        unsafe.append(_seconds(plain))
    newest = max(folder.glob("step-*"))
    save = statistics.median(safe)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "seconds_a_save": [round(seconds, 3) for seconds in safe],
        "seconds_a_plain_save": [round(seconds, 3) for seconds in unsafe],
        "under_5_percent_from_seconds_a_step": round(save / (interval * LIMIT), 3),
    }


def _save(model: Any, optimizer: Any, folder: Path, step: int) -> None:
    """As `OurSeams` publishes one."""
    from finetune import artifact, checkpoint

    place = checkpoint.step_folder(folder, step)
    with artifact.staged(place, {"kind": "checkpoint", "step": step}) as stage:
        checkpoint.save_weights(model, stage)
        checkpoint.save_optimizer(optimizer, stage)
        checkpoint.save_rng([checkpoint.rng_state()], stage)
    checkpoint.write_latest(folder, step)
    checkpoint.prune(folder, 3, place)


def _adapter_of(shape: dict[str, int]) -> Any:
    """A and B of seven projections a layer, float32."""
    import torch

    dim, kv, inner, r = (shape[key] for key in ("dim", "kv", "inner", "r"))
    sizes = [(dim, dim), (dim, kv), (dim, kv), (dim, dim), (dim, inner), (dim, inner), (inner, dim)]
    matrices: list[torch.nn.Module] = []
    for columns, rows in sizes * shape["num_layers"]:
        a, b = torch.nn.Linear(columns, r, bias=False), torch.nn.Linear(r, rows, bias=False)
        matrices.append(torch.nn.Sequential(a, b))
    return torch.nn.Sequential(*matrices)


def _seconds(call: Callable[[], None]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
