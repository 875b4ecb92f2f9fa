"""The safetensors of a Hugging Face folder: which file holds which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.llama.downloads import read_json_object, refuse_failed_download

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_NAME = 255  # bytes; what file systems allow


def files_by_weight(folder: Path) -> dict[str, Path]:
    """The file of every stored weight, by the weight's name, in the files' order.

    Only headers are read. Where there is an index it decides, and has to agree with the headers.

    Raises:
        InputError: no safetensors, a file of the index that is missing, outside the folder, cut
            off or without the weights it should hold.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(f"{folder}: no {SINGLE}; pickled weights (.bin, .pt) are not read")
        return dict.fromkeys(names_in(folder / SINGLE), folder / SINGLE)
    listed = _weight_map(index)
    missing = sorted({name for name in listed.values() if not (folder / name).is_file()})
    if missing:
        raise InputError(f"{folder}: shards of the index are missing: {', '.join(missing)}")
    held = {name: names_in(folder / name) for name in sorted(set(listed.values()))}
    absent = [
        f"{folder / file}: has no {weight}, which {INDEX} puts there"
        for weight, file in listed.items()
        if weight not in held[file]
    ]
    if absent:
        raise InputError(absent[:8])
    return {weight: folder / file for weight, file in listed.items()}


def refuse_too_few_bytes(folder: Path, files: Sequence[Path], num_parameters: int) -> None:
    """Refuses sizes that config.json claims and no file has, before memory is asked for them.

    Raises:
        InputError: fewer bytes on disk than parameters.
    """
    num_bytes = sum(path.stat().st_size for path in files)
    if num_bytes < num_parameters:
        raise InputError(
            f"{folder}/config.json: describes {num_parameters:,} parameters, the weight files hold "
            f"{num_bytes:,} bytes; they are of different models, or a file is missing"
        )


def _weight_map(index: Path) -> Mapping[str, str]:
    listed: Any = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: has no weight_map")
    wrong = [f for f in listed.values() if not isinstance(f, str) or not _is_name(f)]
    if wrong:
        raise InputError(f"{index}: names {wrong[0]!r}; a file of the same folder is allowed")
    return listed


def _is_name(file: str) -> bool:
    return Path(file).name == file and "\0" not in file and len(file.encode()) <= _MAX_NAME


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, whose header the safetensors library has checked.

    Raises:
        InputError: not readable as safetensors.
    """
    from safetensors.torch import load_file

    names_in(path)
    tensors: dict[str, Tensor] = load_file(str(path))
    return tensors


def names_in(path: Path) -> list[str]:
    """The tensors of a file, whose header the safetensors library has checked.

    Raises:
        InputError: a header that is too long, is none, or does not fit the file.
    """
    from safetensors import SafetensorError, safe_open

    refuse_failed_download(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise InputError(
            f"{path}: not readable as safetensors ({error}); a download that broke off? "
            "Fetch it again"
        ) from None
