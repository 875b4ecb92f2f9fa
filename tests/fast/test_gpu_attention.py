"""The kernel for rows of many lengths: against its twin where a GPU is, else what is asked of it.

Without a GPU the kernel is a double, written after torch's documentation of `varlen_attn`; its own
signature and shapes are torch's, on tensors without memory.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from adapted import with_adapter
from asked import Asked
from tolerances import FAST_FLOAT64, FAST_GRADIENT_FLOAT32

from finetune.errors import CannotContinue
from finetune.fast import attention as attention_module
from finetune.fast import gpu_attention
from finetune.fast.attention import document_attention
from finetune.fast.beginnings import Path, tree_of
from finetune.fast.loss import pack, token_losses

HEADS = [(8, 2), (4, 4), (6, 1)]
LENGTHS = [[5, 1, 14], [20], [1] * 20]
# the second and the third begin as the first does, the fourth as the second
ROW = [[3, 4, 5, 6, 7], [3, 4, 5, 9], [3, 4, 5, 6, 8, 8, 8], [3, 4, 5, 9, 2], [11, 3, 4]]


def double(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """`torch.nn.attention.varlen.varlen_attn` by its documentation, in plain operations."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (len(query), len(key)) == (cu_q[-1], cu_k[-1])
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    repeats, results = query.shape[1] // key.shape[1], []
    edges = zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    for (first, last), (begin, end) in edges:
        q = query[first:last].transpose(0, 1)
        k, v = (t[begin:end].transpose(0, 1).repeat_interleave(repeats, 0) for t in (key, value))
        sees = torch.ones(last - first, end - begin, dtype=torch.bool)
        sees = sees.tril(end - begin - (last - first))  # aligned at the last token of both
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)


@pytest.fixture(autouse=True)
def nothing_is_proved(monkeypatch):
    monkeypatch.setattr(gpu_attention, "_proved", set())


@pytest.fixture
def kernel(monkeypatch):
    """What stands for the kernel, on tensors of the CPU; counts its calls."""
    calls = []

    def stand_in(*args, **kwargs):
        calls.append(kwargs)
        return chosen["kernel"](*args, **kwargs)

    chosen = {"kernel": double, "calls": calls}
    monkeypatch.setattr(gpu_attention, "_kernel", lambda: stand_in)
    monkeypatch.setattr(gpu_attention, "can_attend", lambda query, dropout: True)
    monkeypatch.setattr(attention_module, "_goes_as_products", lambda *_: False)
    return chosen


def qkv(heads, kv_heads, tokens=20, dtype=torch.float64, device="cpu"):
    torch.manual_seed(3)
    shapes = [(1, tokens, n, 16) for n in (heads, kv_heads, kv_heads)]
    drawn = [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes]
    return [t.transpose(1, 2).requires_grad_() for t in drawn]


def with_gradients(inputs, weights, **kwargs):
    result, _ = document_attention(None, *inputs, None, **kwargs)
    return [result, *torch.autograd.grad((result * weights).sum(), inputs)]


