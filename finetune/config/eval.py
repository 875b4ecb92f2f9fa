"""`eval:` the numbers on held-out rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from finetune.config.section import Section, as_tuple

Tasks = Annotated[tuple[Literal["exact_match"], ...], BeforeValidator(as_tuple)]


class EvalSection(Section):
    """Held-out loss while training and after, and tasks that generate text."""

    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Rows in a batch of one device; changes the speed, never the numbers."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 128
    """Longest generated answer, in tokens."""

    tasks: Tasks = ()
    """Generation tasks scored beside the loss: exact_match."""
