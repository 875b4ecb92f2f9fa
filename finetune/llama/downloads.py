"""What a failed download looks like: web pages, git-lfs pointers, empty and missing files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.artifact import refuse_special
from finetune.errors import InputError

_HEAD_BYTES = 512
_LFS = b"version https://git-lfs.github.com/spec"
_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")


def refuse_failed_download(path: Path) -> None:
    """Reads the head of a file and refuses what is not the file but the answer to a request.

    Raises:
        InputError: missing, a folder, empty, a web page or a git-lfs pointer; names the file.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file is needed")
    refuse_special(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise InputError(f"{path}: is empty (0 bytes); download it again")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGE):
        raise InputError(
            f"{path}: is a web page (HTML), not the file itself; the download was answered by a "
            "page, often a login or an error: download it again"
        )
    if text.startswith(_LFS):
        raise InputError(
            f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` where it "
            "was cloned, or download it from the hub"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that was downloaded.

    Raises:
        InputError: see `refuse_failed_download`; or the file is no JSON object.
    """
    refuse_failed_download(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON, or was cut off ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, a JSON object is needed")
    return value
