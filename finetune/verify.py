"""`verify DIR`: compares a run, checkpoint, adapter or model folder with its manifest."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.artifact import MANIFEST, findings_of
from finetune.errors import CheckFailed, InputError


def main(argv: Sequence[str]) -> int:
    """The verb `verify`; exit 3 names every file that differs."""
    parser = argparse.ArgumentParser(prog="python -m finetune verify", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(list(argv))
    folders = published_folders(args.folder)
    if not folders:
        raise InputError(f"{args.folder}: holds no {MANIFEST}; nothing to compare with")
    findings = [finding for folder in folders for finding in findings_of(folder)]
    if args.json:
        print(json.dumps({"folders": [str(f) for f in folders], "findings": findings}, indent=2))
    if findings:
        raise CheckFailed("\n".join(findings))
    print(f"verified {', '.join(map(str, folders))}", file=sys.stderr)
    return 0


def published_folders(folder: Path) -> list[Path]:
    """The folder itself, or every published folder below a run."""
    if (folder / MANIFEST).exists():
        return [folder]
    return sorted(path.parent for path in folder.rglob(MANIFEST) if ".tmp-" not in str(path))
