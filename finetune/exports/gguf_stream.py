"""Writing a GGUF file block by block, so that memory holds a few rows, not one file.

The header, the keys and the list of tensors are written by the `gguf` package, which every tensor
has only to be announced to; their bytes are appended after it, each beginning at a multiple of 32.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "File structure".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "llama"
TYPES = ("f32", "f16", "bf16", "q8_0")
_ALIGNMENT = 32
_Q8_BLOCK = 32  # weights that share one scale
_LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that will be written.

    Attributes:
        name: its name in the file.
        shape: (rows, columns), or (channels,); GGUF itself lists it the other way round.
        type: one of `TYPES`.
        blocks: makes its rows, in order, a few at a time.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Its size in the file: q8_0 has a float16 scale for every 32 numbers of 8 bits."""
        if self.type == "q8_0":
            return prod(self.shape) // _Q8_BLOCK * (_Q8_BLOCK + 2)
        return prod(self.shape) * (4 if self.type == "f32" else 2)


def gguf_package() -> Any:
    """The `gguf` package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module("gguf")
    except ModuleNotFoundError:
        raise InputError(
            "GGUF needs the package gguf, which is not installed; `pip install plumbtune[gguf]`, "
            "or `pip install gguf`"
        ) from None


def fitting_type(wanted: str, shape: tuple[int, ...]) -> str:
    """The type a tensor gets: vectors stay f32; rows that q8_0 cannot cut are f16.

    Both are llama.cpp's own rules. Source: `ModelBase.prepare_tensors` in its converter.
    """
    if len(shape) == 1:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % _Q8_BLOCK else wanted


def write_gguf(path: Path, tensors: Sequence[GgufTensor], add_keys: Callable[[Any], None]) -> None:
    """Writes one file.

    Args:
        path: the file.
        tensors: in the order of the file.
        add_keys: puts the keys into a `gguf.GGUFWriter`.

    Raises:
        InputError: a weight is not finite, or does not fit into float16.
    """
    from tqdm import tqdm

    _write_head(path, tensors, add_keys)
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        for tensor in tqdm(tensors, path.name, delay=2, disable=None, unit="tensor"):
            start = file.tell()
            for block in tensor.blocks():
                file.write(encode(tensor, block))
            assert file.tell() - start == tensor.num_bytes, tensor
            file.write(bytes(-file.tell() % _ALIGNMENT))


def _write_head(path: Path, tensors: Sequence[GgufTensor], add_keys: Callable[[Any], None]) -> None:
    import numpy

    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_keys(writer)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type.upper()]
        dtype = numpy.dtype("float32")  # uint8 would mean: the shape counts bytes
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def encode(tensor: GgufTensor, block: Tensor) -> bytes:
    """Rows of a tensor as the bytes of its type.

    Raises:
        InputError: a weight is not finite, or does not fit into float16.
    """
    import torch

    numbers = block.float().contiguous()
    largest = float(numbers.abs().max())
    if not largest < float("inf"):  # NaN compares false with everything
        raise InputError(f"{tensor.name}: holds a number that is not finite; not exported")
    if tensor.type == "f16" and largest > _LARGEST_FLOAT16:
        raise InputError(f"{tensor.name}: holds {largest:g}, too large for f16; use --type bf16")
    if tensor.type == "q8_0":
        gguf = gguf_package()
        packed = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return bytes(packed.tobytes())
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[tensor.type]
    return bytes(numbers.to(dtype).view(torch.uint8).numpy().tobytes())
