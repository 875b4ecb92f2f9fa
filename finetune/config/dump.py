"""RunConfig -> YAML of every setting, each line with the origin of its value."""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import BaseModel

from finetune.config.conflicts import without_effect
from finetune.config.schema import SECTIONS, Loaded
from finetune.config.tree import parse

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")


def dump(loaded: Loaded) -> str:
    """The resolved config as YAML: every key, one a line, with `# origin` at its end.

    Loading it gives an equal config; a setting without effect here is named in a comment only.
    """
    config, origins = loaded.config, loaded.origins
    idle = without_effect(config)
    rows = [(f"recipe: {scalar(config.recipe)}", origins["recipe"])]
    for name, model in SECTIONS.items():
        rows.append((f"{name}:", ""))
        section = getattr(config, name)
        for key in model.model_fields:
            path = f"{name}.{key}"
            if path in idle:
                rows.append((f"  # {key}", f"no effect {idle[path].condition}"))
            else:
                rows.append((f"  {key}: {flow(getattr(section, key))}", origins[path]))
    width = min(60, max(len(line) for line, _ in rows))
    lines = [f"{line:<{width}}  # {origin}" if origin else line for line, origin in rows]
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_defaults=True)
        return flow(given["path"] if list(given) == ["path"] else given)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    return scalar(value)


def scalar(value: str | int | float | bool | None) -> str:
    """A scalar as YAML that this toolkit's loader reads back as the same value and type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and parse(value, "value").values == value
        return value if plain else _quoted(value)
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _quoted(text: str) -> str:
    quoted = yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True)
    return quoted.rstrip("\n")
