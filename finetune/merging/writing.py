"""The merged folder, streamed by rows, or by whole tensors where an update needs all of one.

Four threads share the work: one reads and computes, one hashes what was read, one writes, one
hashes what is written. So a base that is not the adapter's, or changes while it is merged, is
noticed without a reading of its own, and nothing is read back for the manifest.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune import artifact
from finetune.hashing import BackgroundSha256
from finetune.llama.config_json import passed_on
from finetune.llama.safetensors_pieces import HashedReading
from finetune.llama.safetensors_stream import file_content
from finetune.llama.tokenizer import save_tokenizer
from finetune.llama.weight_files import INDEX
from finetune.merging.checks import check_base
from finetune.merging.plan import MergePlan, PlannedTensor
from finetune.merging.quantized import dequantized, is_quantized
from finetune.merging.update import LowRank
from finetune.model import DTYPES, write_generation_config

_BLOCK_BYTES = 8 << 20  # of the base
_KEPT_BYTES = 31 << 20
_SENT_BYTES = 64 << 20  # written, then sent to the disk while the next are made


def write_merged(plan: MergePlan, folder: Path) -> dict[str, str]:
    """Writes weights, index, config, tokenizer and generation_config into a folder.

    Returns:
        sha256 of the weight files written, by name; they are on the disk.

    Raises:
        CheckFailed: what was read is not the base that the adapter was trained on.
    """
    _keep_freed_memory()
    written, read = {}, {}
    with _threads_for(plan):
        for path, tensors in plan.files.items():
            found = _write_shard(plan, path, tensors, folder / path.name)
            written[path.name], read[path.name] = found
    check_base(plan, read)
    if len(plan.files) > 1 or (plan.base.folder / INDEX).is_file():
        _write_index(plan, folder)
    settings = passed_on(artifact.read_json(plan.base.folder / "config.json"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = plan.dtype
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(plan.base.tokenizer, folder)
    write_generation_config(plan.base, folder)
    return written


def _keep_freed_memory() -> None:
    """Has glibc keep what blocks free; the page faults of fresh ones cost more than the merge.

    It gives back to the system whatever is freed above twice the largest mapped block that it has
    seen freed, and never counts blocks above 32 MiB.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)


@contextlib.contextmanager
def _threads_for(plan: MergePlan) -> Iterator[None]:
    """One thread for low-rank updates: more would spin beside the two that hash, and wait."""
    before = torch.get_num_threads()
    if all(isinstance(update, LowRank) for update in plan.updates.values()):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_shard(
    plan: MergePlan, path: Path, tensors: list[PlannedTensor], out: Path
) -> tuple[str, str]:
    """One file; returns the sha256 of what was written and of what was read."""
    by_name = {tensor.stored.name: tensor for tensor in tensors}
    with (
        out.open("wb") as file,
        HashedReading(path) as reading,
        BackgroundSha256(beside=_sending(file)) as written,
    ):

        def make(name: str) -> Iterable[torch.Tensor]:
            return merged_pieces(plan, reading, by_name[name])

        for content in file_content([tensor.planned for tensor in tensors], make):
            written.update(content)
        found, digest = reading.finish(), written.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digest, found


def _sending(file: BinaryIO) -> Callable[[Any], None]:
    """Writes to a file, and has the kernel send to the disk what was written, without waiting.

    By itself it lets a tenth of the memory gather first, and all of that is waited for at the end.
    """
    sent = 0

    def write(content: Any) -> None:
        nonlocal sent
        file.write(content)
        written = file.tell()
        if written - sent >= _SENT_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), sent, written - sent, os.POSIX_FADV_DONTNEED)
            sent = written

    return write


def merged_pieces(
    plan: MergePlan, reading: HashedReading, tensor: PlannedTensor
) -> Iterator[torch.Tensor]:
    """A tensor in the output type, by rows, or whole where an update needs all of it.

    The base is first rounded to the type it was trained in: that model is the one to reproduce.
    """
    trained, dtype = DTYPES[plan.trained_dtype], DTYPES[plan.dtype]
    update = tensor.update
    is_rounded = plan.target == "dequantized" and is_quantized(
        plan.quantization, tensor.stored.name
    )
    if is_rounded or not (update is None or isinstance(update, LowRank)):
        weight = reading.tensor(tensor.stored).to(trained)
        if is_rounded:
            weight = dequantized(weight, plan.quantization)
        yield update.apply(weight, dtype) if update else weight.to(dtype)
        return
    start = 0
    for block in reading.blocks(tensor.stored, _BLOCK_BYTES):
        rows, stop = block.to(trained), start + len(block)
        yield update.rows(start, stop).apply(rows, dtype) if update else rows.to(dtype)
        start = stop


def _write_index(plan: MergePlan, folder: Path) -> None:
    names = {t.stored.name: path.name for path, tensors in plan.files.items() for t in tensors}
    content = {"metadata": {"total_size": plan.num_bytes}, "weight_map": names}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
