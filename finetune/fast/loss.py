"""The next-token loss: the head runs only where a token is supervised; sums, never means.

    loss = sum over supervised t of -log p(x_t | x_<t) / (supervised tokens of the whole step)

The division by the step's token count (all micro-batches, all ranks) is the caller's: dividing
each micro-batch by its own count is the gradient-accumulation bug.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.fast.attention import document_mask, no_mask
from finetune.fast.beginnings import Tree, draws_dropout, tree_of
from finetune.fast.head import answering_head, head_losses, plain_losses
from finetune.fast.place import on_cpu
from finetune.fast.products import makes_kernels

IGNORED = -100
ROUND = 16  # tokens: a cache line of them
LEAST_SHARED = 1 / 16  # of a row, to be worth copied keys, and a size of its own


@dataclass(frozen=True)
class Packed:
    """One row of documents laid end to end.

    Attributes:
        input_ids: (1, tokens).
        position_ids: (1, tokens), counted from 0 within each document.
        labels: (1, tokens), the id itself where it is trained, else -100; not shifted. The
            first token of a document is never trained: nothing of its own comes before it.
        document_lengths: tokens of each document.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    document_lengths: list[int]


def pack(documents: Sequence[tuple[Any, Any]]) -> Packed:
    """Lays documents, each `(ids, train mask)`, end to end in one row."""
    ids = np.concatenate([np.asarray(document, np.int64) for document, _ in documents])
    trained = np.concatenate([np.asarray(mask, np.bool_) for _, mask in documents])
    lengths = [len(document) for document, _ in documents]
    if lengths != [len(mask) for _, mask in documents]:
        raise ValueError("a document has a mask for each of its ids, no more and no less")
    positions = np.concatenate([np.arange(length) for length in lengths])
    labels = np.where(trained & (positions > 0), ids, IGNORED)
    rows = [torch.from_numpy(row).unsqueeze(0) for row in (ids, positions, labels)]
    return Packed(rows[0], rows[1], rows[2], lengths)


