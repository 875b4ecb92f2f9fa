"""`base:` the model a run starts from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from finetune.config.section import Section, Text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never be another one: a commit hash, no branch and no tag."""
    return revision is not None and bool(_COMMIT.fullmatch(revision))


class BaseSection(Section):
    """The base: weights that exist (`path`) or random weights of a known shape (`architecture`)."""

    path: Text | None = None
    """A hub id, a Hugging Face folder or a Meta folder. Exactly one of `path`, `architecture`."""

    architecture: Text | dict[str, Any] | None = None
    """Random weights: a preset's name, or a mapping of hyperparameters (`preset` may be one)."""

    revision: Text | None = None
    """Branch, tag or commit hash of a hub id; null is the hub's `main`. A run stays at the commit
    that it began with, whatever becomes of the branch."""

    tokenizer: Text | None = None
    """Tokenizer folder or file, where the base brings none; needed with `architecture`."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type the base's weights are held in; with quantisation, the type it computes in,
    where `train.bf16` does not say another."""

    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Storage of the frozen base's linear layers through bitsandbytes; needs an adapter."""

    @property
    def is_hub_id(self) -> bool:
        """Whether `path` names a hub model: looks like `owner/name` and nothing local has it."""
        path = self.path
        return path is not None and bool(_HUB_ID.fullmatch(path)) and not Path(path).exists()
