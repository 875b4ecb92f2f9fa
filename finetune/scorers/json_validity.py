"""JSON: the answer is a JSON value, fits a schema, equals the expected value.

Strict as the standard is: one value and nothing after it, no NaN, no key twice in an object, no
comments. A number that no float can hold, and nesting deeper than Python's parser goes, are refused
as well.

Source: RFC 8259; JSON Schema (draft 2020-12 unless `$schema` names another), checked by the package
jsonschema. `format` is a remark there and is not checked; references reach the schema itself only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from finetune.errors import InputError
from finetune.scorers.scorer import Scorer, shorten

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class JsonValidity(Scorer):
    """1 where the answer is the JSON that is asked for, else 0.

    Without `equals` the accepted answers are not looked at, and rows need none.

    Attributes:
        schema: a JSON Schema, or the path of a JSON file with one.
        equals: the value must equal that of the accepted answer: keys in any order, 1 is 1.0 and
            is not true.
        fenced: the answer may be one block of Markdown, ```json … ```, with nothing around it.
    """

    name: ClassVar[str] = "json"
    version: ClassVar[int] = 1

    schema: Mapping[str, Any] | str | None = None
    equals: bool = False
    fenced: bool = False

    @property
    def needs_expected(self) -> bool:
        """Only what is compared."""
        return self.equals

    def why_not(self, written: str, answer: str = "") -> str | None:
        """Why an answer is wrong; None where it is right."""
        match = _FENCE.fullmatch(written) if self.fenced else None
        try:
            value = parse(match[1] if match else written)
        except ValueError as error:
            return f"is not JSON: {error}"
        if self.schema is not None and (reason := self._why_not_valid(value)):
            return f"does not fit the schema: {reason}"
        if self.equals and not is_equal(value, parse(answer)):
            return "is another value"
        return None

    def score_one(self, written: str, answer: str) -> float:
        """1 or 0."""
        return float(self.why_not(written, answer) is None)

    def why_unusable(self, answer: str) -> str | None:
        """An accepted answer that is not JSON itself."""
        try:
            parse(answer)
        except ValueError as error:
            return f"is not JSON: {error}"
        return None

    def findings(self) -> list[str]:
        """A schema that cannot be read, or is none."""
        if self.schema is None:
            return []
        try:
            schema = self._read_schema
        except (OSError, UnicodeDecodeError, ValueError) as error:
            return [f"schema: found {self.schema!r}; cannot be read as a JSON file: {error}"]
        return [f"schema: {finding}" for finding in _schema_findings(schema)]

    def settings(self) -> dict[str, Any]:
        """With the schema itself where a path was given: files change."""
        return {**super().settings(), "schema": self._read_schema}

    def _why_not_valid(self, value: Any) -> str | None:
        from jsonschema.exceptions import best_match
        from referencing.exceptions import Unresolvable

        try:
            error = best_match(self._validator.iter_errors(value))
        except RecursionError:
            raise InputError(f"{self.name}: the schema refers to itself without end") from None
        except Unresolvable as found:
            raise InputError(f"{self.name}: the schema does not hold {found.ref!r}") from None
        return f"{error.json_path}: {error.message}" if error else None

    @cached_property
    def _read_schema(self) -> Any:
        if not isinstance(self.schema, str):
            return self.schema
        return parse(Path(self.schema).read_text(encoding="utf-8"))

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator
        from jsonschema.validators import validator_for
        from jsonschema_specifications import REGISTRY

        # Without a registry given, jsonschema fetches references from the network.
        kind = validator_for(self._read_schema, default=Draft202012Validator)
        return kind(self._read_schema, registry=REGISTRY)


def parse(text: str) -> Any:
    """The one strict JSON value of a text.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_equal(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: true is not 1, the order of keys does not count."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return bool(one == other)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(twice)} stands twice in one object")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shorten(digits, 20)} is too large for a float")
    return value


def _schema_findings(schema: Any) -> Iterator[str]:
    """What is wrong with a schema: itself, or where it refers to."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    named = schema.get("$schema") if isinstance(schema, dict) else None
    kind = validator_for(schema, default=None)
    if named is not None and kind is None:
        yield f"found $schema {named!r}; allowed: the drafts 3, 4, 6, 7, 2019-09 and 2020-12"
        return
    try:
        (kind or Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        yield f"not a JSON Schema: {error.json_path}: {error.message}"
        return
    yield from _reference_findings(schema)


def _reference_findings(schema: Any) -> Iterator[str]:
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    base = resource.id() or ""
    resolver = REGISTRY.with_resource(base, resource).resolver(base)
    for reference in sorted(set(_references(schema))):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            yield f"refers to {reference!r}, which it does not hold; nothing else is read"


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if isinstance(schema.get(key), str):
                yield schema[key]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _references(part)
