"""A GGUF file read back by the `gguf` package, and the float64 reference Llama on its tensors.

All that the model needs comes from the file: names, sizes, RoPE's base and divisors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from reference import ReferenceLlama
from torch import Tensor

META_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


@dataclass(frozen=True)
class GgufFile:
    """Keys and tensors of a file; `types` has each tensor's storage."""

    keys: dict[str, Any]
    tensors: dict[str, Tensor]
    types: dict[str, str]


def read_gguf(path: Path) -> GgufFile:
    reader = gguf.GGUFReader(path)
    tensors, types = {}, {}
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = torch.from_numpy(numbers.copy()).reshape(shape)
        types[tensor.name] = tensor.tensor_type.name
    keys = {name: item.contents() for name, item in reader.fields.items() if item.types}
    return GgufFile(keys, tensors, types)


@dataclass(frozen=True)
class GgufLlama(ReferenceLlama):
    """The reference with the divisors of RoPE's frequencies that the file brings."""

    divisors: list[float] = field(default_factory=list)

    def frequencies(self, head_dim: int) -> list[float]:
        plain = super().frequencies(head_dim)
        divisors = self.divisors or [1.0] * len(plain)
        return [f / d for f, d in zip(plain, divisors, strict=True)]


def reference_of_gguf(file: GgufFile) -> GgufLlama:
    weights = {}
    for name, tensor in file.tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("blk."):
            layer, _, part = stem.removeprefix("blk.").partition(".")
            weights[f"layers.{layer}.{META_NAMES[part]}.weight"] = tensor
        elif stem != "rope_freqs":
            weights[f"{META_NAMES[stem]}.weight"] = tensor
    divisors = file.tensors.get("rope_freqs.weight", torch.zeros(0)).tolist()
    return GgufLlama(
        weights,
        n_heads=file.keys["llama.attention.head_count"],
        norm_eps=file.keys["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=file.keys["llama.rope.freq_base"],
        divisors=divisors,
    )


def greedy(model: ReferenceLlama, prompt: list[int], count: int) -> list[int]:
    """The next `count` ids, each the likeliest."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]
