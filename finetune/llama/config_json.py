"""A model folder's config.json: what is refused in it, and what of it is passed on.

Only the documented numbers are read (`architecture.from_llama_config`); transformers gets a
configuration made from them, never the file. Whatever else a file says has no effect, and is not
written into a folder of ours, where another program might act on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PASSED_ON = frozenset(
    (
        *("architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype"),
        *("eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "mlp_bias", "model_type"),
        *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id"),
        *("pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta"),
        *("tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vocab_size"),
    )
)


def findings_of(config: Mapping[str, Any]) -> list[str]:
    """What cannot be left unsaid: code that would be the model, and weights in other codes."""
    found = []
    if config.get("auto_map"):
        found.append(
            f"auto_map: {str(config['auto_map'])[:80]} is code of the folder; no such code is run. "
            "Where the weights are a plain Llama's, take auto_map out of a copy of the file"
        )
    if config.get("quantization_config"):
        found.append(
            f"quantization_config: {str(config['quantization_config'])[:80]}; allowed are weights "
            "as they were published, in full precision: base.quantization quantises them"
        )
    kernels = [key for key, value in config.items() if _names_a_kernel(key, value)]
    return found + [f"{key}: {config[key]!r:.80} names a kernel to fetch" for key in kernels]


def _names_a_kernel(key: str, value: Any) -> bool:
    """`owner/name` as an attention: transformers would fetch it from the hub and run it."""
    return "_implementation" in key and "/" in str(value)


def passed_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a base's config.json that a model made from it gets."""
    return {key: value for key, value in config.items() if key in _PASSED_ON}
