"""Attention for packed documents: each document attends to itself alone, at its own cost.

A micro-batch is one row that holds many documents end to end. Instead of one (tokens, tokens)
mask over the row, each document is a causal attention of its own: no mask is built, no work is
done between documents, and a leak is impossible by construction. Without `document_lengths`
(padded generation, foreign callers) the function is transformers' own sdpa attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finetune.fast import gpu_attention
from finetune.fast.beginnings import Tree, paths_of
from finetune.fast.cpu_attention import LONGEST, attend
from finetune.fast.place import on_cpu

DOCUMENT_ATTENTION = "plumbtune_documents"


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_lengths: Sequence[int] | None = None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed row.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head_dim).
        key: (1, kv_heads, tokens, head_dim).
        value: (1, kv_heads, tokens, head_dim).
        attention_mask: ignored where `document_lengths` is given.
        dropout: probability, 0 outside training.
        scaling: factor of the scores; None is 1/sqrt(head_dim).
        document_lengths: tokens of each document in row order; their sum is `tokens`.
        tree: where documents share their beginnings; then `tokens` here are its nodes.

    Returns:
        (1, tokens, heads, head_dim), and None for the attention weights.
    """
    if document_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert query.shape[0] == 1, "packed documents lie in one row"
    if tree is None:
        assert sum(document_lengths) == key.shape[2], "document_lengths do not fill the row"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _goes_as_products(query, document_lengths, dropout):
        paths = paths_of(document_lengths, tree)
        q, k, v = (tensor.squeeze(0) for tensor in (query, key, value))
        return attend(q, k, v, paths, scale).unsqueeze(0), None
    dtype = query.dtype
    if on_cpu(query) and dtype != torch.float64:
        # torch's CPU kernel is several times slower in bfloat16 than in float32 on short
        # documents, and less exact.
        query, key, value = query.float(), key.float(), value.float()
    elif dtype != value.dtype:  # under autocast the rotation leaves float32
        dtype = value.dtype
        query, key = query.to(dtype), key.to(dtype)
    one_by_one = functools.partial(
        _one_by_one, lengths=list(document_lengths), tree=tree, dropout=dropout, scale=scale
    )
    with torch.autocast(query.device.type, enabled=False):
        if torch.is_grad_enabled() and gpu_attention.can_attend(query, dropout):
            paths = paths_of(document_lengths, tree)
            together = functools.partial(gpu_attention.attend, paths=paths, scaling=scale)
            gpu_attention.prove_once(together, one_by_one, (query, key, value), paths)
            return together(query, key, value).to(dtype), None
        return one_by_one(query, key, value).to(dtype), None


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    lengths: list[int],
    tree: Tree | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """By torch's kernel, a call for each document."""
    grouped = key.shape[1] != query.shape[1]
    if tree is None:
        documents = _whole_documents(query, key, value, lengths)
    else:
        documents = _documents_of(query, key, value, tree)
    parts = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        for q, k, v, mask in documents
    ]
    rows = [part.transpose(1, 2) for part in parts]  # as the kernel has them in memory
    if tree is not None:  # a document's own nodes are its last ones
        rows = [row[:, -b.own :] for row, b in zip(rows, tree.branches, strict=True)]
    return torch.cat(rows, dim=1)


def _goes_as_products(query: torch.Tensor, lengths: Sequence[int], dropout: float) -> bool:
    """Whether `cpu_attention` is the faster one; evaluation stays with torch's own."""
    short = max(lengths) <= LONGEST
    return short and on_cpu(query) and dropout == 0 and torch.is_grad_enabled()


# Query, key and value of a document, and which of its keys a query sees; None where all before it.
_Document = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def _whole_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> list[_Document]:
    split = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    return [(q, k, v, None) for q, k, v in zip(*split, strict=True)]


def _documents_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: Tree
) -> list[_Document]:
    own = query.split([branch.own for branch in tree.branches], dim=2)
    queries, keys, values = (tensor.split(tree.pieces, dim=2) for tensor in (query, key, value))
    documents = []
    for nodes, branch in zip(own, tree.branches, strict=True):
        k, v = (_joined(pieces, branch.pieces) for pieces in (keys, values))
        q = nodes if branch.looks_at is not None else _joined(queries, branch.pieces)
        documents.append((q, k, v, branch.looks_at))
    return documents


def _joined(pieces: Sequence[torch.Tensor], chosen: Sequence[int]) -> torch.Tensor:
    if len(chosen) == 1:
        return pieces[chosen[0]]
    # of (heads, tokens) in memory as (tokens, heads), like the pieces
    return torch.cat([pieces[n].transpose(1, 2) for n in chosen], dim=1).transpose(1, 2)


def no_mask(device: torch.device) -> torch.Tensor:
    """A (1, 1, 1, 1) stand-in that keeps transformers from building a (tokens, tokens) mask.

    A 4-D mask is passed through unchanged by `create_causal_mask`; `document_attention` ignores
    it. Without it transformers would derive a dense mask from the reset position ids.
    """
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def document_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """(1, 1, tokens, tokens), true where a token may look: the dense twin of `document_lengths`."""
    document = torch.repeat_interleave(torch.tensor(list(lengths), device=device))
    return (document.unsqueeze(0) == document.unsqueeze(1)).tril()[None, None]


def register() -> str:
    """Makes the attention known to transformers; returns its name for `attn_implementation`."""
    AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
    AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)
    return DOCUMENT_ATTENTION
