"""Every method on the embedded base and data, at equal steps, each at the best of its rates.

python -m benchmarks.compare_methods --folder runs/compare --json <result>.json --plot <plot>.svg

Each method trains 150 steps, on the same rows, at every rate of a small grid. Where the best rate
lies at the grid's edge, the grid grows by a factor of three, twice at most. The lowest
held-out loss chooses. The chosen run is asked the 672 held-out questions; the main methods train
with two more seeds at the chosen rate. Runs are kept in the folder, so that it goes on where it was
stopped. Time and memory come from 40 steps of each method alone on the machine, in a second pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.compare_table import show
from benchmarks.records import last_heldout_loss, steps_of

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "lora_nano.yaml"
NUM_STEPS, TIMED_STEPS = 150, 40
SEEDS = (0, 1, 2)  # of the main methods; the others have the first
GROWTHS = 2
_LORA = {"r": 16, "lora_alpha": 32}


@dataclass(frozen=True)
class Contender:
    """A method under its settings.

    Attributes:
        adapter: the config's section.
        rates: learning rates to begin with, rising by a factor of three.
        is_main: whether it is trained with every seed.
        other: other settings, by section.
    """

    adapter: dict[str, Any]
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    is_main: bool = False
    other: dict[str, dict[str, Any]] = field(default_factory=dict)


_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]
_UNPACKED = {
    # As many rows in a step as two packs hold on average.
    "data": {"packing": False},
    "train": {"per_device_train_batch_size": 16, "activation_checkpointing": False},
}
_NF4 = {"base": {"quantization": "nf4"}}
_LARGE = (1e-2, 3e-2, 1e-1)

CONTENDERS = {
    "full": Contender({"method": "none"}, (3e-4, 1e-3, 3e-3), is_main=True),
    "lora": Contender({"method": "lora", **_LORA}, is_main=True),
    # What the defaults of `adapter:` rest on: rank, scale, targets.
    "lora r4": Contender({"method": "lora", "r": 4, "lora_alpha": 8}),
    "lora r64": Contender({"method": "lora", "r": 64, "lora_alpha": 128}),
    "lora alpha 16": Contender({"method": "lora", "r": 16, "lora_alpha": 16}),
    "lora q,v": Contender({"method": "lora", **_LORA, "target_modules": ["q_proj", "v_proj"]}),
    "lora attention": Contender({"method": "lora", **_LORA, "target_modules": _ATTENTION}),
    "lora mlp": Contender({"method": "lora", **_LORA, "target_modules": _MLP}),
    "rslora": Contender({"method": "lora", **_LORA, "use_rslora": True}, is_main=True),
    "lora+": Contender({"method": "lora+", **_LORA}, (3e-4, 1e-3, 3e-3), is_main=True),
    "dora": Contender({"method": "dora", **_LORA}, is_main=True),
    "pissa": Contender({"method": "lora", **_LORA, "init": "pissa"}, is_main=True),
    "olora": Contender({"method": "lora", **_LORA, "init": "olora"}, (3e-4, 1e-3, 3e-3)),
    "corda": Contender({"method": "lora", **_LORA, "init": "corda"}),
    "eva": Contender({"method": "lora", **_LORA, "init": "eva"}),
    "gaussian": Contender({"method": "lora", **_LORA, "init": "gaussian"}),
    "adalora": Contender({"method": "adalora", "init_r": 24, "target_r": 16, "lora_alpha": 32}),
    "qlora": Contender({"method": "lora", **_LORA}, is_main=True, other=_NF4),
    "qdora": Contender({"method": "dora", **_LORA}, other=_NF4),
    "loftq": Contender({"method": "lora", **_LORA, "init": "loftq"}, other=_NF4),
    "qlora int8": Contender({"method": "lora", **_LORA}, other={"base": {"quantization": "int8"}}),
    "vera": Contender({"method": "vera"}, _LARGE),
    "loha": Contender({"method": "loha", **_LORA}),
    "lokr": Contender({"method": "lokr", **_LORA}),
    "miss": Contender({"method": "miss", "r": 32}),
    "oft": Contender({"method": "oft", "oft_block_size": 32}),
    "boft": Contender({"method": "boft", "boft_block_size": 8}),
    "hra": Contender({"method": "hra", "r": 16}),
    "ia3": Contender({"method": "ia3"}, _LARGE),
    "ln_tuning": Contender({"method": "ln_tuning"}, _LARGE),
    "trainable_tokens": Contender(
        {"method": "trainable_tokens", "token_indices": list(range(1024))}
    ),
    "prompt_tuning": Contender({"method": "prompt_tuning"}, _LARGE, other=_UNPACKED),
    "prefix_tuning": Contender({"method": "prefix_tuning"}, _LARGE, other=_UNPACKED),
}


def config_of(
    contender: Contender, folder: Path, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """The demo's config with another method."""
    values: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    values["run"] |= {"name": folder.name, "dir": str(folder.parent), "seed": seed}
    values["adapter"] = contender.adapter
    del values["train"]["num_train_epochs"]
    values["train"] |= {"max_steps": steps, "learning_rate": rate, "eval_steps": 10**6}
    values["train"] |= {"save_steps": 10**6, "logging_steps": 100}
    for section, settings in contender.other.items():
        values[section] |= settings
    if steps == TIMED_STEPS:  # nothing but steps
        values["data"]["heldout"], values["train"]["eval_steps"] = [], None
    return values


