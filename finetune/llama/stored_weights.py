"""The weights of a Hugging Face folder, each found and its shape checked before any is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import InputError
from finetune.llama.hyperparameters import Architecture
from finetune.llama.meta_layout import Weight, hf_to_meta_rows
from finetune.llama.safetensors_stream import DTYPES
from finetune.llama.weight_files import files_by_weight

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TABLES = "rotary_emb.inv_freq"  # old folders store RoPE's table; it follows from the config
_NAMES = {stored: ours for ours, stored in DTYPES.items()}
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class StoredWeight:
    """A weight and where it lies.

    Attributes:
        weight: its names and shape.
        file: the safetensors file.
        name: its name in the file: a tied head lies under the embedding's.
        dtype: its type there (`bfloat16`).
        head_dim: rows of one head, where RoPE turns it.
    """

    weight: Weight
    file: Path
    name: str
    dtype: str
    head_dim: int

    def read(self) -> Tensor:
        """The whole weight as it is stored."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            whole: Tensor = file.get_tensor(self.name)
        return whole

    def blocks_in_meta_order(self) -> Iterator[Tensor]:
        """The weight in blocks of rows, in the order of Meta's rows (neighbours rotate).

        The permutation stays within a head, so a block of whole heads is permuted alone, and
        memory holds a block, not the weight.
        """
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            lazy = file.get_slice(self.name)
            for start in range(0, self.weight.shape[0], self._rows_of_a_block()):
                block: Tensor = lazy[start : start + self._rows_of_a_block()]
                if self.weight.rotated:
                    block = hf_to_meta_rows(block, block.shape[0] // self.head_dim)
                yield block

    def _rows_of_a_block(self) -> int:
        bytes_of_a_row = 4 * (self.weight.shape[1] if len(self.weight.shape) == 2 else 1)
        rows = max(1, _BLOCK_BYTES // bytes_of_a_row)
        return max(rows // self.head_dim, 1) * self.head_dim


def stored_weights(
    hf_folder: Path, arch: Architecture, weights: Sequence[Weight]
) -> list[StoredWeight]:
    """Finds every weight and checks its shape by the headers of the files.

    Raises:
        InputError: one is missing, of another shape, or of a type no Llama is stored in; or the
            folder holds a weight that a Llama does not have.
    """
    files = files_by_weight(hf_folder)
    if arch.tie_word_embeddings:
        files[HEAD] = files.get(EMBEDDING, hf_folder)
    missing = [weight.hf for weight in weights if weight.hf not in files]
    known = {weight.hf for weight in weights} | ({HEAD} if arch.tie_word_embeddings else set())
    foreign = [name for name in files if name not in known and not name.endswith(_TABLES)]
    if missing or foreign:
        found = [f"{hf_folder}: {name} missing" for name in missing[:8]]
        raise InputError(found + [f"{hf_folder}: {n} is no weight of a Llama" for n in foreign[:8]])
    return [_stored(files[weight.hf], arch, weight) for weight in weights]


def _stored(file: Path, arch: Architecture, weight: Weight) -> StoredWeight:
    from safetensors import safe_open

    name = EMBEDDING if arch.tie_word_embeddings and weight.hf == HEAD else weight.hf
    with safe_open(file, "pt") as opened:
        header = opened.get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
    if shape != weight.shape:
        raise InputError(f"{file}: {weight.hf} is {shape}, config.json makes it {weight.shape}")
    if dtype not in _NAMES:
        raise InputError(f"{file}: {weight.hf} is {dtype}; known: {', '.join(_NAMES)}")
    return StoredWeight(weight, file, name, _NAMES[dtype], arch.head_dim)
