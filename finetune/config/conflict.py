"""A finding over several settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conflict:
    """A finding over several settings.

    Args:
        paths: the settings involved, as `section.key`; the first is where it is reported.
        message: what was found, what is allowed.
    """

    paths: tuple[str, ...]
    message: str
