"""The merged folder, streamed: memory holds one tensor in float32, its update and its rounding.

A tensor without an update passes by rows. Both the bytes read and the bytes written are hashed on
their way: a base that changes while it is merged is noticed, and nothing is read back for the
manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from finetune import artifact
from finetune.errors import CheckFailed
from finetune.hashing import BackgroundSha256
from finetune.llama.safetensors_pieces import HashedReading
from finetune.llama.safetensors_stream import file_content
from finetune.llama.tokenizer import save_tokenizer
from finetune.llama.weight_files import INDEX
from finetune.merging.plan import MergePlan, PlannedTensor
from finetune.merging.quantized import dequantized, is_quantized
from finetune.model import DTYPES, write_generation_config

_BLOCK_BYTES = 32 << 20


def write_merged(plan: MergePlan, folder: Path, base_hashes: dict[str, str]) -> dict[str, str]:
    """Writes weights, index, config, tokenizer and generation_config into a folder.

    Args:
        base_hashes: sha256 of the base's files, by name.

    Returns:
        sha256 of the weight files written, by name.

    Raises:
        CheckFailed: a file of the base changed since it was checked.
    """
    hashes = {}
    for path, tensors in plan.files.items():
        hashes[path.name], read = _write_shard(plan, path, tensors, folder / path.name)
        if read != base_hashes[path.name]:
            raise CheckFailed(f"{path}: changed while it was merged; nothing is published")
    if len(plan.files) > 1 or (plan.base.folder / INDEX).is_file():
        _write_index(plan, folder)
    settings = artifact.read_json(plan.base.folder / "config.json")
    settings.pop("torch_dtype", None)
    settings.pop("quantization_config", None)
    settings["dtype"] = plan.dtype
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(plan.base.tokenizer, folder)
    write_generation_config(plan.base, folder)
    return hashes


def _write_shard(
    plan: MergePlan, path: Path, tensors: list[PlannedTensor], out: Path
) -> tuple[str, str]:
    """One file; returns the sha256 of what was written and of what was read."""
    by_name = {tensor.stored.name: tensor for tensor in tensors}
    written = BackgroundSha256()
    with HashedReading(path) as reading, out.open("wb") as file:

        def make(name: str) -> Iterable[torch.Tensor]:
            return merged_pieces(plan, reading, by_name[name])

        for content in file_content([tensor.planned for tensor in tensors], make):
            written.update(content)
            file.write(content)
        found = reading.finish()
    digest = written.hexdigest()
    written.close()
    return digest, found


def merged_pieces(
    plan: MergePlan, reading: HashedReading, tensor: PlannedTensor
) -> Iterator[torch.Tensor]:
    """A tensor in the output type, by rows, or whole where an update needs all of it.

    The base is first rounded to the type it was trained in: that model is the one to reproduce.
    """
    trained, dtype = DTYPES[plan.trained_dtype], DTYPES[plan.dtype]
    is_rounded = plan.target == "dequantized" and is_quantized(
        plan.quantization, tensor.stored.name
    )
    if tensor.update is None and not is_rounded:
        for block in reading.blocks(tensor.stored, _BLOCK_BYTES):
            yield block.to(trained).to(dtype)
        return
    weight = reading.tensor(tensor.stored).to(trained)
    if is_rounded:
        weight = dequantized(weight, plan.quantization)
    yield (tensor.update.apply(weight) if tensor.update else weight).to(dtype)


def _write_index(plan: MergePlan, folder: Path) -> None:
    names = {t.stored.name: path.name for path, tensors in plan.files.items() for t in tensors}
    content = {"metadata": {"total_size": plan.num_bytes}, "weight_map": names}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
