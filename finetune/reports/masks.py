"""A few training rows as the model sees them, where base and data are still here.

Nothing is fetched: a base of the hub is looked for in the cache alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.cache import remembered_sha256
from finetune.errors import FinetuneError, is_of_the_system
from finetune.files import find_files
from finetune.prepared import Document
from finetune.reports.reading import mapping
from finetune.shapes import read_examples
from finetune.sharing import shared_text, without_secrets

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.config import RunConfig
    from finetune.rendering import Renderer

NUM_ROWS = 3
_MOST_READ = 200  # rows that are looked through for some that are trained on
MAX_TOKENS = 1200  # of one row on a page; what is left out is said


@dataclass(frozen=True)
class Masks:
    """Rows with their mask, or why there are none.

    Attributes:
        documents: as `preview` shows them, with `num_left_out`.
        note: what a reader should know of them; empty where there is nothing.
    """

    documents: tuple[dict[str, Any], ...]
    note: str = ""


def masks_of(config: RunConfig | None, data: Mapping[str, Any]) -> Masks:
    """The first rows of the training files.

    Args:
        data: data.json, for the hashes of the files as they were trained on.
    """
    if config is None:
        return Masks((), "The config cannot be read, so no row can be rendered.")
    try:
        return _masks(config, data)
    except Exception as error:  # of any library: a report comes without its rows
        if not isinstance(error, (FinetuneError, ValueError, KeyError)) and not is_of_the_system(
            error
        ):
            raise
        reason = shared_text(" ".join(str(error).split()))
        return Masks((), f"The rows cannot be shown any more: {reason}")


def _masks(config: RunConfig, data: Mapping[str, Any]) -> Masks:
    from finetune.model import read_tokenizer
    from finetune.preview import on_page
    from finetune.rendering import Renderer

    tokenizer, chat_format = read_tokenizer(_at_hand(config))
    renderer = Renderer(config.data, tokenizer, chat_format)
    known = mapping(data.get("files"))
    documents, changed = [], set()
    for path, document in itertools.islice(_documents(config, renderer), NUM_ROWS):
        if known.get(shared_text(str(path))) not in (None, remembered_sha256(path)):
            changed.add(path.name)
        page = on_page(tokenizer, _clipped(document))
        page["where"] = shared_text(page["where"])
        page["num_left_out"] = max(0, len(document.input_ids) - MAX_TOKENS)
        page["num_tokens"] = len(document.input_ids)
        page["num_trained"] = document.num_trained
        documents.append(page)
    note = ""
    if changed:
        note = f"Changed since the run: {', '.join(sorted(changed))}. The rows are as they are now."
    elif not documents:
        note = "No training file that is at hand has a row to show."
    return Masks(tuple(documents), without_secrets(note))


def _at_hand(config: RunConfig) -> RunConfig:
    """The config with a base of the hub replaced by its folder in the cache.

    Raises:
        OSError: it is not in the cache.
    """
    if not config.base.is_hub_id:
        return config
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        str(config.base.path), revision=config.base.revision, local_files_only=True
    )
    return config.model_copy(
        update={"base": config.base.model_copy(update={"path": folder, "revision": None})}
    )


def _documents(config: RunConfig, renderer: Renderer) -> Iterator[tuple[Path, Document]]:
    """Training documents from the start of each file, without those held out."""
    from finetune.preparation import is_held_out

    fraction = config.data.heldout_fraction
    for source in config.data.train:
        if source.hub_dataset is not None:
            continue
        for path in find_files(source.path):
            _, examples = read_examples(path, source.format, source.columns)
            for example in itertools.islice(examples, _MOST_READ):
                if fraction is None or not is_held_out(example, fraction):
                    yield from ((path, made) for made in renderer([example])[0].documents)


def _clipped(document: Document) -> Document:
    ids, mask = document.input_ids[:MAX_TOKENS], document.train_mask[:MAX_TOKENS]
    return Document(document.example, ids, mask)
