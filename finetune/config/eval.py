"""`eval:` the numbers on held-out rows, and the tasks asked beside them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.config.section import Section
from finetune.config.task import Tasks


class EvalSection(Section):
    """Held-out loss while training and after, and tasks that are asked of the model."""

    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Rows in a batch of one device; changes the speed, never the numbers."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 128
    """Longest generated answer, in tokens."""

    tasks: Tasks = ()
    """Questions asked beside the loss: names of scorers, which ask the held-out rows, or mappings
    {name, scorer, data, prompt, answer, …}."""
