"""What documents of a row have in common at their beginning is computed once.

A causal model says the same of the same beginning: rows that begin with one template, system
message or question differ only behind it. Everything but attention works on single tokens, so a
row is laid out as the tree of its documents, each node once; attention alone sees every document
whole. Gradients of the documents add up in the nodes that they share.

    row         A B C D   A B E   A B C F          tokens
    nodes       A B C D       E         F          computed
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Tree:
    """The nodes of a row.

    Attributes:
        rows: (nodes,) a place in the row where each node stands, rising.
        node_of: (tokens,) the node of each token of the row.
        others: all other places in the row.
    """

    rows: torch.Tensor
    node_of: torch.Tensor
    others: torch.Tensor


def tree_of(input_ids: torch.Tensor, lengths: Sequence[int]) -> Tree | None:
    """The tree of a row's documents; None where no two begin alike.

    Args:
        input_ids: (1, tokens), documents end to end.
        lengths: tokens of each document.
    """
    ids = input_ids[0].cpu().numpy()
    edges = [0, *itertools.accumulate(lengths)]
    documents = [ids[start:end] for start, end in itertools.pairwise(edges)]
    # In order of their ids, as big-endian bytes have it, none shares more than with the one before.
    order = sorted(range(len(documents)), key=lambda n: documents[n].astype(">i8").tobytes())
    stands = np.arange(len(ids))
    for before, after in itertools.pairwise(order):
        num_alike = _num_alike(documents[before], documents[after])
        there, here = edges[before], edges[after]
        stands[here : here + num_alike] = stands[there : there + num_alike]
    rows, node_of = np.unique(stands, return_inverse=True)
    if len(rows) == len(ids):
        return None
    others = np.setdiff1d(np.arange(len(ids)), rows, assume_unique=True)
    return Tree(*(torch.from_numpy(a).to(input_ids.device) for a in (rows, node_of, others)))


def _num_alike(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size


def draws_dropout(module: torch.nn.Module) -> bool:
    """Whether random numbers are drawn: for fewer tokens they would be others."""
    for part in module.modules():
        probability = part.p if isinstance(part, torch.nn.Dropout) else _of_attention(part)
        if part.training and probability > 0:
            return True
    return False


def _of_attention(module: torch.nn.Module) -> float:
    return float(vars(module).get("attention_dropout", 0.0))


def spread(nodes: torch.Tensor, tree: Tree) -> torch.Tensor:
    """(1, heads, tokens, head_dim) of (1, heads, nodes, head_dim): every document whole."""
    result: torch.Tensor = _Spread.apply(nodes, tree)
    return result


def gather(tokens: torch.Tensor, tree: Tree) -> torch.Tensor:
    """(1, nodes, heads, head_dim) of (1, tokens, heads, head_dim): each node once."""
    result: torch.Tensor = _Gather.apply(tokens, tree)
    return result


class _Spread(torch.autograd.Function):
    """Rows of memory are copied whole; sums are in one order on every device."""

    @staticmethod
    def forward(ctx: Any, nodes: torch.Tensor, tree: Tree) -> torch.Tensor:
        ctx.tree = tree
        return _lines(nodes.transpose(1, 2), tree.node_of).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        tree, tokens = ctx.tree, grad.transpose(1, 2)
        nodes = _lines(tokens, tree.rows)
        # unlike `index_add_`, on a GPU too the same sum each time
        added = _lines(tokens, tree.others)[0]
        nodes[0].index_put_((tree.node_of[tree.others],), added, accumulate=True)
        return nodes.transpose(1, 2), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, tree: Tree) -> torch.Tensor:
        ctx.tree, ctx.shape = tree, tokens.shape
        return _lines(tokens, tree.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens = grad.new_zeros(ctx.shape)
        tokens[0].index_copy_(0, ctx.tree.rows, grad[0])
        return tokens, None


def _lines(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(1, chosen, heads, head_dim) of (1, all, heads, head_dim)."""
    flat = tensor[0].reshape(tensor.shape[1], -1)
    return flat.index_select(0, index).view(1, len(index), *tensor.shape[2:])
