"""Documented Llama architectures and their conversion to transformers' `LlamaConfig` and back.

The dataclass is in `hyperparameters`, the 15 documented models in `presets`, the reading of a
config's `base.architecture` in `architecture_spec`, params.json in `params_json`; all of it is
imported from here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.errors import InputError
from finetune.llama.architecture_spec import architecture_of, read_rope_scaling
from finetune.llama.hyperparameters import Architecture, PartCounts, RopeScaling, swiglu_width
from finetune.llama.params_json import from_params_json, to_params_json
from finetune.llama.presets import HUB_IDS, ORIGINAL_TRANSFORMER, PRESETS, SOURCES

if TYPE_CHECKING:
    from transformers import LlamaConfig

__all__ = [
    "HUB_IDS",
    "ORIGINAL_TRANSFORMER",
    "PRESETS",
    "SOURCES",
    "Architecture",
    "PartCounts",
    "RopeScaling",
    "architecture_of",
    "from_llama_config",
    "from_params_json",
    "main",
    "scaled_down",
    "to_llama_config",
    "to_params_json",
]

# A config.json that lacks one of these cannot be trusted: transformers would fill in 7B's.
_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "intermediate_size",
}
_OPTIONAL = {
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "context",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
# LlamaConfig's own defaults where they differ from ours.
_CONFIG_DEFAULTS = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
# What an Architecture cannot say, and the only value with which it need not.
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
}


def to_llama_config(arch: Architecture, dtype: str | None = None) -> LlamaConfig:
    """transformers' configuration of this architecture.

    Args:
        arch: the architecture.
        dtype: the name of the weights' type (`bfloat16`), or None to leave it open.
    """
    from transformers import LlamaConfig

    eos = arch.eos_token_id
    type_of_weights: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.dim,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.n_layers,
        num_attention_heads=arch.n_heads,
        num_key_value_heads=arch.n_kv_heads,
        head_dim=arch.head_dim,
        hidden_act="silu",
        max_position_embeddings=arch.context,
        rms_norm_eps=arch.norm_eps,
        rope_parameters=_rope_parameters(arch),
        tie_word_embeddings=arch.tie_word_embeddings,
        bos_token_id=arch.bos_token_id,
        eos_token_id=list(eos) if isinstance(eos, tuple) else eos,
        **type_of_weights,
    )


def from_llama_config(config: Mapping[str, Any] | LlamaConfig) -> Architecture:
    """The architecture that a `LlamaConfig` or a config.json, old or new, describes.

    A width that Meta's formula does not give is kept as `intermediate_size_override`.

    Raises:
        InputError: sizes are missing, or the model is something an `Architecture` cannot say
            (another model type or activation, biases, another kind of RoPE); all findings.
    """
    given = dict(config) if isinstance(config, Mapping) else config.to_dict()
    found = [f"config.{key}: missing" for key in _SIZES if given.get(key) is None]
    found += [
        f"config.{key}: {given[key]!r} is not a documented Llama; only {only!r} is"
        for key, only in _FIXED.items()
        if given.get(key, only) not in (only, None)
    ]
    spec = {ours: given[key] for key, ours in _SIZES.items() if given.get(key) is not None}
    defaults = _CONFIG_DEFAULTS | {key: given[key] for key in _OPTIONAL if key in given}
    spec |= {_OPTIONAL[key]: value for key, value in defaults.items() if key in _OPTIONAL}
    if spec.get("n_kv_heads", 0) is None:
        del spec["n_kv_heads"]
    try:
        spec |= _rope_of_config(given)
        arch = architecture_of(spec) if not found else None
    except InputError as error:
        raise InputError(found + error.findings) from None
    head_dim = given.get("head_dim")
    if arch is not None and head_dim not in (None, arch.head_dim):
        found.append(f"config.head_dim: {head_dim} is not hidden_size / heads = {arch.head_dim}")
    if found or arch is None:
        raise InputError(found)
    return _without_needless_override(arch)


def scaled_down(arch: Architecture, vocab_size: int) -> Architecture:
    """A tiny relative for smoke runs and tests: two layers of a few 16-wide heads.

    What decides the code path stays: tying, RoPE's base and scaling, epsilon, the width formula
    and, up to 8 heads, the ratio of query to key heads. Special ids outside the smaller
    vocabulary become None.
    """
    group = min(arch.n_heads // arch.n_kv_heads, 8)
    n_kv_heads = {1: 4, 8: 1}.get(group, 2 if group <= 4 else 1)
    n_heads = group * n_kv_heads
    inside = [token_id for token_id in arch.eos_token_ids if token_id < vocab_size]
    keeps_bos = arch.bos_token_id is not None and arch.bos_token_id < vocab_size
    return dataclasses.replace(
        arch,
        dim=16 * n_heads,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=vocab_size,
        multiple_of=32,
        intermediate_size_override=None,
        bos_token_id=arch.bos_token_id if keeps_bos else None,
        eos_token_id=arch.eos_token_id if inside == list(arch.eos_token_ids) else None,
    )


def _rope_parameters(arch: Architecture) -> dict[str, Any]:
    if arch.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": arch.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": arch.rope_theta,
        **dataclasses.asdict(arch.rope_scaling),
    }


def _rope_of_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE from transformers 5's `rope_parameters`, or from the older two fields."""
    found = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise InputError(f"config.rope_parameters: {found!r:.80} is not a mapping")
    rope = dict(found)
    theta = rope.pop("rope_theta", given.get("rope_theta"))
    if rope.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise InputError("config.rope_parameters.partial_rotary_factor: a Llama rotates all of it")
    kind = rope.get("rope_type", rope.get("type", "default"))
    spec: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else theta}
    if kind == "default":
        return spec
    missing = [f.name for f in dataclasses.fields(RopeScaling) if f.name not in rope]
    if kind == "llama3" and missing:
        raise InputError(f"config.rope_scaling: {', '.join(missing)} missing")
    try:
        read_rope_scaling(rope)
    except InputError as error:
        raise InputError([f"config.rope_scaling: {f}" for f in error.findings]) from None
    return spec | {"rope_scaling": rope}


