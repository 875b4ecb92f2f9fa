"""Every file operation of this process under a folder, one after the other, as a place for a fault.

`Operations(root, at).install()` wraps what Python code writes with: opens for writing, each half of
a write, fsync, rename and replace, mkdir, unlink, rmdir, and safetensors' native writer (before it,
with half of the file there, after it). `at(number, kind, path)` is called before each of them; it
may kill the process, raise what a disk raises, or note. Reads and other folders are left alone.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

At = Callable[[int, str, Path], None]
After = Callable[[str, Path], None]


class Operations:
    """Counts operations under `root`.

    Args:
        root: absolute; nothing outside it is counted.
        at: called before an operation with its number (from 0), its kind and its path.
        after: called when one has been done, with kind and path; for a model of the disk.
    """

    def __init__(self, root: Path, at: At, after: After = lambda kind, path: None) -> None:
        self._root, self._at, self._after = root.resolve(), at, after
        self.count = 0

    def install(self) -> None:
        """Wraps the functions for the rest of this process's life."""
        for name in ("mkdir", "unlink", "remove", "rmdir"):
            setattr(os, name, self._by_path(name, getattr(os, name)))
        for name in ("rename", "replace"):
            setattr(os, name, self._by_two(name, getattr(os, name)))
        os.fsync = self._by_descriptor(os.fsync)  # type: ignore[assignment]
        io.open = builtins.open = self._opening(io.open)  # type: ignore[assignment]
        import safetensors.torch

        safetensors.torch.serialize_file = self._serializing(  # type: ignore[attr-defined]
            safetensors.torch.serialize_file  # type: ignore[attr-defined]
        )

    def reach(self, kind: str, path: Path) -> None:
        """An operation is about to happen."""
        number, self.count = self.count, self.count + 1
        self._at(number, kind, path)

    def _inside(self, path: Any, dir_fd: int | None = None) -> Path | None:
        if isinstance(path, int):
            return None
        place = Path(os.fsdecode(path))
        if dir_fd is not None:
            place = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / place
        place = Path(os.path.abspath(place))
        return place if place.is_relative_to(self._root) else None

    def _done(self, kind: str, path: Path, call: Callable[[], Any]) -> Any:
        """One operation between the two that are told of it."""
        self.reach(kind, path)
        result = call()
        self._after(kind, path)
        return result

    def _by_path(self, kind: str, call: Any) -> Any:
        def wrapped(path: Any, *args: Any, dir_fd: int | None = None, **settings: Any) -> Any:
            place = self._inside(path, dir_fd)
            doing = functools.partial(call, path, *args, dir_fd=dir_fd, **settings)
            return doing() if place is None else self._done(kind, place, doing)

        return wrapped

    def _by_two(self, kind: str, call: Any) -> Any:
        def wrapped(source: Any, target: Any, **settings: Any) -> Any:
            place = self._inside(target)
            doing = functools.partial(call, source, target, **settings)
            return doing() if place is None else self._done(kind, place, doing)

        return wrapped

    def _by_descriptor(self, call: Any) -> Any:
        def wrapped(descriptor: int) -> None:
            place = self._inside(os.readlink(f"/proc/self/fd/{descriptor}"))
            doing = functools.partial(call, descriptor)
            return doing() if place is None else self._done("fsync", place, doing)

        return wrapped

    def _opening(self, call: Any) -> Any:
        def wrapped(file: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
            place = self._inside(file) if set(mode) & set("wax+") else None
            if place is None:
                return call(file, mode, *args, **settings)
            self.reach("open", place)
            is_new = not place.exists()
            opened = call(file, mode, *args, **settings)
            self._after("create" if is_new else "open", place)
            return _Torn(opened, place, self)

        return wrapped

    def _serializing(self, call: Any) -> Any:
        def wrapped(tensors: Any, filename: Any, *args: Any, **settings: Any) -> Any:
            place = self._inside(filename)
            if place is None:
                return call(tensors, filename, *args, **settings)
            self.reach("create", place)
            done = call(tensors, filename, *args, **settings)
            self._after("create", place)
            size = place.stat().st_size
            os.truncate(place, size // 2)
            self.reach("write", place)
            call(tensors, filename, *args, **settings)
            return done

        return wrapped


class _Torn:
    """A file whose writes are done in halves, with an operation between them."""

    def __init__(self, file: Any, path: Path, operations: Operations) -> None:
        self._file, self._path, self._operations = file, path, operations

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._operations.reach("write", self._path)
        self._file.write(data[half:])
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Torn:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)
