"""Reading safetensors by plain reads, a tensor or some of its rows at a time.

A mapped file's pages count as the process's memory until it is unmapped; what is read here is in
the buffer that was asked for and nowhere else. Source: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import CheckFailed, InputError
from finetune.hashing import BackgroundSha256
from finetune.llama.safetensors_stream import DTYPES
from finetune.llama.weight_files import names_in

if TYPE_CHECKING:
    import torch

_NAMES = {stored: name for name, stored in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path: the file.
        name: the tensor's.
        dtype: `bfloat16` and the like.
        shape: its lengths.
        begin: offset of its first byte in the file.
        num_bytes: how many it has.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    def read(self) -> torch.Tensor:
        """All of it."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            return self.from_bytes(read_exactly(file, self.num_bytes))

    def from_bytes(self, content: torch.Tensor) -> torch.Tensor:
        """Bytes of whole rows as numbers, (rows, …); all rows give the tensor's own shape."""
        import torch

        numbers = content.view(getattr(torch, self.dtype))
        if not self.shape or not self.num_bytes:
            return numbers.reshape(self.shape)
        return numbers.reshape(-1, *self.shape[1:])

    def rows(self, start: int, stop: int) -> Stored:
        """The same tensor cut to some of its rows; `stop` may lie beyond the last."""
        stop = min(stop, self.shape[0])
        begin, size = self.begin + start * self.row_bytes(), (stop - start) * self.row_bytes()
        return replace(self, shape=(stop - start, *self.shape[1:]), begin=begin, num_bytes=size)

    def row_bytes(self) -> int:
        """The size of one row, a row being all but the first dimension."""
        return self.num_bytes // self.shape[0] if self.shape and self.shape[0] else self.num_bytes


def stored_tensors(path: Path) -> list[Stored]:
    """What a file holds, in the order of its bytes.

    The library goes first: what it accepts has a header that lies in the file, and tensors one
    after another that have the bytes of their shapes. This reader adds where they begin.

    Raises:
        InputError: not readable as safetensors, or of a type no Llama is stored in.
    """
    names_in(path)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    return sorted(found, key=lambda tensor: (tensor.begin, tensor.num_bytes))


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    if entry["dtype"] not in _NAMES:
        known = ", ".join(_NAMES)
        raise InputError(f"{path}: {name} is of type {entry['dtype']}; known: {known}")
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    stored = Stored(path, name, _NAMES[entry["dtype"]], shape, start + first, last - first)
    assert stored.num_bytes == math.prod(shape) * int(entry["dtype"].strip("BF")) // 8, stored
    return stored


def read_exactly(file: FileIO, num_bytes: int) -> torch.Tensor:
    """The next bytes of a file, (num_bytes,) uint8.

    Raises:
        CheckFailed: the file ends before.
    """
    import torch

    content = torch.empty(num_bytes, dtype=torch.uint8)
    view, filled = memoryview(content.numpy()), 0  # type: ignore[arg-type]
    while filled < num_bytes:
        count = file.readinto(view[filled:])
        if not count:
            raise CheckFailed(f"{file.name}: ends {num_bytes - filled} bytes early")
        filled += count
    return content


class HashedReading:
    """A file read once from its first byte to its last, with the sha256 of what was read.

    Tensors are asked for in the order of their bytes; what lies between them is hashed as well.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._digest = BackgroundSha256()
        self._place = 0

    def __enter__(self) -> HashedReading:
        return self

    def __exit__(self, *_: object) -> None:
        self._digest.close()
        self._file.close()

    def tensor(self, stored: Stored) -> torch.Tensor:
        """A whole tensor."""
        self._skip_to(stored.begin)
        return stored.from_bytes(self._read(stored.num_bytes))

    def blocks(self, stored: Stored, max_bytes: int) -> Iterator[torch.Tensor]:
        """A tensor by rows, at most `max_bytes` at a time, but one row at least."""
        self._skip_to(stored.begin)
        step = max(max_bytes // max(stored.row_bytes(), 1), 1) * stored.row_bytes()
        for start in range(0, stored.num_bytes, max(step, 1)):
            yield stored.from_bytes(self._read(min(step, stored.num_bytes - start)))

    def finish(self) -> str:
        """Reads to the end; the sha256 of the file."""
        while rest := self._file.read(1 << 20):
            self._digest.update(rest)
        return self._digest.hexdigest()

    def _skip_to(self, place: int) -> None:
        assert place >= self._place, "tensors are read in the order of their bytes"
        if place > self._place:
            self._read(place - self._place)

    def _read(self, num_bytes: int) -> torch.Tensor:
        content = read_exactly(self._file, num_bytes)
        self._place += num_bytes
        self._digest.update(content.numpy().data)
        return content


__all__ = ["HashedReading", "Stored", "read_exactly", "stored_tensors"]
