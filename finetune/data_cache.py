"""Prepared data found by its content: one folder for each thing that decides what is in it.

The folder's name is a hash of the bytes of the files, tokenizer, prompt format, settings, and the
code that made it. It is staged and renamed, so that an interrupted preparation leaves nothing that
is taken for one, and compared with its manifest before it is used.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune import artifact
from finetune.artifact import sha256_of_json
from finetune.cache import cache_root, kept_in_cache, remembered_sha256
from finetune.config import RunConfig
from finetune.errors import CannotContinue, CheckFailed, InputError
from finetune.llama.chat import ChatFormat
from finetune.llama.tokenizer import fingerprint
from finetune.preparation import SIDES, Preparation, SourceFile
from finetune.prepared import FILES
from finetune.rendering import Renderer

_FILES = {"ledgers.json", "overlap.json", *(f"{side}/{name}" for side in SIDES for name in FILES)}
_CODE = (
    *("files/*.py", "shapes/*.py", "llama/*.py", "preparation.py", "prepared.py", "rendering.py"),
    *("row_work.py", "overlap.py", "ngrams.py", "suspicion.py", "mojibake.py", "ledger.py"),
)
# What of `data:` has no influence on the documents.
_LATER = {"packing", "on_overlap", "train", "heldout"}


def prepare(
    config: RunConfig,
    files: Sequence[SourceFile],
    tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat | None,
    findings: Sequence[str] = (),
) -> Path:
    """The folder of a config's documents; made where there is none yet.

    Args:
        findings: what is wrong already; it is raised with what the files' rows add to it.

    Raises:
        InputError: rows that cannot be read or rendered; all of them, up to 20 a file.
        CannotContinue: the disk refused.
    """
    facts = _facts(config, files, tokenizer, chat_format)
    folder = cache_root() / "data" / sha256_of_json(facts)[:32]
    if findings:
        folder = folder.with_name(f"{folder.name}-refused")
    if folder.exists() and not _is_whole(folder, facts):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            artifact.remove(folder)
    if not folder.exists():
        renderer = Renderer(config.data, tokenizer, chat_format)
        num_ids = max(tokenizer.get_vocab().values()) + 1  # more than len() where some are unused
        try:
            with kept_in_cache(), artifact.staged(folder, facts) as stage:
                Preparation(config, renderer, stage, num_ids, findings).run(files)
                _refuse_changed(files)
        except (InputError, CannotContinue):
            if not folder.exists():  # else another process was faster
                raise
    return folder


def _facts(
    config: RunConfig,
    files: Sequence[SourceFile],
    tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat | None,
) -> dict[str, Any]:
    """All that decides what the folder holds."""
    settings = config.data.model_dump(mode="json", exclude=_LATER)
    return {
        "kind": "data",
        "code": _code_sha256(),
        "recipe": config.recipe,
        "settings": settings,
        "tokenizer": fingerprint(tokenizer),
        "chat_format": chat_format and {"name": chat_format.name, "date": chat_format.date_string},
        "files": [
            {
                "side": file.side,
                "source": file.number,
                "path": str(file.path),  # rows are named by it
                "sha256": file.sha256,
                "read_as": file.source.model_dump(mode="json", include={"format", "columns"}),
            }
            for file in files
        ],
    }


@functools.cache
def _code_sha256() -> str:
    """Over the sources and libraries that make documents of files: where one changes, nothing
    that the older one prepared is taken for its own."""
    package = Path(__file__).parent
    files = [path for name in _CODE for path in sorted(package.glob(name))]
    versions = {name: version(name) for name in ("tokenizers", "tiktoken", "transformers")}
    return sha256_of_json([versions, *(artifact.sha256_of(path) for path in files)])


def _refuse_changed(files: Sequence[SourceFile]) -> None:
    """What was read is what was hashed, or the folder would have a wrong name."""
    changed = [str(f.path) for f in files if remembered_sha256(f.path) != f.sha256]
    if changed:
        raise InputError(f"{', '.join(changed)}: changed while it was read; start again")


def _is_whole(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a prepared folder is as it was published; says so aloud where it is not."""
    try:
        manifest = artifact.read_manifest(folder)
        changed = [
            name
            for name, entry in manifest["files"].items()
            if not (folder / name).is_file()
            or (folder / name).stat().st_size != entry["bytes"]
            or remembered_sha256(folder / name) != entry["sha256"]
        ]
        if manifest["facts"] != facts or manifest["files"].keys() != _FILES:
            changed.append(artifact.MANIFEST)
    except (CheckFailed, FileNotFoundError, KeyError, TypeError) as error:
        changed = [str(error)]
    if changed:
        print(f"data     {folder}: {changed[0]} is damaged; prepared again", file=sys.stderr)
    return not changed