def largest_difference(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_it_is_asked_for_the_attention_of_each_document(
    kernel, monkeypatch, heads, kv_heads, lengths, scaling
):
    inputs, weights = qkv(heads, kv_heads), torch.randn(1, 20, heads, 16, dtype=torch.float64)
    asked = {"document_lengths": lengths, "scaling": scaling}
    found = with_gradients(inputs, weights, **asked)
    calls = 1 if max(lengths) == 1 else 2  # the row's, and the proof's where a row can be one
    assert len(kernel["calls"]) == calls
    monkeypatch.setattr(gpu_attention, "can_attend", lambda query, dropout: False)
    expected = with_gradients(inputs, weights, **asked)
    if max(lengths) == 1:  # nothing to choose from: no gradients of q and k
        assert all(g.abs().max() < FAST_FLOAT64 for g in (*found[1:3], *expected[1:3]))
        found, expected = found[::3], expected[::3]
    assert largest_difference(found, expected) < FAST_FLOAT64
    assert len(kernel["calls"]) == calls


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("multiple", [1, 16])
def test_it_is_asked_for_documents_that_look_at_each_other(
    kernel, monkeypatch, heads, kv_heads, multiple
):
    ids = torch.tensor([list(itertools.chain(*ROW))])
    tree = tree_of(ids, [len(row) for row in ROW], multiple=multiple)
    assert tree is not None
    assert len(tree.pieces) > len(tree.branches)
    tokens = len(tree.rows)
    inputs = qkv(heads, kv_heads, tokens)
    weights = torch.randn(1, tokens, heads, 16, dtype=torch.float64)
    asked = {"document_lengths": [len(row) for row in ROW], "tree": tree}
    found = with_gradients(inputs, weights, **asked)
    monkeypatch.setattr(gpu_attention, "can_attend", lambda query, dropout: False)
    # keys that several look at pass through float32, where their gradients add up
    assert largest_difference(found, with_gradients(inputs, weights, **asked)) < 1e-6


def test_keys_that_many_look_at_are_gathered_at_once():
    """Each operation would go over the whole row: of documents x tokens no row may be."""

    def num_operations(documents):
        paths = [Path([(0, 3), (n, n + 2)], 2) for n in range(3, 3 + 2 * documents, 2)]
        key = torch.randn(3 + 2 * documents, 2, 4, dtype=torch.bfloat16, requires_grad=True)
        with Asked() as asked:
            seen, _ = gpu_attention._seen(key, key.detach(), paths)
            seen.sum().backward()
        assert seen.shape == (5 * documents, 2, 4)
        assert key.grad[0, 0, 0] == documents
        return asked.counts.total()

    assert num_operations(100) == num_operations(2)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("beginnings", [False, True])
def test_a_model_trains_alike(kernel, monkeypatch, tiny_llama, recomputed, beginnings):
    def losses_and_gradients():
        model = with_adapter(copy.deepcopy(tiny_llama()))
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        losses = token_losses(
            model, pack([(row, [True] * len(row)) for row in ROW]), beginnings=beginnings
        )
        losses.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [losses.detach(), *gradients]

    found = losses_and_gradients()
    layers = tiny_llama().config.num_hidden_layers
    assert len(kernel["calls"]) == 1 + layers * (1 + recomputed)
    monkeypatch.setattr(gpu_attention, "can_attend", lambda query, dropout: False)
    assert largest_difference(found, losses_and_gradients()) < FAST_GRADIENT_FLOAT32


@torch.no_grad()
def test_evaluation_stays_with_its_twin(kernel):
    document_attention(None, *qkv(4, 4), None, document_lengths=[5, 15])
    assert not kernel["calls"]


def sees_everything(query, key, value, *_, scale, **__):
    rows = (t.transpose(0, 1) for t in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*rows, scale=scale).transpose(0, 1)


def sees_other_documents(query, key, value, *_, scale, window_size, enable_gqa):
    edges = torch.tensor([0, len(query)], dtype=torch.int32)
    said = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
    return double(query, key, value, edges, edges, len(query), len(query), **said)


def forgets_the_scale(*args, **kwargs):
    return double(*args, **(kwargs | {"scale": 1.0}))


def loses_the_gradient_of_keys(query, key, *args, **kwargs):
    return double(query, key.detach() + 0 * key, *args, **kwargs)


def is_not_a_number(*args, **kwargs):
    return double(*args, **kwargs) * torch.nan


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (sees_everything, "values"),
        (sees_other_documents, "values"),
        (forgets_the_scale, "values"),
        (loses_the_gradient_of_keys, "gradients of k"),
        (is_not_a_number, "values"),
    ],
)
def test_nothing_trains_by_a_kernel_that_differs(kernel, wrong, what):
    kernel["kernel"] = wrong
    inputs = qkv(4, 4)
    with pytest.raises(CannotContinue, match=rf"{what} by .* fast\.attention=false"):
        document_attention(None, *inputs, None, document_lengths=[5, 1, 14])
    with pytest.raises(CannotContinue):  # nor is it believed the second time
        document_attention(None, *inputs, None, document_lengths=[5, 1, 14])


