"""Memory and time of an import of an 8B-shaped checkpoint, and of the way back.

    python -m benchmarks.import_8b --folder FOLDER --shards 1 2 --json RESULT.json

FOLDER needs room for twice the checkpoint (32 GB) with `--discard`, else for three times. The
checkpoint is made there once and found again. Everything measured runs in a process of its own,
on files that are not in the page cache; a plain copy of the same bytes stands beside it for scale.
The exit code is 1 if a peak is over the limit or a weight came back with other bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peaks import Measured, run_measured
from benchmarks.random_checkpoint import shape_of
from benchmarks.records import today
from finetune import artifact
from finetune.llama.architecture import PRESETS

ROOT = Path(__file__).parents[1]
LIMIT_GIB = 4.0
EXPORTED_SHARDS = (1, 8)
_EXPORT = """
import sys
from pathlib import Path
from finetune.llama.meta_format import export_checkpoint
export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
"""


@dataclass(frozen=True)
class Shape:
    """What is imported.

    Attributes:
        preset: a documented architecture.
        small: its tiny relative instead, for a test of this script.
    """

    preset: str
    small: bool

    def arguments(self) -> list[str]:
        """The same, for another process."""
        return ["--preset", self.preset, *(["--small"] if self.small else [])]


def measure(folder: Path, shape: Shape, num_shards: int, discard: bool) -> dict[str, Any]:
    """One checkpoint there and back.

    Args:
        folder: where everything is written.
        shape: the checkpoint's.
        num_shards: in how many parts it lies.
        discard: remove it when it is no longer needed.
    """
    source = _made(folder, shape, num_shards)
    before = _fingerprints(source)
    imported = folder / "imported"
    for left_over in (imported, folder / "copied", folder / "exported"):
        shutil.rmtree(left_over, ignore_errors=True)
    result: dict[str, Any] = {
        "num_shards": num_shards,
        "bytes": sum(path.stat().st_size for path in source.iterdir()),
        "plain_copy_seconds": round(_seconds_to_copy(source, folder / "copied"), 2),
        "import": _import(source, imported).as_json(),
    }
    if discard:
        shutil.rmtree(source)
    for number in EXPORTED_SHARDS:
        exported = folder / "exported"
        measured = _export(imported, exported, number).as_json()
        same = _fingerprints(exported) == before
        result[f"export_to_{number}"] = {**measured, "weights_are_identical": same}
        shutil.rmtree(exported)
    shutil.rmtree(imported)
    return result


def _made(folder: Path, shape: Shape, num_shards: int) -> Path:
    name = f"{shape.preset}{'-small' if shape.small else ''}-in-{num_shards}"
    source = folder / name
    if not source.exists():
        _python("-m", "benchmarks.random_checkpoint", str(source), "--shards", str(num_shards),
                *shape.arguments())  # fmt: skip
    return source


def _fingerprints(folder: Path) -> Any:
    return json.loads(_python("-m", "benchmarks.fingerprints", str(folder)))


def _python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def _seconds_to_copy(source: Path, target: Path) -> float:
    """A copy that is on the disk when the clock stops; removed again."""
    _forget_pages(source)
    begun = time.monotonic()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - begun
    shutil.rmtree(target)
    return seconds


def _import(source: Path, out: Path) -> Measured:
    _forget_pages(source)
    command = [sys.executable, "-m", "finetune", "import", str(source), "--out", str(out)]
    return run_measured(command, ROOT, lambda: _phase(out, "config.json"))


def _export(hf_folder: Path, out: Path, num_shards: int) -> Measured:
    _forget_pages(hf_folder)
    command = [sys.executable, "-c", _EXPORT, str(hf_folder), str(out), str(num_shards)]
    return run_measured(command, ROOT, lambda: _phase(out, "params.json"))


def _phase(out: Path, written_after_weights: str) -> str:
    """What a conversion is doing, by what lies on the disk: it stages, hashes and publishes."""
    stage = next(out.parent.glob(f".{out.name}.tmp-*"), None)
    if out.exists() or (stage and (stage / written_after_weights).exists()):
        return "fsync and hash"
    return "write" if stage else "read and check"


def _forget_pages(folder: Path) -> None:
    """Lets the page cache forget the files, as if they had been written long ago."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_good(run: dict[str, Any]) -> bool:
    """Whether every peak is under the limit and every weight came back."""
    parts = [run["import"], *(run[f"export_to_{number}"] for number in EXPORTED_SHARDS)]
    return all(
        part["peak_gib"] < LIMIT_GIB and part.get("weights_are_identical", True) for part in parts
    )


def _machine() -> dict[str, Any]:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _show(run: dict[str, Any]) -> None:
    print(f"{run['num_shards']} shards, {run['bytes'] / 1e9:.2f} GB")
    print(f"  plain copy   {run['plain_copy_seconds']:8.1f} s")
    for name in ("import", *(f"export_to_{number}" for number in EXPORTED_SHARDS)):
        part = run[name]
        phases = ", ".join(f"{key} {value['seconds']:.1f}" for key, value in part["phases"].items())
        print(f"  {name:<12} {part['seconds']:8.1f} s  {part['peak_gib']:.2f} GiB  ({phases})")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write; a local disk")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama3.1-8b")
    parser.add_argument("--small", action="store_true", help="the preset's tiny relative: seconds")
    parser.add_argument("--shards", type=int, nargs="+", default=[1], help="one run for each")
    parser.add_argument("--discard", action="store_true", help="remove checkpoints after use")
    parser.add_argument("--json", type=Path, help="where to keep the result")
    args = parser.parse_args(argv)
    folder, shape = args.folder.resolve(), Shape(args.preset, args.small)
    arch = shape_of(shape.preset, shape.small)
    result = {
        "date": today(),
        "machine": _machine(),
        "preset": shape.preset + (" (small)" if shape.small else ""),
        "num_parameters": arch.num_parameters().total,
        "dtype": "bfloat16",
        "limit_gib": LIMIT_GIB,
        "runs": [],
    }
    for num_shards in args.shards:
        result["runs"].append(measure(folder, shape, num_shards, args.discard))
        _show(result["runs"][-1])
    if args.json:
        artifact.write_json(args.json.resolve(), result)
    return 0 if all(map(is_good, result["runs"])) else 1


if __name__ == "__main__":
    sys.exit(main())
