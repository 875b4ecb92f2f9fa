"""The 15 documented text Llamas, where each one's numbers come from, and their hub ids.

Where public sources disagree, the value taken and the reason stand here and in docs/llama.md:

- Llama 2's `norm_eps`: the base models' params.json say 1e-5; the 7B chat model's is quoted
  with 1e-6 in several places. The base value is taken; an imported file's own value wins.
- Llama 3.2's RoPE factor: its params.json states only `use_scaled_rope`, and the reference
  code's default is 8; the published Hugging Face configs and every runtime that reproduces
  the model say 32. 32 is taken.
- Llama 3.1 405B's kv heads: 8 in `sku_list.py` and in the paper; its 16-way checkpoint
  ("mp16") stores each of them twice, which is why 16 is seen too. 8 is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from finetune.llama.hyperparameters import Architecture, RopeScaling

# Llama 1: params.json whose sha256 equals the one Meta published; context and theta from the
# v1 branch of meta-llama/llama (`model.py`). Llama 2: params.json as quoted in public files,
# theta from the v2 branch, context from MODEL_CARD.md. Llama 3 and later: `model_args` in
# `models/sku_list.py` of meta-llama/llama-models; context from the model cards.
_LLAMA1 = "params.json (sha256 published in meta-llama/llama), llama_v1 model.py"
_LLAMA2 = "params.json, llama_v2 model.py and MODEL_CARD.md of meta-llama/llama"
_SKU_LIST = "meta-llama/llama-models models/sku_list.py, model cards, published config.json"
_SKU_LIST_ONLY = "meta-llama/llama-models models/sku_list.py, litgpt and torchtune configs"

_SPM: dict[str, Any] = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
_TIKTOKEN: dict[str, Any] = {
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LONG: dict[str, Any] = {"context": 131072}
# The instruct configs' list; no public source states the ids of the 3.2 base models.
_STOPS_32 = (128001, 128008, 128009)


def _llama(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, *groups: dict[str, Any], **rest: Any
) -> Architecture:
    values: dict[str, Any] = {}
    for group in groups:
        values |= group
    return Architecture(dim, n_layers, n_heads, n_kv_heads, **(values | rest))


_WIDE: dict[str, Any] = {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}  # the 70B shape
_8B: dict[str, Any] = {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}
_SCALED_8: dict[str, Any] = {"rope_scaling": RopeScaling(factor=8.0)}
_SCALED_32: dict[str, Any] = {"rope_scaling": RopeScaling(factor=32.0)}
_SMALL_32: dict[str, Any] = {
    **_LONG,
    **_SCALED_32,
    "tie_word_embeddings": True,
    "eos_token_id": _STOPS_32,
}

PRESETS: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama1-7b": _llama(4096, 32, 32, 32, _SPM, norm_eps=1e-6),
        "llama1-13b": _llama(5120, 40, 40, 40, _SPM, norm_eps=1e-6),
        "llama1-33b": _llama(6656, 60, 52, 52, _SPM, norm_eps=1e-6),  # folder "30B"
        "llama1-65b": _llama(8192, 80, 64, 64, _SPM, norm_eps=1e-5),
        "llama2-7b": _llama(4096, 32, 32, 32, _SPM, context=4096),
        "llama2-13b": _llama(5120, 40, 40, 40, _SPM, context=4096),
        "llama2-70b": _llama(8192, 80, 64, 8, _SPM, _WIDE, context=4096),
        "llama3-8b": _llama(4096, 32, 32, 8, _TIKTOKEN, _8B, context=8192),
        "llama3-70b": _llama(8192, 80, 64, 8, _TIKTOKEN, _WIDE, context=8192),
        "llama3.1-8b": _llama(4096, 32, 32, 8, _TIKTOKEN, _8B, _LONG, _SCALED_8),
        "llama3.1-70b": _llama(8192, 80, 64, 8, _TIKTOKEN, _WIDE, _LONG, _SCALED_8),
        "llama3.1-405b": _llama(
            16384, 126, 128, 8, _TIKTOKEN, _WIDE, _LONG, _SCALED_8,
            ffn_dim_multiplier=1.2,
            eos_token_id=None,  # no public config.json
        ),
        "llama3.2-1b": _llama(
            2048, 16, 32, 8, _TIKTOKEN, _SMALL_32, multiple_of=256, ffn_dim_multiplier=1.5
        ),
        "llama3.2-3b": _llama(
            3072, 28, 24, 8, _TIKTOKEN, _SMALL_32, multiple_of=256, ffn_dim_multiplier=1.0
        ),
        "llama3.3-70b": _llama(
            8192, 80, 64, 8, _TIKTOKEN, _WIDE, _LONG, _SCALED_8,
            eos_token_id=None,  # no public config.json
        ),
    }
)  # fmt: skip

SOURCES: Mapping[str, str] = MappingProxyType(
    {
        name: _LLAMA1
        if name.startswith("llama1")
        else _LLAMA2
        if name.startswith("llama2")
        else _SKU_LIST_ONLY
        if PRESETS[name].eos_token_id is None
        else _SKU_LIST
        for name in PRESETS
    }
)
"""Where each preset's numbers were published."""


def _hub_ids() -> dict[str, str]:
    ids = {}
    for size in ("7b", "13b", "70b"):
        for variant in ("", "-chat"):
            ids[f"meta-llama/Llama-2-{size}{variant}-hf"] = f"llama2-{size}"
            ids[f"meta-llama/Llama-2-{size}{variant}"] = f"llama2-{size}"  # Meta's own layout
    for variant in ("", "-Instruct"):
        for size in ("8B", "70B"):
            ids[f"meta-llama/Meta-Llama-3-{size}{variant}"] = f"llama3-{size.lower()}"
        for size in ("8B", "70B", "405B"):
            # Renamed on the hub after the release; both names resolve there.
            for prefix in ("Llama-3.1", "Meta-Llama-3.1"):
                ids[f"meta-llama/{prefix}-{size}{variant}"] = f"llama3.1-{size.lower()}"
        for size in ("1B", "3B"):
            ids[f"meta-llama/Llama-3.2-{size}{variant}"] = f"llama3.2-{size.lower()}"
    ids["meta-llama/Llama-3.3-70B-Instruct"] = "llama3.3-70b"  # there is no 3.3 base
    return ids


HUB_IDS: Mapping[str, str] = MappingProxyType(_hub_ids())
"""Documented hub id -> preset name; a look-up, never the network. Llama 1 was never on the hub."""

ORIGINAL_TRANSFORMER: Mapping[str, Any] = MappingProxyType(
    {
        "name": "transformer-base",
        "dim": 512,
        "n_layers": 6,  # in the encoder, and 6 more in the decoder
        "n_heads": 8,
        "n_kv_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2048,
        "vocab_size": 37000,
        "tie_word_embeddings": True,
        "params_published": 65_000_000,
        "note": "encoder-decoder, post-LayerNorm, ReLU, sinusoidal positions, dropout 0.1",
        "source": "Vaswani et al. 2017, Attention Is All You Need, table 3 (base), section 5.1",
    }
)
"""A row to compare with; it is no Llama and cannot be a base."""
