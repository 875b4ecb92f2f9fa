"""Causal attention of a row's documents on a GPU: all of them in one call of torch's own kernel.

torch's `varlen_attn` (FlashAttention-2, arXiv 2307.08691) takes documents end to end, and where
each begins; queries that are fewer than the keys are the last of them. It needs no package.

It has been tried against what torch documents of it, not yet on a GPU. So for the first row of a
process, and the first whose documents look at each other, it is compared with its twin, values and
gradients, and nothing trains where they differ.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from finetune.errors import CannotContinue
from finetune.fast.beginnings import Path, are_alone

WIDEST = 256  # numbers of a head that FlashAttention takes, a multiple of 8
LARGEST_DIFFERENCE = 2**-6  # of the largest number: twice what rounding to bfloat16 leaves
_AMPERE = (8, 0)

# Of queries, keys and values, (1, heads, tokens, head_dim): (1, tokens, heads, head_dim).
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def can_attend(query: torch.Tensor, dropout: float) -> bool:
    """Whether the kernel takes such queries: two bytes a number, on an NVIDIA GPU since Ampere.

    Args:
        query: (1, heads, tokens, head_dim).
        dropout: probability.
    """
    width = query.shape[-1]
    if query.device.type != "cuda" or torch.version.hip is not None or dropout > 0:
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > WIDEST:
        return False
    return torch.cuda.get_device_capability(query.device) >= _AMPERE


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paths: Sequence[Path],
    scaling: float,
) -> torch.Tensor:
    """Causal attention of each document.

    Args:
        query: (1, heads, tokens, head_dim).
        key: (1, kv_heads, tokens, head_dim).
        value: (1, kv_heads, tokens, head_dim).
        paths: one with every token of the row as its own.
        scaling: factor of the scores.

    Returns:
        (1, tokens, heads, head_dim), in the type of all three.
    """
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    if not are_alone(paths):
        key, value = _seen(key, value, paths)
    asking = tuple(path.own for path in paths)
    seen = tuple(sum(stop - start for start, stop in path.ranges) for path in paths)
    result: torch.Tensor = _kernel()(
        query,
        key,
        value,
        _edges(asking, query.device),
        _edges(seen, query.device),
        max(asking),
        max(seen),
        scale=scaling,
        window_size=(-1, 0),  # all before it, none behind: causal
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return result.unsqueeze(0)


@functools.cache
def _kernel() -> Callable[..., Any]:
    """Imported where it is used: it takes seconds."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _seen(
    key: torch.Tensor, value: torch.Tensor, paths: Sequence[Path]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (tokens of all paths, kv_heads, head_dim); gradients of what several look at add up in
    float32. One operation each way, however many the paths are."""
    places = _places(tuple(edges for path in paths for edges in path.ranges), key.device)
    k, v = (t.float().index_select(0, places).to(t.dtype) for t in (key, value))
    return k, v


@functools.lru_cache(maxsize=8)
def _places(ranges: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """(tokens of all ranges,) of the row."""
    return torch.from_numpy(np.concatenate([np.arange(*edges) for edges in ranges])).to(device)


@functools.lru_cache(maxsize=8)  # the layers of a step ask for the same
def _edges(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(documents + 1,) where each begins, and the end."""
    edges = list(itertools.accumulate(lengths, initial=0))
    return torch.tensor(edges, dtype=torch.int32, device=device)


_proved: set[tuple[object, ...]] = set()


def prove_once(
    ours: Attention, twin: Attention, inputs: Sequence[torch.Tensor], paths: Sequence[Path]
) -> None:
    """Compares values and gradients, the first time that such a row comes by in this process.

    On random numbers, where all are of a size; those of a model may be too small to tell.

    Args:
        inputs: queries, keys and values, for their shapes.
        paths: of a row; one-token documents alone are left for the next, q and k have no gradient.

    Raises:
        CannotContinue: they differ by more than rounding does.
    """
    query, key, _ = inputs
    heads = (query.shape[1], key.shape[1], query.shape[-1])
    kind = (query.dtype, query.device, *heads, are_alone(paths))
    if kind in _proved or all(stop - start == 1 for p in paths for start, stop in p.ranges):
        return
    generator = torch.Generator(query.device).manual_seed(0)
    drawn = [_like(tensor, generator) for tensor in (*inputs, query)]
    for name, found, other in zip(
        ("values", "gradients of q", "gradients of k", "gradients of v"),
        _with_gradients(ours, drawn),
        _with_gradients(twin, drawn),
        strict=True,
    ):
        found, other = found.float(), other.float()
        largest = other.abs().max().item()
        difference = (found - other).abs().max().item()
        if not difference <= LARGEST_DIFFERENCE * largest:  # NaN is no agreement
            raise CannotContinue(
                f"fast.attention: torch's varlen attention and its attention document by document "
                f"differ on {query.device}: {name} by {difference:.2g}, allowed "
                f"{LARGEST_DIFFERENCE:.2g} of the largest, {largest:.2g}. Nothing was trained; "
                "fast.attention=false trains with a dense mask"
            )
    _proved.add(kind)


def _like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers, in memory as a projection leaves its own: (1, tokens, heads, head_dim)."""
    shape = tensor.transpose(1, 2).shape
    drawn = torch.randn(shape, generator=generator, dtype=tensor.dtype, device=tensor.device)
    return drawn.transpose(1, 2)


def _with_gradients(attention: Attention, drawn: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of queries, keys and values the result and the gradients, for the last one as its own."""
    leaves = [tensor.detach().requires_grad_() for tensor in drawn[:3]]
    # hooks of our own: those of activation checkpointing would run the layer again
    with torch.enable_grad(), saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach):
        result = attention(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, drawn[3].transpose(1, 2))]
