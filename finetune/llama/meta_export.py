"""A Hugging Face folder in Meta's layout: params.json, consolidated.NN.pth, tokenizer.model."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import artifact
from finetune.errors import InputError
from finetune.llama.architecture import from_llama_config, from_params_json, to_params_json
from finetune.llama.downloads import read_json_object
from finetune.llama.hyperparameters import Architecture
from finetune.llama.meta_checkpoint import PARAMS
from finetune.llama.meta_layout import (
    BY_COLUMNS,
    BY_ROWS,
    cut,
    hf_to_meta_rows,
    num_rotated_heads,
    weights_of,
)
from finetune.llama.pth_stream import pth_file
from finetune.llama.safetensors_stream import Planned
from finetune.llama.stored_weights import StoredWeight, stored_weights
from finetune.llama.tiktoken_file import looks_like_tiktoken

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL = "original"  # where the hub's Llama folders keep Meta's own files
TOKENIZER = "tokenizer.model"


def export_checkpoint(
    hf_folder: Path,
    out: Path,
    num_shards: int = 1,
    *,
    embedding_split: int | None = None,
    tokenizer: Path | None = None,
    readme: str | None = None,
) -> None:
    """Converts a Hugging Face folder to Meta's layout: the inverse of `import_checkpoint`.

    Memory holds one weight, whatever the number of shards.

    Args:
        hf_folder: a Llama with safetensors.
        out: the folder to write; must not exist.
        num_shards: number of consolidated.NN.pth files.
        embedding_split: how the embedding is cut; by default as the tokenizer's family does
            (`BY_COLUMNS` for SentencePiece, Llama 1 and 2; `BY_ROWS` for tiktoken, Llama 3).
        tokenizer: the original tokenizer file, where the folder does not hold it.
        readme: a model card, written as README.md.

    Raises:
        InputError: not a Llama that Meta's layout can express, or not cut evenly so.
    """
    if num_shards < 1:
        raise InputError(f"num_shards: {num_shards} is not allowed; it must be at least 1")
    arch = from_llama_config(artifact.read_json(hf_folder / "config.json"))
    tokenizer_path = tokenizer or _exportable_tokenizer(hf_folder)
    if embedding_split is None:
        embedding_split = _family_split(tokenizer_path)
    weights = list(weights_of(arch, num_shards, embedding_split))
    uneven = [w.meta for w in weights if not w.divides(num_shards)]
    if uneven:
        raise InputError(f"num_shards: {num_shards} does not cut {uneven[:3]} into equal parts")
    params = _params(hf_folder, arch)
    stored = stored_weights(hf_folder, arch, weights)
    with artifact.staged(out, {"kind": "export", "format": "meta"}) as folder:
        _write_shards(folder, arch, stored, num_shards)
        text = json.dumps(params, indent=2) + "\n"
        (folder / PARAMS).write_text(text, encoding="utf-8")
        shutil.copyfile(tokenizer_path, folder / TOKENIZER)
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")


def _write_shards(
    folder: Path, arch: Architecture, stored: list[StoredWeight], num_shards: int
) -> None:
    """Writes all shards at once, so that every weight is read once and memory holds one."""
    plan = [Planned(s.weight.meta, s.dtype, s.weight.shard_shape(num_shards)) for s in stored]
    with contextlib.ExitStack() as stack:
        appends = [
            stack.enter_context(pth_file(folder / f"consolidated.{shard:02d}.pth", plan))
            for shard in range(num_shards)
        ]
        for one in stored:
            whole = _in_metas_order(arch, one)
            for shard, append in enumerate(appends):
                append(cut(one.weight, whole, num_shards, shard))


def _in_metas_order(arch: Architecture, stored: StoredWeight) -> Tensor:
    whole = stored.read()
    if stored.weight.rotated:
        whole = hf_to_meta_rows(whole, num_rotated_heads(stored.weight, arch))
    return whole


def _params(hf_folder: Path, arch: Architecture) -> dict[str, Any]:
    """The original params.json where it describes this very model, else one that is made."""
    kept = hf_folder / ORIGINAL / PARAMS
    made = to_params_json(arch)
    if not kept.is_file():
        return made
    params = read_json_object(kept)
    meant = to_params_json(from_params_json(params, vocab_size=arch.vocab_size))
    sizes = ("multiple_of", "ffn_dim_multiplier")  # many pairs give one width
    alike = all(made.get(k) == meant.get(k) for k in made.keys() | meant.keys() if k not in sizes)
    width = from_params_json(made).intermediate_size
    same_width = width == from_params_json(meant).intermediate_size
    return params if alike and same_width else made


def _exportable_tokenizer(hf_folder: Path) -> Path:
    for folder in (hf_folder / ORIGINAL, hf_folder):
        if (folder / TOKENIZER).is_file():
            return folder / TOKENIZER
    raise InputError(
        f"{hf_folder}: has no {TOKENIZER}, nor has its folder {ORIGINAL}/; Meta's layout needs the "
        "original tokenizer file: copy it there"
    )


def _family_split(tokenizer: Path) -> int:
    with tokenizer.open("rb") as file:
        return BY_ROWS if looks_like_tiktoken(file.read(4096)) else BY_COLUMNS
