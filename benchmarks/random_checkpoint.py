"""A checkpoint of random numbers in Meta's layout, of any documented shape, made once on disk.

    python -m benchmarks.random_checkpoint FOLDER --preset llama3.1-8b --shards 1

It holds what an importer looks at: params.json, consolidated.NN.pth as torch.save writes them
(bfloat16), and a tiktoken file with as many ranks as the vocabulary asks for. The numbers depend
on nothing but the shape and the number of shards.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import random
import shutil
import string
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.llama.architecture import PRESETS, Architecture, scaled_down, to_params_json
from finetune.llama.meta_layout import Weight, weights_of

if TYPE_CHECKING:
    from torch import Tensor

NUM_SPECIAL = 256
_SMALL_VOCABULARY = 1024
_LONGEST_PART = 6
_STD = 0.02


def shape_of(preset: str, small: bool) -> Architecture:
    """A documented architecture, or its tiny relative with the same code paths."""
    arch = PRESETS[preset]
    return scaled_down(arch, _SMALL_VOCABULARY) if small else arch


def tiktoken_ranks(num_ranks: int) -> bytes:
    """A ranks file: the 256 bytes, then joins of two lower ranks, letters only, seeded."""
    chance = random.Random(0)
    ranks = [bytes([byte]) for byte in range(256)]
    known = set(ranks)
    parts = [letter.encode() for letter in string.ascii_lowercase]
    while len(ranks) < num_ranks:
        joined = chance.choice(parts) + chance.choice(parts)
        if joined in known:
            continue
        known.add(joined)
        ranks.append(joined)
        if len(joined) <= _LONGEST_PART:
            parts.append(joined)
    return b"".join(base64.b64encode(r) + b" %d\n" % number for number, r in enumerate(ranks))


def make_checkpoint(folder: Path, arch: Architecture, num_shards: int) -> None:
    """Writes the folder; its name appears when all of it is there.

    The tensors of a shard are backed by a temporary file beside it, as large as the shard, so
    that making a checkpoint larger than the memory is slow and not impossible.
    """
    stage = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    text = json.dumps(to_params_json(arch), indent=2) + "\n"
    (stage / "params.json").write_text(text, encoding="utf-8")
    (stage / "tokenizer.model").write_bytes(tiktoken_ranks(arch.vocab_size - NUM_SPECIAL))
    for shard in range(num_shards):
        _write_shard(stage / f"consolidated.{shard:02d}.pth", arch, shard, num_shards)
    os.rename(stage, folder)


def _write_shard(path: Path, arch: Architecture, shard: int, num_shards: int) -> None:
    import torch

    with tempfile.NamedTemporaryFile(dir=path.parent) as backing:
        state: dict[str, Tensor] = {}
        offset = 0
        for weight in weights_of(arch, num_shards):
            shape = weight.shard_shape(num_shards)
            state[weight.meta] = _mapped(Path(backing.name), offset, shape)
            offset += -(-state[weight.meta].nbytes // 4096) * 4096
            _fill(state[weight.meta], weight, shard)
        torch.save(state, path)


def _mapped(path: Path, offset: int, shape: tuple[int, ...]) -> Tensor:
    """A bfloat16 tensor whose memory is a piece of a file, which grows to hold it."""
    import numpy as np
    import torch

    array = np.memmap(path, dtype=np.int16, mode="r+", offset=offset, shape=(math.prod(shape),))
    return torch.from_numpy(array).view(torch.bfloat16).view(shape)


def _fill(tensor: Tensor, weight: Weight, shard: int) -> None:
    """Seeded normal numbers; what every shard repeats is the same in each."""
    import torch

    copy_of = 0 if weight.split is None else shard - shard % weight.num_copies
    seed = zlib.crc32(f"{weight.meta} {copy_of}".encode())
    tensor.normal_(std=_STD, generator=torch.Generator().manual_seed(seed))
    if tensor.dim() == 1:
        tensor.add_(1.0)  # a norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama3.1-8b")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="its tiny relative")
    args = parser.parse_args()
    make_checkpoint(args.folder, shape_of(args.preset, args.small), args.shards)


if __name__ == "__main__":
    main()
