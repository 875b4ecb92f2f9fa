"""`run:` where a run is kept and how it starts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune.config.section import Section, Text

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class RunSection(Section):
    """The run folder, the seed and what to do with checkpoints already there."""

    name: FolderName = "run"
    """Name of the run folder: letters, digits, `.`, `_`, `-`. Left out: the config file's stem."""

    dir: Text = "runs"
    """Folder that holds the runs; the run folder is `dir/name`."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the row order, the adapter's initial weights, dropout and random bases."""

    resume: Text = "auto"
    """`auto`: go on from the newest verified checkpoint, if there is one. `never`: start anew and
    refuse a folder that has checkpoints. Anything else: the path of a checkpoint to go on from."""
