"""Meta's params.json <-> an `Architecture`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune.errors import InputError
from finetune.llama.architecture_spec import architecture_of, did_you_mean, read_number
from finetune.llama.hyperparameters import Architecture, RopeScaling, swiglu_width
from finetune.llama.presets import PRESETS

_PARAMS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier"),
    *("norm_eps", "rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len"),
)

_OF_SCALING = {"rope_scaling_factor": "factor", "rope_high_freq_factor": "high_freq_factor"}


def from_params_json(
    params: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = False,
    context: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
) -> Architecture:
    """The architecture that Meta's params.json describes.

    The file says neither the context nor, for Llama 3.2, RoPE's factor: both are taken from
    the documented model of the same numbers, else 2048 (or the file's own `max_seq_len`) and
    Llama 3.1's factor 8.

    Args:
        params: the file's content.
        vocab_size: rows of the embedding; needed where the file says -1 (Llama 1 and 2).
        tie_word_embeddings: whether the head is the embedding; the weights tell.
        context: longest sequence in tokens, where it is known better.
        bos_token_id: from the tokenizer.
        eos_token_id: from the tokenizer.

    Raises:
        InputError: unknown fields (another kind of model), wrong types, numbers that contradict
            each other or `vocab_size`; all findings.
    """
    known = (*_PARAMS, "vocab_size", *_OF_SCALING)
    found = [
        f"params.json {key}: not a field of a documented text Llama{did_you_mean(key, known)}"
        for key in params
        if key not in known
    ]
    stated = params.get("vocab_size", -1)
    if vocab_size is not None and stated not in (-1, vocab_size):
        found.append(f"params.json vocab_size: {stated}, but the embedding has {vocab_size} rows")
    if vocab_size is None and stated == -1:
        found.append("params.json vocab_size: -1 means 'as the tokenizer says', and none is given")
    spec = {key: params[key] for key in _PARAMS if params.get(key) is not None}
    spec |= {"vocab_size": stated if vocab_size is None else vocab_size}
    spec |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    spec |= {"tie_word_embeddings": tie_word_embeddings, "context": context or 2048}
    try:
        arch = architecture_of({k: v for k, v in spec.items() if k != "vocab_size" or v != -1})
    except InputError as error:
        raise InputError(found + error.findings) from None
    if found:
        raise InputError(found)
    try:
        arch = _with_documented_scaling(arch, params)
    except InputError as error:
        raise InputError([f"params.json {f}" for f in error.findings]) from None
    return _with_documented_context(arch, params, context)


def to_params_json(arch: Architecture) -> dict[str, Any]:
    """Meta's params.json for an architecture.

    A width that was given itself is expressed by a `multiple_of` and `ffn_dim_multiplier` that
    give it. Meta's files say of RoPE only `use_scaled_rope`; where that would be read as another
    scaling than this model's, `rope_scaling_factor` and `rope_high_freq_factor` are added, which
    `from_params_json` reads.

    Raises:
        InputError: the RoPE scaling is one that params.json cannot say.
    """
    multiple_of, multiplier = _factors_of_width(arch)
    params: dict[str, Any] = {
        "dim": arch.dim,
        "n_layers": arch.n_layers,
        "n_heads": arch.n_heads,
        "n_kv_heads": arch.n_kv_heads,
        "vocab_size": arch.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if arch.rope_scaling is not None:
        params["use_scaled_rope"] = True
        stretch = arch.rope_scaling
        if stretch.low_freq_factor != 1.0 or stretch.original_max_position_embeddings != 8192:
            raise InputError(
                "params.json has no field for RoPE's low_freq_factor and original context: only "
                f"1.0 and 8192 can be exported, this model has {stretch.low_freq_factor} and "
                f"{stretch.original_max_position_embeddings}"
            )
        documented = _documented_scaling(arch)
        if stretch.factor != documented.factor:
            params["rope_scaling_factor"] = stretch.factor
        if stretch.high_freq_factor != documented.high_freq_factor:
            params["rope_high_freq_factor"] = stretch.high_freq_factor
    return params


def _factors_of_width(arch: Architecture) -> tuple[int, float | None]:
    """A `multiple_of` and multiplier that give the width; the usual ones where they do."""
    width = arch.intermediate_size
    if arch.intermediate_size_override is None:
        return arch.multiple_of, arch.ffn_dim_multiplier
    usual = (256, 128, 64, 32, 16, 8, 4, 2, 1, width)
    fitting = [n for n in usual if swiglu_width(arch.dim, n, None) == width]
    if fitting:
        return fitting[0], None
    return width, width / swiglu_width(arch.dim, 1, None)


def _with_documented_scaling(arch: Architecture, params: Mapping[str, Any]) -> Architecture:
    if arch.rope_scaling is None:
        return arch
    stated: dict[str, Any] = {}
    for key, name in _OF_SCALING.items():
        if params.get(key) is not None:
            try:
                stated[name] = read_number(params[key])
            except InputError as error:
                raise InputError(f"{key}: {error}") from None
    scaling = dataclasses.replace(_documented_scaling(arch), **stated)
    return dataclasses.replace(arch, rope_scaling=scaling)


def _documented_scaling(arch: Architecture) -> RopeScaling:
    """What `use_scaled_rope` alone stands for: the documented model's scaling, else 3.1's."""
    shapes = {_shape(p): p.rope_scaling for p in PRESETS.values() if p.rope_scaling is not None}
    return shapes.get(_shape(arch), RopeScaling())


def _with_documented_context(
    arch: Architecture, params: Mapping[str, Any], context: int | None
) -> Architecture:
    if context is not None:
        return arch
    for preset in PRESETS.values():
        alike = (preset.norm_eps, preset.rope_theta, preset.rope_scaling)
        if _shape(preset) == _shape(arch) and alike == (
            arch.norm_eps,
            arch.rope_theta,
            arch.rope_scaling,
        ):
            return dataclasses.replace(arch, context=preset.context)
    return dataclasses.replace(arch, context=params.get("max_seq_len") or arch.context)


def _shape(arch: Architecture) -> tuple[int, ...]:
    return (arch.dim, arch.n_layers, arch.n_heads, arch.n_kv_heads, arch.vocab_size)
