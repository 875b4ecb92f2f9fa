"""Training speed and memory: every contender in turn, round after round, on the same packs.

python -m benchmarks.speed --folder build/speed --json build/speed.json

Each contender is a process of its own and runs alone. Timed are optimizer steps from end to end of
one to the next; the first three of each process are left out. The matrix product of the machine is
measured before every round. Both dtypes and both allocator settings are one run each; a contender's
numbers are compared only within its run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import today
from benchmarks.speed import table
from benchmarks.speed.workload import ROOT, SIZES, make
from finetune import artifact
from finetune.config import FastSection

WARM = 3  # steps left out
DTYPES = ("float32", "bfloat16")
ALLOCATORS = {
    "glibc": {},
    # Large temporaries stay mapped: no page faults on them in every step.
    "glibc, kept": {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592:"
        "glibc.malloc.trim_threshold=17179869184"
    },
}
_OURS = ("fast.allocator=false",)  # every contender gets the same
_OFF = tuple(f"fast.{part}=false" for part in FastSection.model_fields if part != "allocator")


@dataclass(frozen=True)
class Contender:
    """A trainer and how it is called.

    Attributes:
        module: of `benchmarks.speed`.
        arguments: beyond those that all have.
        peer: whose environment it needs; None is ours.
        dtypes: that it trains in, on a CPU.
    """

    module: str
    arguments: tuple[str, ...] = ()
    peer: str | None = None
    dtypes: tuple[str, ...] = DTYPES


CONTENDERS = {
    "ours": Contender("ours", _OURS),
    "ours as shipped": Contender("ours"),  # differs where the allocator is glibc's
    "ours in nf4": Contender("ours", ("base.quantization=nf4", *_OURS)),
    "trl packed": Contender("trl_trainer"),
    "trl packed in nf4": Contender("trl_trainer", ("--nf4",)),
    "trl packed in nf4 as shipped": Contender("trl_trainer", ("--nf4", "--cast-adapter")),
    "trl padded": Contender("trl_trainer", ("--padded",)),
    "torchtune packed": Contender("torchtune_trainer", (), "torchtune"),
    "litgpt padded": Contender("litgpt_trainer", (), "litgpt"),  # it has no packing
    "llamafactory packed": Contender("llamafactory_trainer", ("--packed",), "llamafactory"),
    "llamafactory padded": Contender("llamafactory_trainer", (), "llamafactory"),
    "axolotl packed": Contender("axolotl_trainer", ("--packed",), "axolotl", ("float32",)),
    "axolotl padded": Contender("axolotl_trainer", (), "axolotl", ("float32",)),
    **{f"ours without {off.split('=')[0]}": Contender("ours", (off, *_OURS)) for off in _OFF},
    "ours with nothing fast": Contender("ours", (*_OFF, *_OURS)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for, and shows it as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="workload and runs; kept")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    parser.add_argument("--size", choices=SIZES, default="58m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=11, help="of each process")
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--allocator", nargs="*", choices=ALLOCATORS, default=list(ALLOCATORS))
    usual = [name for name in CONTENDERS if "nf4" not in name]
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=usual)
    parser.add_argument(
        "--peers",
        type=Path,
        default=ROOT / "build" / "peers",
        help="where make bench-peers put them",
    )
    args = parser.parse_args(argv)
    args.only = those_at_hand(args.only, args.peers)
    folder = args.folder.resolve()
    make(folder, SIZES[args.size])
    runs: list[dict[str, Any]] = []
    result = {
        "date": today(),
        "size": args.size,
        "steps": args.steps,
        "warm": WARM,
        "runs": runs,
    }
    for dtype in args.dtype:
        for allocator in args.allocator:
            found = _interleaved(folder, args, dtype, ALLOCATORS[allocator])
            runs.append({"dtype": dtype, "allocator": allocator, **found})
            if args.json:
                artifact.write_json(args.json.resolve(), result)
    print("\n\n".join(table.lines(run, WARM) for run in runs))
    return 1 if any(run["failed"] for run in runs) else 0


def those_at_hand(names: Sequence[str], peers: Path) -> list[str]:
    """Contenders but those whose environment is not there, which is said."""
    found = [name for name in names if _interpreter(name, peers).exists()]
    absent = {str(CONTENDERS[name].peer) for name in names if name not in found}
    if absent:
        print(f"not in {peers}, so left out: {', '.join(sorted(absent))}", file=sys.stderr)
    return found


def _interleaved(
    folder: Path, args: argparse.Namespace, dtype: str, environment: dict[str, str]
) -> dict[str, Any]:
    """Every contender once a round; what each process noted, by contender. One that fails, for want
    of memory say, is left out from there on, which is said."""
    chosen = [name for name in args.only if dtype in CONTENDERS[name].dtypes]
    notes: dict[str, list[Any]] = {name: [] for name in chosen}
    failed: dict[str, int] = {}
    gflops = []
    for number in range(args.rounds):
        gflops.append(_roofline(dtype, environment))
        for name in reversed(chosen) if number % 2 else chosen:  # a machine slows and speeds up
            if name in failed:
                continue
            contender = CONTENDERS[name]
            result = folder / f"{name.replace(' ', '-')}.json"
            command = [
                str(_interpreter(name, args.peers)),
                "-m",
                f"benchmarks.speed.{contender.module}",
            ]
            command += ["--folder", str(folder), "--dtype", dtype, "--steps", str(args.steps)]
            command += ["--result", str(result)]
            command += ["--size", args.size] if contender.module == "ours" else []
            log = result.with_suffix(".log")
            code = _run([*command, *contender.arguments], environment, log)
            if code != 0:
                failed[name] = code
                del notes[name]
                print(f"{dtype} {name}: failed with {code}, left out: {log}", file=sys.stderr)
                continue
            notes[name].append(json.loads(result.read_text(encoding="utf-8")))
            print(f"{dtype} round {number + 1} {name}: done", file=sys.stderr)
    useful = _useful(folder, args)
    return {"gflops": gflops, "useful_flops": useful, "notes": notes, "failed": failed}


def _interpreter(name: str, peers: Path) -> Path:
    """Of the contender's environment; a link, which must not be followed."""
    peer = CONTENDERS[name].peer
    return Path(sys.executable) if peer is None else peers.absolute() / peer / "bin" / "python"