def _without_needless_override(arch: Architecture) -> Architecture:
    """Writes a width by its documented factors, where a documented model has them."""
    for preset in PRESETS.values():
        same = (preset.dim, preset.intermediate_size) == (arch.dim, arch.intermediate_size)
        if same:
            return dataclasses.replace(
                arch,
                multiple_of=preset.multiple_of,
                ffn_dim_multiplier=preset.ffn_dim_multiplier,
                intermediate_size_override=None,
            )
    if swiglu_width(arch.dim, arch.multiple_of, None) == arch.intermediate_size:
        return dataclasses.replace(arch, intermediate_size_override=None)
    return arch


def describe(name: str, arch: Architecture) -> dict[str, Any]:
    """One architecture as the JSON object that `arch --json` prints."""
    scaling = arch.rope_scaling
    eos = arch.eos_token_id
    fields = {f.name: getattr(arch, f.name) for f in dataclasses.fields(arch)}
    del fields["intermediate_size_override"]
    return {
        "name": name,
        **fields,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.intermediate_size,
        "use_scaled_rope": arch.use_scaled_rope,
        "rope_scaling": scaling and {"rope_type": "llama3", **dataclasses.asdict(scaling)},
        "params_computed": arch.num_parameters().total,
        "params_by_part": arch.num_parameters().as_dict(),
        "flops_per_token_by_part": arch.flops_per_token().as_dict(),
        "source": SOURCES.get(name),
    }


def describe_original() -> dict[str, Any]:
    """The original Transformer under the same keys; what it does not have is None."""
    llama = describe("llama1-7b", PRESETS["llama1-7b"])
    return dict.fromkeys(llama) | dict(ORIGINAL_TRANSFORMER)


_COLUMNS = (
    *("name", "dim", "n_layers", "n_heads", "n_kv_heads", "intermediate_size", "vocab_size"),
    *("context", "rope_theta", "tie_word_embeddings"),
)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [[*_COLUMNS, "parameters"]]
    for row in rows:
        total = row.get("params_computed") or row["params_published"]
        lines.append(
            [
                *(str("" if row[column] is None else row[column]) for column in _COLUMNS),
                f"{total:,}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _details(row: Mapping[str, Any]) -> str:
    width = max(map(len, row))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in row.items())


def main(argv: list[str]) -> int:
    """`python -m finetune arch [NAME] [--json]`: the documented architectures."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune arch", description="The documented Llama architectures."
    )
    parser.add_argument("name", nargs="?", help="a preset or a documented hub id; all if left out")
    parser.add_argument("--json", action="store_true", help="a list of objects on stdout")
    args = parser.parse_args(argv)
    if args.name == ORIGINAL_TRANSFORMER["name"]:
        rows = [describe_original()]
    elif args.name is not None:
        name = HUB_IDS.get(args.name, args.name)
        rows = [describe(name, architecture_of(name))]
    else:
        rows = [describe(name, arch) for name, arch in PRESETS.items()]
        rows.append(describe_original())
    if args.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        print(_table(rows) if args.name is None else _details(rows[0]))
    return 0
