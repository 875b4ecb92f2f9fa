"""The plan of a merge: every tensor, where it comes from, what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.llama.safetensors_pieces import Stored, stored_tensors
from finetune.llama.safetensors_stream import Planned
from finetune.merging.members import Combination
from finetune.merging.update import Update
from finetune.model import Base, weight_files

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TARGETS = ("full", "dequantized")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged model.

    Attributes:
        stored: the base's.
        dtype: of the merged one, by name.
        update: what the adapter does to it, or None.
    """

    stored: Stored
    dtype: str
    update: Update | None

    @property
    def planned(self) -> Planned:
        """What the output file's header says."""
        return Planned(self.stored.name, self.dtype, self.stored.shape)

    def as_json(self) -> dict[str, Any]:
        """A line of the plan."""
        return {
            "name": self.stored.name,
            "file": self.stored.path.name,
            "shape": list(self.stored.shape),
            "dtype": self.stored.dtype,
            "merged_dtype": self.dtype,
            "adapter": list(self.update.parts) if self.update else [],
        }


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        base: the base.
        adapter: the folder of the run's adapter.
        updates: tensor name in the base -> its update.
        trained_dtype: type the base was held in while the adapter was trained, by name.
        dtype: type of the merged weights, by name.
        quantization: of the base while training: none, nf4, fp4 or int8.
        target: `full`, the base as it is on disk, or `dequantized`, as its quantised weights are.
        files: the tensors of each output file, in the order of the base's bytes.
        combination: of this adapter and others; None where it is merged alone.
    """

    base: Base
    adapter: Path
    updates: dict[str, Update]
    trained_dtype: str
    dtype: str
    quantization: str
    target: str
    files: dict[Path, list[PlannedTensor]]
    combination: Combination | None = None

    @property
    def adapters(self) -> list[Path]:
        """The folders of all adapters, the run's own first."""
        if self.combination is None:
            return [self.adapter]
        return [member.folder for member in self.combination.members]

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """All tensors of all files."""
        return (tensor for tensors in self.files.values() for tensor in tensors)

    @property
    def num_bytes(self) -> int:
        """Of the merged weights."""
        return sum(tensor.planned.num_bytes for tensor in self.tensors)

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return self.base.architecture.tie_word_embeddings

    def as_json(self) -> dict[str, Any]:
        """Every tensor."""
        return {
            "base": self.base.name,
            **(self.combination.facts() if self.combination else {}),
            "base_weights": self.target,
            "trained_dtype": self.trained_dtype,
            "dtype": self.dtype,
            "tied": self.is_tied,
            "bytes": self.num_bytes,
            "tensors": [tensor.as_json() for tensor in self.tensors],
        }

    def lines(self) -> list[str]:
        """The plan for the terminal."""
        tensors = list(self.tensors)
        largest = max(tensors, key=lambda tensor: tensor.planned.num_bytes)
        lines = [
            f"plan     {len(tensors)} tensors in {len(self.files)} files, {self.num_bytes:,} bytes "
            f"of {self.dtype}; {len(self.updates)} are changed by the adapter",
            *(self.combination.lines() if self.combination else []),
            f"         the largest is {largest.stored.name}, {largest.planned.num_bytes:,} bytes",
        ]
        if self.is_tied:
            lines.append("         embedding and head are tied: stored once, as in the base")
        if self.quantization != "none":
            lines.append(
                f"         trained on {self.quantization}; merged into {self.target} weights"
            )
        return lines


def planned_files(
    base: Base, updates: dict[str, Update], dtype: str
) -> dict[Path, list[PlannedTensor]]:
    """The base's files with the same tensors; a head that is tied is left out."""
    tied = base.architecture.tie_word_embeddings
    files = {path: stored_tensors(path) for path in weight_files(base.folder)}
    return {
        path: [
            PlannedTensor(stored, dtype, updates.get(stored.name))
            for stored in tensors
            if not (tied and stored.name == HEAD)
        ]
        for path, tensors in files.items()
    }
