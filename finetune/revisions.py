"""A run stays at the commits of the hub that it began with, whatever becomes of a branch."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from finetune.config import RunConfig
from finetune.config.base import BaseSection, is_commit
from finetune.config.data import Source
from finetune.errors import CheckFailed
from finetune.hub import commits_of, kept_name
from finetune.run_folder import RunFolder


def base_revision(section: BaseSection, run: RunFolder) -> str | None:
    """The commit the run began with; before its first start, what the config says.

    Raises:
        CheckFailed: the config names another commit.
    """
    assert section.path is not None
    recorded = run.recorded_commit(section.path)
    _refuse_another(run.path, section.path, "base.revision", section.revision, recorded)
    return recorded or section.revision


def rows_as_begun(config: RunConfig, run: RunFolder) -> RunConfig:
    """The config with the revisions of its datasets as the run found them.

    Raises:
        CheckFailed: it names another commit.
    """
    commits = commits_of(run.recorded_files())

    def pinned(source: Source) -> Source:
        commit = commits.get(_kept_name(source)) if source.hub_dataset else None
        _refuse_another(run.path, source.path, "revision", source.revision, commit)
        return source.model_copy(update={"revision": commit}) if commit else source

    sides = {side: tuple(map(pinned, getattr(config.data, side))) for side in ("train", "heldout")}
    return config.model_copy(update={"data": config.data.model_copy(update=sides)})


def warn_of_rows(config: RunConfig, files: Iterable[str]) -> None:
    """Says which datasets of the hub are not pinned.

    Args:
        files: that the rows were read from.
    """
    commits = commits_of(files)
    for source in (*config.data.train, *config.data.heldout):
        if source.hub_dataset:
            where = f"revision of {source.path}"
            warn_unpinned(where, source.revision, commits.get(_kept_name(source)))


def warn_unpinned(key: str, revision: str | None, commit: str | None) -> None:
    """Says what to write where a branch or tag is named.

    Args:
        commit: that it is now; None for what is not on the hub.
    """
    if commit is not None and not is_commit(revision):
        print(
            f"warning: {key} is {revision or 'the branch main'}, which may become another commit; "
            f"this run stays at {commit}. Written into the config, it is the same for every run",
            file=sys.stderr,
        )


def _kept_name(source: Source) -> str:
    assert source.hub_dataset is not None and source.split is not None
    return kept_name(source.hub_dataset, source.split)


def _refuse_another(
    run: Path, name: str, key: str, revision: str | None, recorded: str | None
) -> None:
    if recorded and is_commit(revision) and revision != recorded:
        raise CheckFailed(
            f"{run}: began with commit {recorded} of {name}; {key} is now {revision}. Put it "
            "back, or choose another run.name"
        )
