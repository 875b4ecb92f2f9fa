"""`export`: a run's merged weights, or a model folder, in another layout.

| format | what is written |
|---|---|
| meta | params.json, consolidated.NN.pth and tokenizer.model, as Meta ships its checkpoints |
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune import artifact
from finetune.errors import InputError
from finetune.llama.meta_format import export_checkpoint
from finetune.llama.tokenizer import fingerprint, load_tokenizer
from finetune.model import find_base, is_meta_layout
from finetune.run_folder import RunFolder

FORMATS = ("meta",)
ORIGINALS = ("original/tokenizer.model", "tokenizer.model")


def exportable_folder(target: Path) -> Path:
    """The full weights that a run or a folder stands for, verified where they have a manifest.

    Raises:
        InputError: a run without full weights, or no model at all.
        CheckFailed: the folder differs from its manifest.
    """
    folder = target
    if (target / "config.yaml").exists():
        run = RunFolder(target)
        folder = run.model if run.model.is_dir() else run.merged
        if not folder.is_dir():
            raise InputError(
                f"{target}: has no full weights yet; `python -m finetune merge {target}` makes them"
            )
    elif is_meta_layout(target):
        raise InputError(f"{target}: is in Meta's layout already")
    elif not (target / "config.json").is_file():
        raise InputError(
            f"{target}: is neither a run (config.yaml) nor a model folder (config.json)"
        )
    if (folder / artifact.MANIFEST).exists():
        artifact.verify(folder)
    return folder


def original_tokenizer(target: Path, folder: Path, given: Path | None) -> Path:
    """The original tokenizer file of a model: SentencePiece or tiktoken, not tokenizer.json.

    Looked for where it was named, in the model's folder, in that of the run's base, and where the
    run's config names one.

    Raises:
        InputError: there is none, or it gives other ids than the model's own tokenizer.
    """
    places = [folder]
    if given is not None:
        places = [given]
    elif (target / "config.yaml").exists():
        config = RunFolder(target).config()
        places.append(find_base(config, target).folder)
        places += [Path(config.base.tokenizer)] if config.base.tokenizer else []
    found = [f for place in places for f in _candidates(place) if f.is_file()]
    if not found:
        raise InputError(
            f"{folder}: Meta's layout needs the original tokenizer.model, and there is none in "
            f"{' or '.join(map(str, places))}; name it with --tokenizer"
        )
    if fingerprint_of_file(found[0], folder) != fingerprint(load_tokenizer(folder)):
        raise InputError(f"{found[0]}: is not the tokenizer of {folder}; name the right one")
    return found[0]


def _candidates(place: Path) -> list[Path]:
    if place.is_file():
        return [] if place.suffix == ".json" else [place]  # tokenizer.json is nobody's original
    return [place / name for name in ORIGINALS]


def fingerprint_of_file(path: Path, model_folder: Path) -> str:
    """The fingerprint of a tokenizer file that belongs to a model."""
    return fingerprint(load_tokenizer(path, model_folder=model_folder))


def main(argv: Sequence[str]) -> int:
    """The verb `export`."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune export", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("target", type=Path, help="a run folder or a model folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--shards", type=int, default=1, help="consolidated.NN.pth files (1)")
    parser.add_argument("--tokenizer", type=Path, help="the original tokenizer.model")
    parser.add_argument("--json", action="store_true", help="what was written, as JSON on stdout")
    args = parser.parse_args(list(argv))
    folder = exportable_folder(args.target)
    tokenizer = original_tokenizer(args.target, folder, args.tokenizer)
    export_checkpoint(folder, args.out, args.shards, tokenizer=tokenizer)
    files = artifact.read_manifest(args.out)["files"]
    num_bytes = sum(entry["bytes"] for entry in files.values())
    print(f"exported {args.out}: {len(files)} files, {num_bytes:,} bytes", file=sys.stderr)
    if args.json:
        facts = {"out": str(args.out), "format": args.format, "shards": args.shards}
        print(json.dumps({**facts, "bytes": num_bytes}))
    return 0
