"""Attention as products against a formula in float64, against differences, and in memory."""

from __future__ import annotations

import pytest
import torch
from tolerances import FAST_BFLOAT16, FAST_FLOAT32, FAST_FLOAT64

from finetune.fast import attention, cpu_attention
from finetune.fast.attention import document_attention
from finetune.fast.beginnings import Path, paths_of, tree_of
from finetune.fast.cpu_attention import LONGEST, attend
from finetune.fast.place import as_on_gpu

WIDTH = 8
TYPES = [
    (torch.float64, FAST_FLOAT64),
    (torch.float32, FAST_FLOAT32),
    (torch.bfloat16, FAST_BFLOAT16),
]
# documents of a row: with sizes around a block of queries; a tree with a beginning in two pieces
ALONE = [Path([(0, 95)], 95), Path([(95, 96)], 1), Path([(96, 289)], 193), Path([(289, 386)], 97)]
SHARED = [
    Path([(0, 110)], 110),
    Path([(0, 40), (110, 120)], 10),
    Path([(0, 40), (110, 115), (120, 220)], 100),
    Path([(0, 221)], 1),
]


def row(tokens: int, heads: int, kv_heads: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Queries, keys and values in memory as a projection makes them: tokens, then heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, n, WIDTH) for n in (heads, kv_heads, kv_heads)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [t.transpose(0, 1).requires_grad_() for t in made]


def by_formula(q, k, v, paths, scaling) -> torch.Tensor:
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    found = torch.zeros(q.shape[1], len(q), WIDTH, dtype=q.dtype)
    for path in paths:
        places = torch.cat([torch.arange(*edges) for edges in path.ranges])
        own = places[-path.own :]
        scores = scaling * q[:, own] @ k[:, places].transpose(1, 2)
        seen = torch.arange(len(places)) <= torch.arange(len(places))[-path.own :, None]
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        found = found.index_copy(0, own, (p @ v[:, places]).transpose(0, 1))
    return found


def values_and_gradients(way, tensors, paths, scaling) -> list[torch.Tensor]:
    out = way(*tensors, paths, scaling)
    factors = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [out, *torch.autograd.grad((out.double() * factors).sum(), tensors)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("paths", [ALONE, SHARED], ids=["alone", "shared"])
@pytest.mark.parametrize(("dtype", "limit"), TYPES)
def test_values_and_gradients_are_the_formulas(heads, kv_heads, paths, dtype, limit):
    tokens = max(path.ranges[-1][1] for path in paths)
    tensors = row(tokens, heads, kv_heads, dtype)
    found = values_and_gradients(attend, tensors, paths, 0.3)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = values_and_gradients(by_formula, wide, paths, 0.3)
    assert [t.dtype for t in found] == [dtype] * 4
    for one, other in zip(found, expected, strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < limit


@pytest.mark.parametrize("queries", [1, 3, 5, 6, 100])
def test_gradients_are_the_differences_of_the_values(monkeypatch, queries):
    monkeypatch.setattr(cpu_attention, "_QUERIES", queries)
    paths = [Path([(0, 6)], 6), Path([(0, 2), (6, 7)], 1)]
    assert torch.autograd.gradcheck(lambda *t: attend(*t, paths, 0.3), row(7, 2, 1))


def test_the_beginning_of_another_document_is_looked_at_in_place():
    tree = tree_of(torch.tensor([[1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 6]]), [4, 3, 4])
    assert paths_of([4, 3, 4], tree) == [
        Path([(0, 4)], 4),
        Path([(0, 2), (4, 5)], 1),
        Path([(0, 3), (5, 6)], 1),
    ]
    assert paths_of([4, 3], None) == [Path([(0, 4)], 4), Path([(4, 7)], 3)]


def test_autocast_does_not_reach_the_products():
    tensors = row(386, 2, 1, torch.float32)
    expected = values_and_gradients(attend, tensors, ALONE, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(attend, tensors, ALONE, 0.3)
    assert all(map(torch.equal, found, expected))


def test_large_scores_are_no_overflow():
    tensors = [(t.detach() * 1e4).requires_grad_() for t in row(8, 2, 2, torch.float32)]
    found = values_and_gradients(attend, tensors, [Path([(0, 8)], 8)], 1.0)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize(
    ("change", "goes"),
    [
        ({}, True),
        ({"lengths": [LONGEST + 1, 1]}, False),
        ({"dropout": 0.1}, False),
        ({"records": False}, False),
        ({"on_gpu": True}, False),
    ],
    ids=["short", "long", "dropout", "evaluation", "gpu"],
)
def test_what_goes_as_products(monkeypatch, change, goes):
    chosen = {"lengths": [LONGEST], "dropout": 0.0, "records": True, "on_gpu": False, **change}
    tensors = [t[None] for t in row(sum(chosen["lengths"]), 1, 1, torch.float32)]
    asked = []
    monkeypatch.setattr(attention, "attend", lambda *a: asked.append(a) or attend(*a))
    with torch.set_grad_enabled(chosen["records"]), as_on_gpu(chosen["on_gpu"]):
        document_attention(
            None,
            *tensors,
            None,
            dropout=chosen["dropout"],
            document_lengths=chosen["lengths"],
        )
    assert bool(asked) is goes


@pytest.mark.parametrize("longer", [0, 1])
def test_what_is_kept(monkeypatch, longer):
    """Its inputs, and the probabilities of short documents: no more numbers than the inputs."""
    monkeypatch.setattr(cpu_attention, "_QUERIES", 10)
    short = 2 * WIDTH  # a token has four queries, two keys and two values
    tensors, kept = row(short + longer, 4, 2, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(*tensors, [Path([(0, short + longer)], short + longer)], 0.3)
    assert [t.data_ptr() for t in kept[:3]] == [t.data_ptr() for t in tensors]
    assert len(kept[3:]) == (0 if longer else -(-short // 10))
    assert sum(t.numel() for t in kept[3:]) <= sum(t.numel() for t in tensors)
