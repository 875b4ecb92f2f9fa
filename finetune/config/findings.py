"""pydantic's errors -> sentences: where, what was found, what is allowed, what was meant."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from finetune.config.tree import Path

HABITS = {
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "model": "base.path",
    "model_name_or_path": "base.path",
    "torch_dtype": "base.dtype",
    "load_in_4bit": "base.quantization",
    "dataset": "data.train",
    "validation": "data.heldout",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "chat_template": "data.chat_format",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "gradient_checkpointing": "train.activation_checkpointing",
    "gradient_clipping": "train.max_grad_norm",
    "output_dir": "run.dir",
}
"""Names people bring from other tools -> the setting here."""

_SECRET = re.compile(
    r"(?i)(^|[_.-])(token|auth|bearer|credentials?|passwd|passphrase)$"
    r"|api_?key|access_?key|private_?key|secret|password"
)
"""Names of what must not stand in a config, nor in a message about one."""


def describe_errors(
    error: ValidationError,
    model: type[BaseModel],
    values: Any,
    prefix: Path,
    known_paths: Iterable[str],
) -> dict[Path, str]:
    """One sentence for every path that has errors; a union's several errors are one.

    Args:
        error: what pydantic found.
        model: the model that refused.
        values: the tree it was given.
        prefix: the path of that tree in the config.
        known_paths: every `section.key` there is, for "did you mean".
    """
    sentences: dict[Path, str] = {}
    for item in error.errors():
        path = _path_in(values, item["loc"])
        if item["type"] == "missing":
            path = tuple(str(part) for part in item["loc"])
        full = prefix + path
        if full in sentences:
            continue
        found = value_at(values, path)
        if item["type"] == "extra_forbidden":
            sentences[full] = unknown_key(full, found, model, known_paths)
        elif item["type"] == "value_error":
            sentences[full] = f"found {show(found, full)}; {item['ctx']['error']}"
        else:
            field = _field(model, path)
            allowed = describe_field(field) if field else item["msg"]
            what = "missing" if item["type"] == "missing" else f"found {show(found, full)}"
            sentences[full] = f"{what}; allowed: {allowed}"
    return sentences


def unknown_key(path: Path, found: Any, model: type[BaseModel], known: Iterable[str]) -> str:
    """The sentence for a key that does not exist."""
    meant = did_you_mean(path, known)
    inner = _model_at(model, path[1:-1]) or model
    allowed = ", ".join(inner.model_fields)
    hint = f"did you mean {meant}? " if meant else ""
    return f"unknown key (found {show(found, path)}); {hint}allowed: {allowed}"


def did_you_mean(path: Path, known: Iterable[str]) -> str | None:
    """The known `section.key` nearest to an unknown one: by habit, in its section, or anywhere."""
    key, known = path[-1], list(known)
    if key.lower() in HABITS:
        return HABITS[key.lower()]
    own = [name for name in known if name.rpartition(".")[0] == ".".join(path[:-1])]
    for candidates in (own, known):
        leaves = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)
        if near:
            return leaves[near[0]]
    return None


def show(value: Any, path: Path = ()) -> str:
    """A value as a person would write it, shortened; not that of a key that names a secret.

    Args:
        value: a value of a config.
        path: its keys, the outermost first.
    """
    value = _without_secrets(value, path)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _without_secrets(value: Any, path: Path) -> Any:
    if value is not None and any(_SECRET.search(key) for key in path):
        return _Hidden()
    if isinstance(value, Mapping):
        return {key: _without_secrets(inner, (str(key),)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner, ()) for inner in value]
    return value


class _Hidden:
    def __repr__(self) -> str:
        return "a value that is not shown: secrets belong into the environment"


def describe_field(field: FieldInfo) -> str:
    """What a field allows, from its annotation and bounds."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    bounds = _bounds(metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _describe(inner, [*more, *metadata])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping {{{', '.join(annotation.model_fields)}}}"
    if get_origin(annotation) is Literal:
        return ", ".join(show(value).strip("'") for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(arg) + bounds for arg in get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"a list of: {_describe(get_args(annotation)[0])}"
    if get_origin(annotation) is dict or annotation is dict:
        return "a mapping"
    return _WORDS.get(annotation, str(annotation)) + bounds


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def _bounds(metadata: Iterable[Any]) -> str:
    parts: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            parts.append(_bounds(item.metadata).strip())
        for kind, name, sign in _SIGNS:
            if isinstance(item, kind):
                parts.append(f"{sign} {getattr(item, name)}")
        if isinstance(item, annotated_types.MinLen):
            parts.append("that is not empty")
        if getattr(item, "pattern", None):
            parts.append("of letters, digits, '.', '_' and '-'")
    return f" {' and '.join(filter(None, parts))}" if any(parts) else ""


_SIGNS = (
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "<="),
    (annotated_types.Lt, "lt", "<"),
)


def _path_in(values: Any, loc: Iterable[str | int]) -> Path:
    """The part of pydantic's location that exists in the tree.

    The rest names members of a union, or the position in a list where one value stands for it.
    """
    path: list[str] = []
    for part in loc:
        if isinstance(part, int) and not isinstance(values, list):
            continue
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            break
        path.append(str(part))
    return tuple(path)


def value_at(values: Any, path: Path) -> Any:
    """The value at a path; null where there is none."""
    for part in path:
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, Mapping):
            values = values.get(part)
        else:
            return None
    return values


def _field(model: type[BaseModel], path: Path) -> FieldInfo | None:
    owner = _model_at(model, path[:-1])
    return owner.model_fields.get(path[-1]) if owner and path else None


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model that holds the keys at a path; list positions are stepped over."""
    current: type[BaseModel] | None = model
    for part in path:
        if part.isdigit() or current is None:
            continue
        field = current.model_fields.get(part)
        current = _inner_model(field.annotation) if field else None
    return current


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_inner_model(arg) for arg in get_args(annotation))
    return next((model for model in inner if model), None)
