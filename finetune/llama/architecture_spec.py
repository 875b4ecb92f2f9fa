"""What a config writes under `base.architecture` -> an `Architecture`, all findings at once."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from finetune.errors import InputError
from finetune.llama.hyperparameters import Architecture, RopeScaling
from finetune.llama.presets import HUB_IDS, PRESETS

_REQUIRED = ("dim", "n_layers", "n_heads", "vocab_size")


def architecture_of(spec: str | Mapping[str, Any]) -> Architecture:
    """The architecture that a config names or describes.

    Args:
        spec: a preset's name, or a mapping: `preset` with the fields to change, or all fields of
            one's own (`dim`, `n_layers`, `n_heads`, `vocab_size` at least; `n_kv_heads` is
            `n_heads` unless said). `intermediate_size` may be given itself, and
            `use_scaled_rope: true` stands for Llama 3.1's scaling. A preset's special ids that a
            smaller `vocab_size` leaves outside the vocabulary become None: they are the
            tokenizer's to say.

    Raises:
        InputError: unknown names, wrong types, numbers that contradict each other; all of them.
    """
    if isinstance(spec, str):
        return _preset(spec)
    if not isinstance(spec, Mapping):
        raise InputError(f"architecture: {spec!r} is neither a preset's name nor a mapping")
    values, found = _typed_values(spec)
    base: dict[str, Any] = {}
    try:
        base = _base_values(spec, values)
    except InputError as error:
        found += error.findings
    if found:
        raise InputError(found)
    try:
        return Architecture(**(base | values))
    except InputError as error:
        raise InputError([f"architecture.{finding}" for finding in error.findings]) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to append to a message, or an empty string when nothing is close."""
    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), list(folded), n=1, cutoff=0.6)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def _preset(name: Any) -> Architecture:
    if name in PRESETS:
        return PRESETS[name]
    if name in HUB_IDS:
        raise InputError(
            f"architecture: {name!r} is a hub id; its architecture is {HUB_IDS[name]!r} "
            "(random weights), its trained weights are base.path"
        )
    hint = did_you_mean(name, PRESETS)
    raise InputError(f"architecture: unknown preset {name!r}{hint}; known: {', '.join(PRESETS)}")


def _base_values(spec: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the given fields are laid over: a preset's fields, or the least that is needed."""
    if "preset" not in spec:
        missing = [name for name in _REQUIRED if name not in spec]
        if missing:
            raise InputError(f"architecture: {', '.join(missing)} missing, and no preset is named")
        return {"n_kv_heads": values.get("n_heads"), "bos_token_id": None, "eos_token_id": None}
    preset = _preset(spec["preset"])
    base = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)}
    vocab_size = values.get("vocab_size", preset.vocab_size)
    for name, ids in (
        ("bos_token_id", [preset.bos_token_id]),
        ("eos_token_id", preset.eos_token_ids),
    ):
        if any(token_id is not None and token_id >= vocab_size for token_id in ids):
            base[name] = None
    return base


def _typed_values(spec: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a mapping under the dataclass's names, and what is wrong with them."""
    values: dict[str, Any] = {}
    found: list[str] = []
    for key, value in spec.items():
        if key == "preset":
            continue
        if key not in _READERS:
            known = [*_READERS, "preset"]
            hint = did_you_mean(key, known) or f"; known: {', '.join(known)}"
            found.append(f"architecture.{key}: unknown field{hint}")
            continue
        name, read = _READERS[key]
        try:
            values[name] = read(value)
        except InputError as error:
            found += [f"architecture.{key}: {finding}" for finding in error.findings]
    if spec.get("use_scaled_rope") is not None and "rope_scaling" in spec:
        found.append("architecture: use_scaled_rope and rope_scaling say the same; give one")
    return values, found


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{value!r} is not a whole number")
    return value


def read_number(value: Any) -> float:
    """A number as a float.

    Raises:
        InputError: no number, or none that is finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{value!r} is not a number")
    if not abs(value) <= sys.float_info.max:
        raise InputError(f"{value!r} is not a finite number")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{value!r} is neither true nor false")
    return value


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _ids(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(_count(token_id) for token_id in value)
    return _count(value)


def _default_scaling(value: Any) -> RopeScaling | None:
    return RopeScaling() if _flag(value) else None


def read_rope_scaling(value: Any) -> RopeScaling:
    """A mapping as transformers writes it (`rope_type: llama3` or `type`, and four numbers).

    Raises:
        InputError: another rope type, unknown fields, wrong types; all of them.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{value!r} is not a mapping of factor, low_freq_factor …")
    numbers = {f.name: f.type for f in dataclasses.fields(RopeScaling)}
    found = []
    kind = value.get("rope_type", value.get("type", "llama3"))
    if kind != "llama3":
        found.append(f"rope type {kind!r} is not one of a documented Llama; only 'llama3' is")
    given = {k: v for k, v in value.items() if k not in ("rope_type", "type", "rope_theta")}
    read: dict[str, Any] = {}
    for key, item in given.items():
        try:
            if key not in numbers:
                raise InputError(f"unknown field{did_you_mean(key, numbers)}")
            read[key] = _count(item) if numbers[key] == "int" else read_number(item)
        except InputError as error:
            found += [f"{key}: {finding}" for finding in error.findings]
    if found:
        raise InputError(found)
    return RopeScaling(**read)


_READERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    **{name: (name, _count) for name in ("dim", "n_layers", "n_heads", "n_kv_heads")},
    **{name: (name, _count) for name in ("vocab_size", "multiple_of", "context")},
    **{name: (name, _count) for name in ("max_batch_size", "max_seq_len")},
    **{name: (name, read_number) for name in ("norm_eps", "rope_theta")},
    "ffn_dim_multiplier": ("ffn_dim_multiplier", _or_none(read_number)),
    "intermediate_size": ("intermediate_size_override", _or_none(_count)),
    "rope_scaling": ("rope_scaling", _or_none(read_rope_scaling)),
    "use_scaled_rope": ("rope_scaling", _default_scaling),
    "tie_word_embeddings": ("tie_word_embeddings", _flag),
    "bos_token_id": ("bos_token_id", _or_none(_count)),
    "eos_token_id": ("eos_token_id", _or_none(_ids)),
}
