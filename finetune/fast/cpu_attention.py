"""Causal attention of short documents on a CPU, as the batched matrix products it consists of.

torch's kernel for CPUs goes through keys and queries in small tiles, for every document anew. Of
documents that are short the scores of a block of queries fit a cache as they are:

    P = softmax(s Q K' + mask)      O = P V
    dV = P' dO      dS = P ∘ (dO V' - rowsum(P ∘ dO V'))      dQ = s dS K      dK = s dS' Q

One function for a row of documents. Queries, keys and values are kept, and P of documents so short
that it has no more numbers than these; of others, P is made again.

Source: FlashAttention (arXiv 2205.14135), appendix B.4, without its tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from finetune.fast.beginnings import Path, are_alone

LONGEST = 1024  # tokens; torch's kernel is as fast there, and faster from 2,048
_QUERIES = 96  # at once


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: Sequence[Path],
    scaling: float,
) -> torch.Tensor:
    """Causal attention of each document.

    Args:
        query: (heads, tokens, head_dim).
        key: (kv_heads, tokens, head_dim).
        value: (kv_heads, tokens, head_dim).
        paths: one with every token of the row as its own.
        scaling: factor of the scores.

    Returns:
        (tokens, heads, head_dim) in the query's type; products are in float32, or float64.
    """
    with torch.autocast(query.device.type, enabled=False):
        result: torch.Tensor = _Documents.apply(query, key, value, paths, scaling)
    return result


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        paths: Sequence[Path],
        scaling: float,
    ) -> torch.Tensor:
        inputs, kept = (query, key, value), []
        heads, tokens, width = query.shape
        result = query.new_empty(tokens, heads, width)
        query, key, value = (_wide(t) for t in inputs)
        hides, short = _hides(query, paths), _longest_kept(*inputs[:2])
        asking = (_own(t, paths) for t in (query, result.transpose(0, 1)))
        seen_by = (_seen(t, paths, heads) for t in (key, value))
        for q, out, k, v in zip(*asking, *seen_by, strict=True):
            for asks, seen in _blocks(q, k):
                p = _probabilities(q[:, asks], k[:, :seen], hides, scaling)
                out[:, asks] = torch.bmm(p, v[:, :seen])
                if k.shape[1] <= short:
                    kept.append(p)
        ctx.save_for_backward(*inputs, *kept)
        ctx.paths, ctx.scaling = paths, scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads, paths, scaling = query.shape[0], ctx.paths, ctx.scaling
        alone = are_alone(paths)
        probabilities, short = iter(kept), _longest_kept(query, key)
        dquery = torch.empty_like(grad, dtype=query.dtype).transpose(0, 1)
        dkey, dvalue = (_gradient_of(t, alone) for t in (key, value))
        types = key.dtype, value.dtype
        query, key, value, grad = (_wide(t) for t in (query, key, value, grad.transpose(0, 1)))
        hides = _hides(query, paths)
        asking = (_own(t, paths) for t in (query, grad, dquery))
        seen_by = (_seen(t, paths, heads) for t in (key, value))
        with torch.autocast(grad.device.type, enabled=False):
            for path, q, g, dq, k, v in zip(paths, *asking, *seen_by, strict=True):
                dk = dv = None
                for asks, seen in _blocks(q, k):
                    ask, see, given = q[:, asks], k[:, :seen], g[:, asks]
                    if k.shape[1] <= short:
                        p = next(probabilities)
                    else:
                        p = _probabilities(ask, see, hides, scaling)
                    dp = torch.bmm(given, v[:, :seen].transpose(1, 2))
                    ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                    dq[:, asks] = torch.bmm(ds, see).mul_(scaling)
                    dk = _sum(torch.bmm(ds.transpose(1, 2), ask), dk)
                    dv = _sum(torch.bmm(p.transpose(1, 2), given), dv)
                assert dk is not None and dv is not None  # a path has tokens of its own
                _give(dkey, dk.mul_(scaling), path, alone)
                _give(dvalue, dv, path, alone)
        return dquery, dkey.to(types[0]), dvalue.to(types[1]), None, None


def _own(tensor: torch.Tensor, paths: Sequence[Path]) -> Sequence[torch.Tensor]:
    """(heads, own, head_dim) of each path, of (heads, tokens, head_dim)."""
    return tensor.split([path.own for path in paths], 1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """(heads, tokens, head_dim) in the type of the products."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _seen(tensor: torch.Tensor, paths: Sequence[Path], heads: int) -> Iterator[torch.Tensor]:
    """Keys or values that each path looks at, one by one: (heads, seen, head_dim), each head for
    its queries'."""
    repeats = heads // tensor.shape[0]
    for path in paths:
        parts = [tensor[:, start:stop] for start, stop in path.ranges]
        seen = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        yield seen if repeats == 1 else seen.repeat_interleave(repeats, 0)


def _longest_kept(query: torch.Tensor, key: torch.Tensor) -> int:
    """Tokens of a document whose probabilities are as many as its queries, keys and values."""
    heads, _, width = query.shape
    return width * (heads + 2 * key.shape[0]) // heads


def _hides(query: torch.Tensor, paths: Sequence[Path]) -> torch.Tensor:
    """(queries, keys) of the largest block, what is added to scores: none sees a later key."""
    longest = max(sum(stop - start for start, stop in path.ranges) for path in paths)
    queries = min(_QUERIES, longest)
    return query.new_full((queries, longest), -torch.inf).triu_(1 + longest - queries)


def _blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """Blocks of a document's queries from the last one, and how many keys each sees.

    Args:
        q: (heads, own, head_dim).
        k: (heads, tokens, head_dim): those before, and its own.
    """
    own, before = q.shape[1], k.shape[1] - q.shape[1]
    num_blocks = -(-own // _QUERIES)
    edges = [own * n // num_blocks for n in range(num_blocks + 1)]
    for first, last in reversed(list(itertools.pairwise(edges))):
        yield slice(first, last), before + last


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, hides: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(heads, queries, keys) of a block and all the keys that its last query sees."""
    queries, keys = hides.shape
    hidden = hides[queries - q.shape[1] :, keys - k.shape[1] :]
    return torch.softmax(torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scaling), -1)


def _sum(part: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    """Of keys' gradients, block by block: earlier queries see fewer keys."""
    if total is None:
        return part
    total[:, : part.shape[1]] += part
    return total


def _gradient_of(tensor: torch.Tensor, alone: bool) -> torch.Tensor:
    """Room for it: sums, in a wide type, where documents look at each other."""
    heads, tokens, width = tensor.shape
    if alone:
        return tensor.new_empty(tokens, heads, width).transpose(0, 1)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.new_zeros(tokens, heads, width, dtype=dtype).transpose(0, 1)


def _give(total: torch.Tensor, part: torch.Tensor, path: Path, alone: bool) -> None:
    """A document's gradient of keys or values to the tokens it looks at."""
    heads = total.shape[0]
    if part.shape[0] != heads:
        part = part.unflatten(0, (heads, -1)).sum(1)
    begin = 0
    for start, stop in path.ranges:
        there, here = total[:, start:stop], part[:, begin : begin + stop - start]
        there.copy_(here) if alone else there.add_(here)
        begin += stop - start