def run_key(name: str, rate: float, seed: int, steps: int = NUM_STEPS) -> str:
    """The name of a run's folder."""
    # A run's name has no other letters.
    name = name.replace(" ", "_").replace("+", "plus").replace(",", "")
    return f"{name}-{rate:g}-seed{seed}-{steps}"


class Runs:
    """Runs in a folder, each once; results are kept beside them.

    Args:
        folder: of all runs.
        cores: how many runs go on at a time, each on a core of its own; one has all cores.
    """

    def __init__(self, folder: Path, cores: int) -> None:
        self.folder, self._free = folder, list(range(cores)) if cores > 1 else [None]
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def trained(self, name: str, rate: float, seed: int, steps: int = NUM_STEPS) -> dict[str, Any]:
        """What training gave: held-out loss, seconds a step, peak memory."""
        folder = self.folder / run_key(name, rate, seed, steps)
        return self._remembered(
            folder, "trained", lambda: self._train(CONTENDERS[name], folder, rate, seed, steps)
        )

    def asked(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """What the trained model answers to the held-out questions."""
        folder = self.folder / run_key(name, rate, seed)
        return self._remembered(folder, "asked", lambda: self._ask(folder))

    def _remembered(
        self, folder: Path, kind: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        note = folder.with_name(f"{folder.name}.{kind}.json")
        if not note.exists():
            result = make()
            print(f"{time.strftime('%H:%M:%S')} {folder.name} {kind} {result}", file=sys.stderr)
            note.write_text(json.dumps(result), encoding="utf-8")
        result = json.loads(note.read_text(encoding="utf-8"))
        return dict(result)

    def _train(
        self, contender: Contender, folder: Path, rate: float, seed: int, steps: int
    ) -> dict[str, Any]:
        config = folder.with_name(f"{folder.name}.yaml")
        values = config_of(contender, folder, rate, seed, steps)
        config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        code, output, peak = self._run("train", str(config))
        if code == 4:  # numbers that are not finite: a rate too high, and no result
            return {"failed": output.strip().splitlines()[-1]}
        if code:
            raise SystemExit(f"{config}: exit code {code}\n{output[-2000:]}")
        seconds = [line["seconds"] for line in steps_of(folder)]
        weights = [
            *folder.glob("adapter/adapter_model.safetensors"),
            *folder.glob("model/*.safetensors"),
        ]
        return {
            "heldout_loss": last_heldout_loss(folder),
            "seconds_a_step": statistics.median(seconds[5:]),
            "peak_mib": round(peak),
            "trainable": trainable_in(output),
            "bytes": sum(path.stat().st_size for path in weights),
        }

    def _ask(self, folder: Path) -> dict[str, Any]:
        code, output, _ = self._run("eval", str(folder), "--json")
        if code:
            raise SystemExit(f"eval {folder}: exit code {code}\n{output[-2000:]}")
        # Libraries may say something, braces and all, before it.
        start = f"\n{output}".rindex("\n{\n")
        result = json.loads(output[start : output.rindex("\n}") + 2])
        return {"loss": result["loss"], "exact_match": result["exact_match"]}

    def _run(self, *arguments: str) -> tuple[int, str, float]:
        """Exit code, output and peak memory (MiB) of one verb."""
        with self._lock:
            core = self._free.pop()
        try:
            command = [sys.executable, "-m", "finetune", *arguments]
            if core is not None:
                command = ["taskset", "-c", str(core), *command]
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "TQDM_DISABLE": "1"},
            )
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            return os.waitstatus_to_exitcode(status), output, usage.ru_maxrss / 1024
        finally:
            with self._lock:
                self._free.append(core)


