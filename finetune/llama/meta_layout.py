"""How Meta names, splits and rotates the weights of a Llama, beside Hugging Face's way.

Meta's checkpoints are cut for model parallelism: a column-parallel matrix by its rows (dimension
0), a row-parallel one by its columns (dimension 1), norms are repeated in every shard. Llama 1
and 2 cut the embedding by columns, Llama 3 by rows. Where there are more shards than key heads
(405B in 16 parts), each key head is stored several times.

Meta rotates neighbouring pairs of channels (RoPE as complex numbers), Hugging Face rotates the
first half of a head with the second: the rows of the query and key projections are permuted.

Source: `model.py` of meta-llama/llama and meta-llama/llama-models; the permutation follows from
the two formulas of RoPE and is checked by the float64 reference in tests/llama/reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.llama.hyperparameters import Architecture

if TYPE_CHECKING:
    from torch import Tensor

Rotated = Literal["query", "key"] | None
REPEATED = None
BY_ROWS = 0
BY_COLUMNS = 1


@dataclass(frozen=True)
class Weight:
    """One matrix or vector of a Llama, in both layouts.

    Attributes:
        meta: its name in Meta's files.
        hf: its name in Hugging Face's files.
        shape: (rows, columns), or (channels,) for a norm.
        split: dimension in which Meta cuts it, None where every shard repeats it.
        rotated: whether RoPE turns its rows, and whose heads they are.
        num_copies: how often each key or value head is stored when the shards outnumber them.
    """

    meta: str
    hf: str
    shape: tuple[int, ...]
    split: int | None
    rotated: Rotated = None
    num_copies: int = 1

    def shard_shape(self, num_shards: int) -> tuple[int, ...]:
        """The shape of its part in one of `num_shards` shards."""
        if self.split is None:
            return self.shape
        cut = self.shape[self.split] * self.num_copies // num_shards
        return (*self.shape[: self.split], cut, *self.shape[self.split + 1 :])

    def divides(self, num_shards: int) -> bool:
        """Whether it can be cut into so many equal parts."""
        return self.split is None or self.shape[self.split] * self.num_copies % num_shards == 0


def weights_of(
    arch: Architecture, num_shards: int = 1, embedding_split: int = BY_ROWS
) -> Iterator[Weight]:
    """Every weight of an architecture; the head is listed for tied models too.

    Args:
        arch: the architecture.
        num_shards: number of Meta's shards.
        embedding_split: `BY_COLUMNS` for Llama 1 and 2, `BY_ROWS` for Llama 3.
    """
    vocabulary = (arch.vocab_size, arch.dim)
    yield Weight("tok_embeddings.weight", "model.embed_tokens.weight", vocabulary, embedding_split)
    for layer in range(arch.n_layers):
        yield from _layer(arch, layer, max(1, num_shards // arch.n_kv_heads))
    yield Weight("norm.weight", "model.norm.weight", (arch.dim,), REPEATED)
    yield Weight("output.weight", "lm_head.weight", vocabulary, BY_ROWS)


def _layer(arch: Architecture, layer: int, num_copies: int) -> Iterator[Weight]:
    meta, hf = f"layers.{layer}", f"model.layers.{layer}"
    dim, wide = arch.dim, arch.intermediate_size
    keys = (arch.n_kv_heads * arch.head_dim, dim)

    def weight(
        ours: str,
        theirs: str,
        shape: tuple[int, ...],
        split: int | None,
        rotated: Rotated = None,
        copies: int = 1,
    ) -> Weight:
        return Weight(
            f"{meta}.{ours}.weight", f"{hf}.{theirs}.weight", shape, split, rotated, copies
        )

    yield weight("attention.wq", "self_attn.q_proj", (dim, dim), BY_ROWS, "query")
    yield weight("attention.wk", "self_attn.k_proj", keys, BY_ROWS, "key", num_copies)
    yield weight("attention.wv", "self_attn.v_proj", keys, BY_ROWS, None, num_copies)
    yield weight("attention.wo", "self_attn.o_proj", (dim, dim), BY_COLUMNS)
    yield weight("feed_forward.w1", "mlp.gate_proj", (wide, dim), BY_ROWS)
    yield weight("feed_forward.w2", "mlp.down_proj", (dim, wide), BY_COLUMNS)
    yield weight("feed_forward.w3", "mlp.up_proj", (wide, dim), BY_ROWS)
    yield weight("attention_norm", "input_layernorm", (dim,), REPEATED)
    yield weight("ffn_norm", "post_attention_layernorm", (dim,), REPEATED)


def meta_to_hf_rows(matrix: Tensor, num_heads: int) -> Tensor:
    """Rows (pair, part) of every head -> (part, pair): Meta's order to Hugging Face's.

    Args:
        matrix: query or key projection, (heads * head_dim, dim).
        num_heads: heads in its rows.
    """
    rows, dim = matrix.shape
    pairs = matrix.reshape(num_heads, rows // num_heads // 2, 2, dim)
    return pairs.transpose(1, 2).reshape(rows, dim)


def hf_to_meta_rows(matrix: Tensor, num_heads: int) -> Tensor:
    """The inverse of `meta_to_hf_rows`."""
    rows, dim = matrix.shape
    halves = matrix.reshape(num_heads, 2, rows // num_heads // 2, dim)
    return halves.transpose(1, 2).reshape(rows, dim)


def num_rotated_heads(weight: Weight, arch: Architecture) -> int:
    """How many heads the rows of a rotated weight belong to."""
    return arch.n_heads if weight.rotated == "query" else arch.n_kv_heads


def join(weight: Weight, parts: list[Tensor]) -> Tensor:
    """The whole weight from its parts in shard order (a view, where there is only one)."""
    import torch

    if weight.split is None:
        return parts[0]
    kept = parts[:: weight.num_copies]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=weight.split)


def cut(weight: Weight, whole: Tensor, num_shards: int, shard: int) -> Tensor:
    """What one shard holds of a weight, as a view: the inverse of `join`."""
    if weight.split is None:
        return whole
    parts = whole.chunk(num_shards // weight.num_copies, dim=weight.split)
    return parts[shard // weight.num_copies]
