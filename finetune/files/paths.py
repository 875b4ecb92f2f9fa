"""What a config names -> the data files behind it: a file, a folder or a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.artifact import refuse_special
from finetune.errors import InputError

TEXT_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
TYPES = (*TEXT_TYPES, ".parquet")

# Files that hold rows in a form that is not read. Among the files of a folder they are refused,
# where a README or a licence is passed over: a shard that is left out silently changes the run.
_OTHER_DATA = {
    *(".arrow", ".feather", ".orc", ".avro", ".npy", ".npz", ".pkl", ".pt", ".h5", ".hdf5"),
    *(".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".gz", ".lz4"),
    *(".xlsx", ".xls", ".ods", ".sqlite", ".db"),
}
_NAMED_FILES = 5


def type_of(path: Path) -> str:
    """The ending that decides how a file is read, in lower case, `.gz` included: `.jsonl.gz`."""
    name = path.name.lower()
    compressed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    return f"{suffix}.gz" if compressed else suffix


def is_read(path: Path) -> bool:
    """Whether files of this type are read."""
    kind = type_of(path)
    return kind in TYPES or kind.removesuffix(".gz") in TEXT_TYPES


def allowed_types() -> str:
    """The types for a message."""
    return f"{', '.join(TYPES)}, and .gz of all but .parquet"


def find_files(path: str) -> list[Path]:
    """The data files that a path of a config stands for.

    Args:
        path: a file; a folder: its data files, those of its subfolders too, hidden ones left out;
            or a pattern with `*`, `?`, `[…]`, `**`. A path that exists is never read as a pattern.

    Returns:
        the files, sorted by path; at least one.

    Raises:
        InputError: nothing is there, nothing that is read is there, or data of a type that is not
            read lies among the files of a folder.
    """
    if os.path.isdir(path):
        return _data_files(path, sorted(_files_below(path)))
    if os.path.lexists(path):
        _refuse_unread(Path(path))
        refuse_special(Path(path))
        return [Path(path)]
    if not glob.has_magic(path):
        raise InputError(f"{path}: no such file (relative paths start at the current folder)")
    found = sorted(Path(p) for p in glob.glob(path, recursive=True) if not os.path.isdir(p))
    if not found:
        raise InputError(f"{path}: no file fits this pattern (it starts at the current folder)")
    return _data_files(path, found)


def _refuse_unread(path: Path) -> None:
    if not is_read(path):
        kind = type_of(path) or "none"
        raise InputError(f"{path}: files of type {kind} are not read; read are {allowed_types()}")


def _files_below(folder: str) -> Iterator[Path]:
    """Files of a folder and its subfolders; links are followed, each folder once."""
    visited = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        targets = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [n for n in sorted(folders) if n[0] != "." and targets[n] not in visited]
        visited |= {targets[name] for name in folders}
        yield from (Path(parent, name) for name in names if name[0] != ".")


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror})")


def _data_files(path: str, found: Sequence[Path]) -> list[Path]:
    wanted = [file for file in found if is_read(file)]
    other = [file for file in found if not is_read(file) and file.suffix.lower() in _OTHER_DATA]
    if other:
        raise InputError(
            f"{path}: holds data that is not read: {_names(other)}; read are {allowed_types()}; "
            "unpack it, or name the files that are meant"
        )
    if not wanted:
        there = f"there are {_names(found)}" if found else "there is no file"
        raise InputError(f"{path}: holds no data file; {there}; read are {allowed_types()}")
    for file in wanted:
        refuse_special(file)
    return wanted


def _names(files: Sequence[Path]) -> str:
    rest = len(files) - _NAMED_FILES
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(file.name for file in files[:_NAMED_FILES]) + more
