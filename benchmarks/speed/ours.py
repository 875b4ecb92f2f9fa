"""Ours: the verb `train` on the workload, as a user runs it.

python -m benchmarks.speed.ours --folder FOLDER --size 58m --dtype float32 --steps 11 --result FILE
"""

from __future__ import annotations

import shutil

import yaml

from benchmarks.records import steps_of
from benchmarks.speed.recorder import Recorder, contender_parser
from benchmarks.speed.workload import SIZES, config_of


def main() -> int:
    """Trains, and writes what the run noted beside the recorder's own notes."""
    parser = contender_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("overrides", nargs="*", help="key=value for our config")
    args = parser.parse_args()
    from finetune.__main__ import main as run_verb

    name = args.result.stem
    shutil.rmtree(args.folder / "runs" / name, ignore_errors=True)
    config = config_of(args.folder, SIZES[args.size], args.dtype, name, max_steps=args.steps)
    file = args.result.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    recorder = Recorder(args.result)
    code = run_verb(["train", str(file), *args.overrides])
    steps = steps_of(args.folder / "runs" / name)
    recorder.write(losses=[s["loss"] for s in steps], keys=sorted(steps[0]))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
