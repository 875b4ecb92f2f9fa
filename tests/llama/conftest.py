"""Where the real files are, and a skip that names what is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FINETUNE_SHARED", REPOSITORY.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("tokenizers/llama2/tokenizer.model")`: the path, or a skip naming it."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{path} is not here; FINETUNE_SHARED names the folder that holds it")
        return path

    return find
