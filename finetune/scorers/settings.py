"""`scorer_kwargs` -> the fields of a scorer, with a sentence for each that is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finetune.scorers.scorer import Scorer

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def read_settings(
    kind: type[Scorer], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], bool]:
    """The values that fit, the findings about the others, and whether a scorer can be made of them.

    A setting of the wrong type counts as left out, so that the others are still looked at.

    Args:
        kind: the scorer.
        kwargs: its settings as they were written.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    values = {key: value for key, value in kwargs.items() if key in names}
    wrong = {key: value for key, value in values.items() if not _fits(value, hints[key])}
    missing = [field.name for field in dataclasses.fields(kind) if _is_required(field)]
    findings = [_unknown(key, kwargs[key], kind, names) for key in kwargs if key not in names]
    for key, value in wrong.items():
        findings.append(f"{key}: found {show(value)}; allowed: {_describe(hints[key])}")
    for key in missing:
        if key not in values:
            findings.append(f"{key}: missing; allowed: {_describe(hints[key])}")
    good = {key: value for key, value in values.items() if key not in wrong}
    return good, findings, all(key in good for key in missing)


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """`did you mean x? ` where one of the known names is near, else nothing."""
    near = difflib.get_close_matches(found, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def show(value: Any) -> str:
    """A value as YAML has it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _unknown(key: Any, value: Any, kind: type[Scorer], names: list[str]) -> str:
    allowed = ", ".join(names) or "nothing, it has no settings"
    hint = did_you_mean(str(key), names)
    return f"{key}: unknown setting of {kind.name} (found {show(value)}); {hint}allowed: {allowed}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    none = dataclasses.MISSING
    return field.default is none and field.default_factory is none


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a setting's type; a whole number is a number, true is none."""
    if get_origin(hint) is Literal:
        return any(value == arg and type(value) is type(arg) for arg in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in get_args(hint))
    kind = get_origin(hint) or hint
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in get_args(hint))
    return _WORDS.get(hint, "a mapping")
