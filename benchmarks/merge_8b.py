"""Memory and time of a merge of an 8B-shaped base, its proof, and PEFT's own merge beside it.

    python -m benchmarks.merge_8b --folder FOLDER --json RESULT.json

FOLDER needs room for three times the base (48 GB). Base and adapter are made there once (random
weights) and found again. Everything measured runs in a process of its own, on files that are not in
the page cache; plain copies of the same files, each fsynced, are made before and after the merge,
and their mean is what it is compared with. The exit code is 1 if the merge's peak or its time, the
proof apart, is over the limit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.import_8b import ROOT, _forget_pages, _machine, _python, _seconds_to_copy
from benchmarks.peaks import Measured, run_measured
from benchmarks.random_checkpoint import shape_of
from benchmarks.records import today
from finetune import artifact
from finetune.llama.architecture import PRESETS

LIMIT_GIB, LIMIT_COPIES = 2.5, 2.0
PROOF = "prove"
_PEFT_MERGE = """
import sys, torch, os
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
for path in Path(out).iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
"""


def measure(folder: Path, preset: str, small: bool, num_shards: int) -> dict[str, Any]:
    """Copy, merge with proof, and PEFT's merge where it fits."""
    source = folder / f"{preset}{'-small' if small else ''}-run"
    if not source.exists():
        options = ["--preset", preset, "--shards", str(num_shards), *(["--small"] * small)]
        _python("-m", "benchmarks.random_run", str(source), *options)
    base, run = source / "base", source / "run"
    for left_over in (run / "merged", folder / "copied", folder / "by-peft"):
        shutil.rmtree(left_over, ignore_errors=True)
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    result: dict[str, Any] = {"files": len(sizes), "bytes": sum(sizes)}
    copies = [_seconds_to_copy(base, folder / "copied")]
    _forget_pages(source)
    command = [sys.executable, "-m", "finetune", "merge", str(run)]
    result["merge"] = run_measured(command, ROOT, lambda: _phase(run)).as_json()
    proof = artifact.read_json(run / "merge.json")["proof"]
    keys = ("rows", "tokens", "text", "max_weight_error_ulps", "relative_logit_difference", "kl")
    result["proof"] = {key: proof[key] for key in (*keys, "same_next_token")}
    shutil.rmtree(run / "merged")
    copies.append(_seconds_to_copy(base, folder / "copied"))
    result["plain_copies"] = [round(seconds, 2) for seconds in copies]
    # of a tiny base a few milliseconds, which two digits would round to nothing to divide by
    result["plain_copy_seconds"] = round(sum(copies) / len(copies), 4)
    result["peft"] = _peft(base, run / "adapter", folder / "by-peft", result["bytes"])
    return result


def _phase(run: Path) -> str:
    """What a merge is doing, by what lies on the disk."""
    stage = next(run.glob(".merged.tmp-*"), None)
    if (run / "merged").exists() or (stage and (stage / artifact.MANIFEST).exists()):
        return "publish"
    if stage is None:
        return "check"
    return PROOF if (stage / "generation_config.json").exists() else "write"


def _peft(base: Path, adapter: Path, out: Path, num_bytes: int) -> dict[str, Any]:
    """PEFT's merge_and_unload of the same; not tried where the base would not fit."""
    available = available_bytes()
    if available < 1.2 * num_bytes:
        return {"skipped": f"{available / 2**30:.1f} GiB of memory available"}
    _forget_pages(base)
    command = [sys.executable, "-c", _PEFT_MERGE, str(base), str(adapter), str(out)]
    try:
        measured: Measured = run_measured(command, ROOT, lambda: "all")
    except subprocess.CalledProcessError as error:
        return {"failed": f"exit code {error.returncode}; -9 is a kill, as for want of memory"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return measured.as_json()


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else 0


def seconds_without_proof(run: dict[str, Any]) -> float:
    """Of the merge: everything but the proof."""
    phases = run["merge"]["phases"]
    return float(sum(phase["seconds"] for name, phase in phases.items() if name != PROOF))


def is_good(run: dict[str, Any]) -> bool:
    """Whether peak and time are within their limits."""
    return (
        run["merge"]["peak_gib"] <= LIMIT_GIB
        and seconds_without_proof(run) <= LIMIT_COPIES * run["plain_copy_seconds"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write; a local disk")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama3.1-8b")
    parser.add_argument("--small", action="store_true", help="the preset's tiny relative: seconds")
    parser.add_argument("--shards", type=int, default=4, help="files of the base, at least")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    args = parser.parse_args(argv)
    arch = shape_of(args.preset, args.small)
    run = measure(args.folder.resolve(), args.preset, args.small, args.shards)
    result = {
        "date": today(),
        "machine": _machine(),
        "load_average": round(os.getloadavg()[2], 1),
        "preset": args.preset + (" (small)" if args.small else ""),
        "num_parameters": arch.num_parameters().total,
        "dtype": "bfloat16",
        "limits": {"peak_gib": LIMIT_GIB, "copies": LIMIT_COPIES},
        **run,
        "copies": round(seconds_without_proof(run) / run["plain_copy_seconds"], 2),
    }
    if args.json:
        artifact.write_json(args.json.resolve(), result)
    print(f"copy {run['plain_copy_seconds']} s; merge {run['merge']}; PEFT {run['peft']}")
    return 0 if is_good(run) else 1


if __name__ == "__main__":
    sys.exit(main())
