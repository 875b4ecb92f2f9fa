"""What documents of a row have in common at their beginning is computed once.

A causal model says the same of the same beginning: rows that begin with one template, system
message or question differ only behind it. Everything but attention works on single tokens, so a
row is laid out as the tree of its documents, each node once. A document's own nodes look at
themselves and at its beginning, which may lie in several pieces, in the nodes of other documents.

    row         A B C D   A B E   A B C F          tokens
    nodes       A B C D       E         F          computed
    pieces      A B|C|D       E         F
    the third document: F looks at the pieces A B, C, F

Where sizes are to be few, the last document goes on with fillers, which nobody reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Branch:
    """How a document lies in the nodes of its row.

    Attributes:
        own: nodes of its own, of all its tokens the last ones.
        pieces: what it looks at, the pieces' indices, from its beginning to its end.
        looks_at: (own, tokens), whether a node of its own sees a token of the document; None where
            attention without a mask over all its tokens is less work.
    """

    own: int
    pieces: list[int]
    looks_at: torch.Tensor | None


@dataclass(frozen=True)
class Tree:
    """The nodes of a row.

    Attributes:
        rows: (nodes,) a place in the row where each node stands, rising; of fillers, the last.
        node_of: (tokens,) the node of each token of the row.
        pieces: the sizes of runs of nodes of which no document has a part.
        branches: of the documents with nodes of their own, in the row's order.
    """

    rows: torch.Tensor
    node_of: torch.Tensor
    pieces: list[int]
    branches: list[Branch]


def tree_of(
    input_ids: torch.Tensor, lengths: Sequence[int], *, least: float = 0.0, multiple: int = 1
) -> Tree | None:
    """The tree of a row's documents; None where that is the row itself.

    Args:
        input_ids: (1, tokens), documents end to end.
        lengths: tokens of each document.
        least: part of the tokens that has to be shared; else none is.
        multiple: of how many nodes there are, with fillers.
    """
    ids = input_ids[0].cpu().numpy()
    edges = [0, *itertools.accumulate(lengths)]
    stands = np.arange(len(ids)) if least >= 1 else _stands(ids, edges)
    rows, node_of = np.unique(stands, return_inverse=True)
    if len(ids) - len(rows) < least * len(ids):
        stands = rows = node_of = np.arange(len(ids))
    num_fillers = -len(rows) % multiple
    if len(rows) == len(ids) and num_fillers == 0:
        return None
    paths = [node_of[start:end] for start, end in itertools.pairwise(edges)]
    own = [int((stands[a:b] == np.arange(a, b)).sum()) for a, b in itertools.pairwise(edges)]
    last = max(n for n, num_own in enumerate(own) if num_own > 0)
    paths[last] = np.append(paths[last], len(rows) + np.arange(num_fillers))
    own[last] += num_fillers
    rows = np.append(rows, np.full(num_fillers, rows[-1]))
    device = input_ids.device
    rows_there, node_of_there = (torch.from_numpy(a).to(device) for a in (rows, node_of))
    return Tree(rows_there, node_of_there, *_pieces(paths, own, len(rows), device))


def _stands(ids: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """(tokens,) the place in the row where each token's node stands."""
    documents = [ids[start:end] for start, end in itertools.pairwise(edges)]
    # In order of their ids, as big-endian bytes have it, none shares more than with the one before.
    order = sorted(range(len(documents)), key=lambda n: documents[n].astype(">i8").tobytes())
    stands = np.arange(len(ids))
    for before, after in itertools.pairwise(order):
        num_alike = _num_alike(documents[before], documents[after])
        there, here = edges[before], edges[after]
        stands[here : here + num_alike] = stands[there : there + num_alike]
    return stands


def _num_alike(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size


def _pieces(
    paths: Sequence[np.ndarray], own: Sequence[int], num_nodes: int, device: torch.device
) -> tuple[list[int], list[Branch]]:
    """Sizes of the pieces, and the branches.

    Args:
        paths: nodes of each document.
        own: how many of them are its own.
    """
    cuts = {num_nodes}
    for path in paths:
        jumps = np.flatnonzero(np.diff(path) != 1)
        cuts.update(path[[0, *(jumps + 1)]].tolist())
        cuts.update((path[[*jumps, -1]] + 1).tolist())
    starts = sorted(cuts)
    piece_at = {start: piece for piece, start in enumerate(starts)}
    branches = []
    for path, nodes in zip(paths, own, strict=True):
        if nodes == 0:
            continue
        pieces = [piece_at[node] for node in path.tolist() if node in piece_at]
        looks_at = None
        if nodes < len(path) / 2:  # a causal kernel does half of tokens x tokens
            looks_at = torch.ones(nodes, len(path), dtype=torch.bool, device=device)
            looks_at = looks_at.tril(len(path) - nodes)
        branches.append(Branch(nodes, pieces, looks_at))
    return [end - start for start, end in itertools.pairwise(starts)], branches


@dataclass(frozen=True)
class Path:
    """What a document looks at.

    Attributes:
        ranges: of the row's tokens, from the document's beginning to its end.
        own: how many of them, the last ones, are its own: these ask.
    """

    ranges: list[tuple[int, int]]
    own: int


def paths_of(lengths: Sequence[int], tree: Tree | None) -> list[Path]:
    """Of a row's documents end to end, or of the branches of a tree."""
    if tree is None:
        edges = itertools.pairwise(itertools.accumulate(lengths, initial=0))
        return [Path([edge], edge[1] - edge[0]) for edge in edges]
    pieces = list(itertools.pairwise(itertools.accumulate(tree.pieces, initial=0)))
    return [Path(_joined([pieces[n] for n in b.pieces]), b.own) for b in tree.branches]


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found = [ranges[0]]
    for start, stop in ranges[1:]:
        if found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def are_alone(paths: Sequence[Path]) -> bool:
    """Whether no document looks at another's tokens."""
    return all(len(p.ranges) == 1 and p.ranges[0][1] - p.ranges[0][0] == p.own for p in paths)


def draws_dropout(module: torch.nn.Module) -> bool:
    """Whether random numbers are drawn: for fewer tokens they would be others."""
    for part in module.modules():
        probability = part.p if isinstance(part, torch.nn.Dropout) else _of_attention(part)
        if part.training and probability > 0:
            return True
    return False


def _of_attention(module: torch.nn.Module) -> float:
    return float(vars(module).get("attention_dropout", 0.0))
