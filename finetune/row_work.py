"""What is done to each row by itself: rendered, hashed, and looked at by the checks.

Rows do not know of each other here, so that blocks of them can be worked on side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.overlap import RowText, TextDigests
from finetune.rendering import Outcome, Renderer
from finetune.shapes import Example
from finetune.suspicion import checks_that_hold


@dataclass(frozen=True)
class RowResult:
    """One row, worked on.

    Attributes:
        outcome: its documents, or why it has none.
        digests: of its texts, to find equal rows by.
        suspicions: names of the checks that find something.
    """

    outcome: Outcome
    digests: TextDigests
    suspicions: tuple[str, ...]


class RowWork:
    """Works on blocks of examples.

    Args:
        renderer: of the config.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def __call__(self, examples: Sequence[Example]) -> list[RowResult]:
        """One result for each example, in order."""
        return [
            RowResult(
                outcome,
                text.digests(),
                tuple(check.name for check in checks_that_hold(text)),
            )
            for outcome, text in zip(self._renderer(examples), map(row_text, examples), strict=True)
        ]


def row_text(example: Example) -> RowText:
    """The texts of an example as the data checks compare them."""
    if not example.messages:
        return RowText(example.where, "", example.text)
    texts: dict[bool, list[str]] = {True: [], False: []}
    for message in example.messages:
        texts[message["role"] == "assistant"].append(_text_of(message))
    prompt, answer = ("\n\n".join(filter(None, texts[side])) for side in (False, True))
    return RowText(example.where, prompt, answer)


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    calls = message.get("tool_calls")
    return f"{text or ''}{json.dumps(calls, ensure_ascii=False)}" if calls else text
