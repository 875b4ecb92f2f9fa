"""Full weights as a GGUF file, with their tokenizer and chat template.

llama.cpp rotates neighbouring channels of a head, as Meta's code does: its rows of q and k are in
Meta's order, and `llama.meta_layout` has the permutation. A tied head is left out; llama.cpp then
takes the embedding.

Source: `LlamaModel` in llama.cpp's converter (conversion/llama.py), the key names in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.exports.gguf_stream import GgufTensor, fitting_type, gguf_package, write_gguf
from finetune.exports.gguf_tokenizer import TokenTable, add_tokenizer
from finetune.exports.source import Source
from finetune.llama.hyperparameters import Architecture
from finetune.llama.meta_layout import weights_of
from finetune.llama.stored_weights import HEAD, stored_weights

if TYPE_CHECKING:
    from torch import Tensor

_TYPE_OF_DTYPE = {"float64": "f32", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`.

    Raises:
        KeyError: no weight of a Llama.
    """
    stem = hf_name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def plan_tensors(source: Source, kind: str | None) -> list[GgufTensor]:
    """Every tensor of the file, checked by the headers of the weights.

    Args:
        kind: one of `gguf_stream.TYPES`; by default the type that each weight is stored in.
    """
    arch = source.architecture
    weights = [w for w in weights_of(arch) if not (arch.tie_word_embeddings and w.hf == HEAD)]
    planned = []
    for stored in stored_weights(source.folder, arch, weights):
        shape = stored.weight.shape
        fits = fitting_type(kind or _TYPE_OF_DTYPE[stored.dtype], shape)
        name = gguf_name(stored.weight.hf)
        planned.append(GgufTensor(name, shape, fits, stored.blocks_in_meta_order))
    return planned + _rope_tensors(arch)


def rope_factors(arch: Architecture) -> list[float] | None:
    """What the frequency of each pair of channels is divided by; None without scaling.

    1 for waves that turn often within the original context, `factor` for those that hardly do,
    and between them 1 / (share + (1 - share) / factor), the share growing with the turns.

    Source: Llama 3.1's `apply_scaling` in meta-llama/llama-models; llama.cpp's converter stores the
    quotient (`LlamaModel.generate_extra_tensors`).
    """
    scaling = arch.rope_scaling
    if scaling is None:
        return None
    factors = []
    for pair in range(arch.head_dim // 2):
        frequency = arch.rope_theta ** (-2 * pair / arch.head_dim)
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        share = min(max((turns - scaling.low_freq_factor) / span, 0.0), 1.0)
        factors.append(1 / (share + (1 - share) / scaling.factor))
    return factors


def _rope_tensors(arch: Architecture) -> list[GgufTensor]:
    factors = rope_factors(arch)
    if factors is None:
        return []

    def block() -> Iterator[Tensor]:
        import torch

        yield torch.tensor(factors, dtype=torch.float64)

    return [GgufTensor("rope_freqs.weight", (len(factors),), "f32", block)]


def main_type(tensors: list[GgufTensor]) -> str:
    """The type of most bytes, by which llama.cpp names the file."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) == 2:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.num_bytes
    return max(sizes, key=lambda kind: sizes[kind])


def write_gguf_model(
    path: Path, source: Source, tensors: list[GgufTensor], table: TokenTable
) -> None:
    """Writes the file: architecture, tokenizer, tensors; memory holds a block of rows."""

    def add_keys(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name(source.name)
        _add_architecture(writer, source.architecture)
        writer.add_file_type(int(gguf_package().LlamaFileType[_FILE_TYPES[main_type(tensors)]]))
        writer.add_quantization_version(gguf_package().GGML_QUANT_VERSION)
        add_tokenizer(writer, source, table)

    write_gguf(path, tensors, add_keys)


def _add_architecture(writer: Any, arch: Architecture) -> None:
    writer.add_vocab_size(arch.vocab_size)
    writer.add_context_length(arch.context)
    writer.add_embedding_length(arch.dim)
    writer.add_block_count(arch.n_layers)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.n_heads)
    writer.add_head_count_kv(arch.n_kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