def to_device(packed: Packed, device: torch.device) -> Packed:
    """Moves the tensors of a packed row."""
    return Packed(
        packed.input_ids.to(device),
        packed.position_ids.to(device),
        packed.labels.to(device),
        packed.document_lengths,
    )


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a supervised token is predicted from, and what it is: the one place that shifts.

    Args:
        labels: (1, tokens), unshifted.

    Returns:
        positions (supervised,): the index before each trained token; targets (supervised,).
    """
    targets = labels[0, 1:]
    positions = torch.nonzero(targets != IGNORED).flatten()
    return positions, targets[positions]


@dataclass(frozen=True)
class Layout:
    """What of a packed row is computed.

    Attributes:
        num_tokens: that go through the layers, fillers among them.
        positions: (supervised,) of these, where each supervised token is predicted from.
        read: (…,) the same places, each once, rising.
        tree: where that is not the row itself.
    """

    num_tokens: int
    positions: torch.Tensor
    read: torch.Tensor
    tree: Tree | None = None


def may_be_laid_out(model: torch.nn.Module, dense: bool) -> bool:
    """Whether a row may go through as a tree: not where dropout is drawn, nor under a mask over the
    row, nor behind vectors."""
    return not (dense or has_soft_prompt(model) or draws_dropout(model))


def lay_out(packed: Packed, beginnings: bool = False, few_sizes: bool = False) -> Layout:
    """The row as it is, or as the tree of its documents, where `may_be_laid_out`.

    Args:
        beginnings: documents share theirs.
        few_sizes: only sizes that come back, so that kernels for them are there.
    """
    positions, _ = supervised(packed.labels)
    tree = None
    if beginnings or few_sizes:
        tree = tree_of(
            packed.input_ids,
            packed.document_lengths,
            least=LEAST_SHARED if beginnings else 1.0,
            multiple=ROUND if few_sizes else 1,
        )
    if tree is None:
        return Layout(packed.input_ids.shape[1], positions, positions)
    positions = tree.node_of[positions]
    return Layout(len(tree.rows), positions, positions.unique(), tree)


def token_losses(
    model: torch.nn.Module,
    packed: Packed,
    *,
    in_blocks: bool = True,
    dense: bool = False,
    beginnings: bool = False,
    products: bool = True,
) -> torch.Tensor:
    """The loss of every supervised token of a packed row.

    The model itself is called, not its parts: under DDP that is what synchronises gradients.

    Args:
        model: a causal Llama that uses `document_attention`, possibly wrapped (PEFT, DDP).
        in_blocks: never hold the logits of all tokens; where the head is a plain linear layer.
        dense: attention with a mask over the row, the twin of `document_attention`.
        beginnings: what documents have in common at their beginning is computed once; not where
            dropout is drawn, or attention is dense.
        products: those of the head by the faster library, and all of sizes that suit it.

    Returns:
        (supervised,) losses in nats, float32; empty, with a graph, where nothing is supervised.
    """
    rows = rows_for(model, packed)
    dtype: Any = getattr(model, "module", model).dtype
    free = may_be_laid_out(model, dense)
    few_sizes = free and on_cpu(packed.input_ids) and makes_kernels(products, dtype)
    layouts = [lay_out(row, free and beginnings, few_sizes) for row in rows]
    pairs = zip(rows, layouts, strict=True)
    return torch.cat([_losses(model, *pair, in_blocks, dense, products) for pair in pairs])


def _losses(
    model: torch.nn.Module,
    packed: Packed,
    layout: Layout,
    in_blocks: bool,
    dense: bool,
    products: bool,
) -> torch.Tensor:
    _, targets = supervised(packed.labels)

    def answer(head: Any, logits_of: Any, hidden: torch.Tensor) -> torch.Tensor:
        kind: type = type(head)
        if in_blocks and kind is torch.nn.Linear and head.bias is None:
            return head_losses(hidden[0], head.weight, targets, products).unsqueeze(0)
        return plain_losses(logits_of(hidden)[0], targets).unsqueeze(0)

    with answering_head(model, answer):
        return supervised_logits(model, packed, dense, layout)


def rows_for(model: torch.nn.Module, packed: Packed) -> list[Packed]:
    """What a model takes at a time: the row, or each document where vectors go before each."""
    return documents_of(packed) if has_soft_prompt(model) else [packed]


def supervised_logits(
    model: torch.nn.Module, packed: Packed, dense: bool = False, layout: Layout | None = None
) -> torch.Tensor:
    """(supervised, vocab): what the model says before each supervised token of a packed row.

    Args:
        packed: one of `rows_for`.
        dense: with a mask over the row.
        layout: of the row, plain with `dense`; None is plain.
    """
    if has_soft_prompt(model):
        return _behind_vectors(model, packed)
    layout, lengths = layout or lay_out(packed), packed.document_lengths
    ids, places, tree = packed.input_ids, packed.position_ids, layout.tree
    if tree is not None:
        ids, places = ids[:, tree.rows], places[:, tree.rows]
    return model(
        input_ids=ids,
        position_ids=places,
        attention_mask=document_mask(lengths, ids.device) if dense else no_mask(ids.device),
        document_lengths=None if dense else lengths,
        tree=tree,
        logits_to_keep=layout.positions,
        read=layout.read,  # the last layer needs no more of its tokens
        use_cache=False,
    ).logits[0]


def has_soft_prompt(model: torch.nn.Module) -> bool:
    """Whether PEFT puts trained vectors before the text (prompt or prefix tuning)."""
    config = getattr(getattr(model, "module", model), "active_peft_config", None)
    return bool(config is not None and config.is_prompt_learning)


def documents_of(packed: Packed) -> list[Packed]:
    """Each document of a packed row as a row of its own."""
    return cut(packed, len(packed.document_lengths))


def cut(packed: Packed, num_pieces: int) -> list[Packed]:
    """A packed row as rows of about as many documents each; none is cut itself."""
    lengths = packed.document_lengths
    edges = [n * len(lengths) // num_pieces for n in range(num_pieces + 1)]
    groups = [lengths[a:b] for a, b in itertools.pairwise(edges) if a < b]
    sizes = [sum(group) for group in groups]
    rows = (packed.input_ids, packed.position_ids, packed.labels)
    pieces = zip(*(row.split(sizes, dim=1) for row in rows), groups, strict=True)
    return [Packed(*piece) for piece in pieces]


def _behind_vectors(model: torch.nn.Module, document: Packed) -> torch.Tensor:
    """The logits of one document behind its trained vectors, as PEFT's own forward pass has them;
    each document needs them before it, and counts its positions after them."""
    positions, _ = supervised(document.labels)
    config: Any = getattr(model, "module", model).active_peft_config
    if config.peft_type != "PREFIX_TUNING":  # whose vectors are in the cache, not in the row
        positions = positions + config.num_virtual_tokens
    return model(
        input_ids=document.input_ids,
        attention_mask=torch.ones_like(document.input_ids),
        logits_to_keep=positions,
        use_cache=False,
    ).logits[0]
