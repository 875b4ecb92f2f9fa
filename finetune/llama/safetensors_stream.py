"""Writing safetensors one tensor at a time, so that memory holds one tensor, not one file.

The library's own `save_file` needs every tensor of a file at once, and copies it. The format is
small: the length of a JSON header (8 bytes, little-endian), the header, the bytes in its order.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: what the header says of it, before it exists."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        size = _BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a floating-point type (`bfloat16`).

    Raises:
        InputError: a type that no Llama is stored in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"weights of type {name} are not supported; known: {', '.join(DTYPES)}")
    return name


def into_files(plan: Iterable[Planned], max_bytes: int) -> list[list[Planned]]:
    """Cuts a plan into files of at most `max_bytes`, or of one tensor where that is larger."""
    files: list[list[Planned]] = []
    filled = 0
    for tensor in plan:
        if not files or filled + tensor.num_bytes > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.num_bytes
    return files


def write_file(path: Path, plan: Sequence[Planned], make: Callable[[str], torch.Tensor]) -> None:
    """Writes one file; each tensor is made when its turn comes and dropped afterwards.

    Args:
        path: the file.
        plan: its tensors, in order.
        make: name -> the tensor, of the planned type and shape.
    """
    with path.open("wb") as file:
        for content in file_content(plan, lambda name: [make(name)]):
            file.write(content)


def file_content(
    plan: Sequence[Planned], make: Callable[[str], Iterable[torch.Tensor]]
) -> Iterator[Any]:
    """The bytes of a file, piece by piece: the header, then every tensor.

    Args:
        plan: its tensors, in order.
        make: name -> the tensor of the planned type and shape, whole or in pieces by rows.

    Yields:
        what gives its memory as bytes.
    """
    import torch

    yield _header(plan)
    for planned in plan:
        num_bytes = 0
        for piece in make(planned.name):
            assert tuple(piece.shape[1:]) == planned.shape[1:], planned
            assert dtype_name(piece.dtype) == planned.dtype, planned
            num_bytes += piece.nbytes
            yield piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert num_bytes == planned.num_bytes, planned


def _header(plan: Sequence[Planned]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in plan:
        end = offset + planned.num_bytes
        header[planned.name] = {
            "dtype": DTYPES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def write_model(
    folder: Path,
    plan: Sequence[Planned],
    begin_file: Callable[[], Callable[[str], torch.Tensor]],
    max_bytes: int,
) -> None:
    """Writes `model.safetensors`, or numbered files and their index, as transformers reads them.

    Args:
        folder: where to write.
        plan: every tensor, in order.
        begin_file: called for each file; returns what makes its tensors by name.
        max_bytes: size at which a file ends.
    """
    files = into_files(plan, max_bytes)
    if len(files) == 1:
        write_file(folder / "model.safetensors", files[0], begin_file())
        return
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / name, tensors, begin_file())
        weight_map |= {tensor.name: name for tensor in tensors}
    total = sum(tensor.num_bytes for tensor in plan)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