def _useful(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Tokens, supervised tokens and useful FLOPs of each packed step."""
    from benchmarks.speed.workload import config_of
    from finetune.budget import budget_of
    from finetune.config import RunConfig
    from finetune.llama.architecture import architecture_of
    from finetune.workload import flops_of

    size = SIZES[args.size]
    config = RunConfig.model_validate(config_of(folder, size, "bfloat16", "count"))
    budget = budget_of(config, architecture_of(size.architecture))
    found = []
    for packs in json.loads((folder / "steps.json").read_text(encoding="utf-8"))[: args.steps]:
        documents = [document for pack in packs for document in pack]
        tokens = sum(len(ids) for ids, _ in documents)
        supervised = sum(label != -100 for _, labels in documents for label in labels)
        flops = flops_of(budget, config, tokens, supervised)
        found.append({"tokens": tokens, "supervised": supervised, "flops": flops})
    return found


def _roofline(dtype: str, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "benchmarks.speed.roofline", "--dtype", dtype]
    answer = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, check=True, capture_output=True
    )
    return float(json.loads(answer.stdout)["gflops"])


def _run(command: Sequence[str], environment: dict[str, str], log: Path) -> int:
    with log.open("w", encoding="utf-8") as output:
        answer = subprocess.run(
            command, env=os.environ | environment, cwd=ROOT, stdout=output, stderr=output
        )
    return answer.returncode


if __name__ == "__main__":
    raise SystemExit(main())
