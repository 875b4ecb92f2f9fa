"""Writing .pth files one tensor at a time, so that memory holds one tensor, not one file.

`torch.save` needs every tensor of a file at once. Its format is a zip archive that is not
compressed: `data.pkl` with the names, shapes and types, a few small records, and the bytes of
tensor N as `data/N`, which begin at a multiple of 64. Here torch writes all but those bytes, and
Python's zipfile the archive: torch's own writer ends the process when the disk is full.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from finetune.llama.safetensors_stream import Planned, dtype_name

if TYPE_CHECKING:
    from torch import Tensor

_FOLDER = "archive"  # what torch.save calls the archive's folder for a file without a name
_ALIGNMENT = 64
_NUM_HEADER_BYTES = 30 + 20  # of a record in a zip archive, and of its 64-bit sizes
_PADDING_ID = 0x4246  # torch.save's mark for a field that only fills up
_SKIPPED = ("data/", ".data/serialization_id")  # the latter is a hash over the former


@contextlib.contextmanager
def pth_file(path: Path, plan: Sequence[Planned]) -> Iterator[Callable[[Tensor], None]]:
    """A .pth file that is written while the block lasts; yields what appends the next tensor.

    Args:
        path: the file.
        plan: its tensors, in order; all of them must be appended.
    """
    import torch

    waiting = iter(enumerate(plan))
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in _small_records(plan, path.parent):
            _append(file, archive, name, content)

        def append(tensor: Tensor) -> None:
            number, planned = next(waiting)
            assert tuple(tensor.shape) == planned.shape, planned
            assert dtype_name(tensor.dtype) == planned.dtype, planned
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            _append(file, archive, f"data/{number}", content.data)

        yield append
        assert next(waiting, None) is None


def _append(
    file: IO[bytes], archive: zipfile.ZipFile, name: str, content: bytes | memoryview
) -> None:
    """Adds a record; its bytes can be mapped as numbers, for they begin at a multiple of 64."""
    record = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    begin = file.tell() + _NUM_HEADER_BYTES + len(record.filename) + 4
    num_padding = -begin % _ALIGNMENT
    record.extra = struct.pack("<HH", _PADDING_ID, num_padding) + b"Z" * num_padding
    with archive.open(record, "w", force_zip64=True) as opened:
        opened.write(content)


def _small_records(plan: Sequence[Planned], folder: Path) -> Iterator[tuple[str, bytes]]:
    """What `torch.save` writes beside the bytes of the tensors.

    The tensors it is given here are address space that nobody touches, and their bytes are
    skipped: the temporary file is one hole.
    """
    import torch

    blank = {p.name: torch.empty(p.shape, dtype=getattr(torch, p.dtype)) for p in plan}
    with tempfile.TemporaryFile(dir=folder) as file:
        with torch.serialization.skip_data():
            torch.save(blank, file)
        file.seek(0)
        archive = torch._C.PyTorchFileReader(file)
        for name in archive.get_all_records():
            if not name.startswith(_SKIPPED):
                yield name, archive.get_record(name)
