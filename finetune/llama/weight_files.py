"""The safetensors of a Hugging Face folder: which file holds which weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.llama.downloads import read_json_object, refuse_failed_download

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
        return dict.fromkeys(_names_in(folder / SINGLE), folder / SINGLE)
    listed = _weight_map(index)
    missing = sorted({name for name in listed.values() if not (folder / name).is_file()})
    if missing:
        raise InputError(f"{folder}: shards of the index are missing: {', '.join(missing)}")
    held = {name: _names_in(folder / name) for name in sorted(set(listed.values()))}
    absent = [
        f"{folder / file}: has no {weight}, which {INDEX} puts there"
        for weight, file in listed.items()
        if weight not in held[file]
    ]
    if absent:
        raise InputError(absent[:8])
    return {weight: folder / file for weight, file in listed.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    listed: Any = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: has no weight_map")
    wrong = [f for f in listed.values() if not isinstance(f, str) or Path(f).name != f]
    if wrong:
        raise InputError(f"{index}: names {wrong[0]!r}; a file of the same folder is allowed")
    return listed


def _names_in(path: Path) -> list[str]:
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