def test_a_row_that_looks_back_is_tried_by_itself(kernel):
    """The first row, whose documents stand alone, says nothing of queries fewer than the keys."""

    def counts_from_the_first_key(query, key, value, cu_q, cu_k, *args, **kwargs):
        if torch.equal(cu_q, cu_k):
            return double(query, key, value, cu_q, cu_k, *args, **kwargs)
        results = []
        edges = zip(itertools.pairwise(cu_q.tolist()), cu_k.tolist(), strict=False)
        for (first, last), begin in edges:
            q, k, v = (
                t[at : at + last - first].transpose(0, 1)
                for t, at in ((query, first), (key, begin), (value, begin))
            )
            part = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=kwargs["scale"]
            )
            results.append(part.transpose(0, 1))
        return torch.cat(results)

    kernel["kernel"] = counts_from_the_first_key
    lengths = [len(row) for row in ROW]
    tree = tree_of(torch.tensor([list(itertools.chain(*ROW))]), lengths)
    document_attention(None, *qkv(4, 4, sum(lengths)), None, document_lengths=lengths)
    with pytest.raises(CannotContinue, match="values by"):
        document_attention(
            None, *qkv(4, 4, len(tree.rows)), None, document_lengths=lengths, tree=tree
        )


def test_a_kernel_is_tried_once_for_each_kind_of_heads(kernel):
    for heads, kv_heads in [(4, 4), (4, 4), (4, 2), (4, 4)]:
        document_attention(None, *qkv(heads, kv_heads), None, document_lengths=[5, 15])
    assert len(kernel["calls"]) == 4 + 2


@pytest.mark.parametrize(
    ("change", "can"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"shape": (1, 8, 20, 256)}, True),
        ({"dtype": torch.float32}, False),
        ({"shape": (1, 8, 20, 264)}, False),
        ({"shape": (1, 8, 20, 100)}, False),
        ({"device": torch.device("cpu")}, False),
        ({"dropout": 0.1}, False),
        ({"capability": (7, 5)}, False),
        ({"hip": "6.4"}, False),
    ],
    ids=str,
)
def test_what_the_kernel_takes(monkeypatch, change, can):
    said = {
        "dtype": torch.bfloat16,
        "shape": (1, 8, 20, 128),
        "device": torch.device("cuda", 0),
        "dropout": 0.0,
        "capability": (8, 0),
        "hip": None,
    } | change
    monkeypatch.setattr(torch.version, "hip", said["hip"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: said["capability"])
    query = SimpleNamespace(dtype=said["dtype"], shape=said["shape"], device=said["device"])
    assert gpu_attention.can_attend(query, said["dropout"]) == can


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_torch_takes_what_it_is_asked(heads, kv_heads):
    """The kernel's own signature, and that of its gradient, on tensors without memory."""
    shapes = [(1, 20, n, 16) for n in (heads, kv_heads, kv_heads)]
    inputs = [
        torch.empty(s, dtype=torch.bfloat16, device="meta").transpose(1, 2).requires_grad_()
        for s in shapes
    ]
    paths = attention_module.paths_of([5, 15], None)
    result = gpu_attention.attend(*inputs, paths, 0.25)
    gradients = torch.autograd.grad(result, inputs, torch.empty_like(result))
    assert (result.shape, result.dtype) == ((1, 20, heads, 16), torch.bfloat16)
    assert [g.shape for g in gradients] == [i.shape for i in inputs]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_near_float64(heads, kv_heads, shared, dtype):
    lengths = [len(row) for row in ROW]
    ids = torch.tensor([list(itertools.chain(*ROW))], device="cuda")
    tree = tree_of(ids, lengths) if shared else None
    tokens = len(tree.rows) if tree else sum(lengths)
    inputs = qkv(heads, kv_heads, tokens, dtype, "cuda")
    weights = torch.randn(1, tokens, heads, 16, device="cuda", dtype=torch.float64)
    asked = {"document_lengths": lengths, "tree": tree}
    found = with_gradients(inputs, weights, **asked)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    assert gpu_attention._proved
    assert largest_difference(found, with_gradients(wide, weights, **asked)) < 2**-6
