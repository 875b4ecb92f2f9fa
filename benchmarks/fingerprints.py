"""The sha256 of every weight of a Meta folder, its shards joined: what a round trip must keep.

python -m benchmarks.fingerprints FOLDER > FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from finetune.llama.meta_format import read_checkpoint


def fingerprints(folder: Path) -> dict[str, str]:
    """Type, shape and sha256 of the bytes of every weight, by its name in Meta's files."""
    import torch

    checkpoint = read_checkpoint(folder)
    found = {}
    for name, weight in checkpoint.weights.items():
        tensor = checkpoint.open().tensor(name)  # anew, to let go of the last one's pages
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content.data).hexdigest()
        found[weight.meta] = f"{tensor.dtype} {tuple(tensor.shape)} {digest}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    json.dump(fingerprints(parser.parse_args().folder), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