def trainable_in(output: str) -> int:
    """The count that `train` prints."""
    line = next(line for line in output.splitlines() if line.startswith("model "))
    return int(line.split()[1].replace(",", ""))


def best_rate(runs: Runs, name: str) -> tuple[float, dict[float, float]]:
    """The rate with the lowest held-out loss, and the loss at each that was tried."""
    rates, losses = list(CONTENDERS[name].rates), {}
    for growth in range(GROWTHS + 1):
        for rate in rates:
            if rate not in losses:
                losses[rate] = runs.trained(name, rate, SEEDS[0]).get("heldout_loss", float("inf"))
        best = min(losses, key=lambda rate: losses[rate])
        if best not in (min(losses), max(losses)) or growth == GROWTHS:
            break
        factor = 3.0 if best == max(losses) else 1 / 3
        rates.append(float(f"{best * factor:.1g}"))
    return best, dict(sorted(losses.items()))


def compare(runs: Runs, names: Iterable[str], jobs: int) -> dict[str, Any]:
    """The first pass: quality."""

    def one(name: str) -> tuple[str, dict[str, Any]]:
        rate, losses = best_rate(runs, name)
        seeds = SEEDS if CONTENDERS[name].is_main else SEEDS[:1]
        trained = [runs.trained(name, rate, seed) for seed in seeds]
        asked = [runs.asked(name, rate, seed) for seed in seeds]
        return name, {
            "learning_rate": rate,
            "loss_by_rate": {f"{r:g}": loss for r, loss in losses.items()},
            "heldout_loss": [run["heldout_loss"] for run in trained],
            "exact_match": [run["exact_match"] for run in asked],
            "trainable": trained[0]["trainable"],
            "bytes": trained[0]["bytes"],
        }

    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(one, names))


def measure(runs: Runs, table: dict[str, Any]) -> None:
    """The second pass: time and memory, each method alone."""
    for name, row in table.items():
        timed = runs.trained(name, row["learning_rate"], SEEDS[0], TIMED_STEPS)
        row["ms_a_step"] = round(1000 * timed["seconds_a_step"], 1)
        row["peak_mib"] = timed["peak_mib"]


def main(argv: Sequence[str] | None = None) -> int:
    """Both passes, then the table and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--measure", type=Path, help="a kept result: only its time and memory")
    args = parser.parse_args(argv)
    if args.measure:
        table = json.loads(args.measure.read_text(encoding="utf-8"))["methods"]
    else:
        names = args.only or list(CONTENDERS)
        table = compare(Runs(args.folder, args.jobs), names, args.jobs)
    measure(Runs(args.folder, 1), table)
    result = {"date": time.strftime("%Y-%m-%d"), "steps": NUM_STEPS, "methods": table}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
