"""The tree of a row's documents, its pieces, and what is computed."""

from __future__ import annotations

import pytest
import torch
from adapted import with_adapter
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FAST_FLOAT64, FAST_GRADIENT_FLOAT32

from finetune.config import FastSection
from finetune.fast import attention, loss
from finetune.fast.beginnings import draws_dropout, tree_of
from finetune.fast.blocks import speed_up
from finetune.fast.loss import pack, token_losses

pytestmark = pytest.mark.usefixtures("library")

TRAINED = [True] * 64
DOCUMENTS = [  # a question with two answers, one of them twice; another one; a part of the first
    ([1, 20, 21, 22, 30, 31, 2], TRAINED),
    ([1, 20, 21, 22, 40, 2], TRAINED),
    ([1, 20, 25, 50, 2], TRAINED),
    ([1, 20, 21, 22, 30, 31, 2], TRAINED),
    ([1, 20], TRAINED),
    ([9, 20, 21], TRAINED),
]
DOCUMENTS = [(ids, mask[: len(ids)]) for ids, mask in DOCUMENTS]


def row_of(documents: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[token for document in documents for token in document]])


def nodes_by_dictionary(documents: list[list[int]]) -> list[tuple[int, ...]]:
    """The node of each token of the row, named by the ids that lead to it."""
    return [tuple(d[: n + 1]) for d in documents for n in range(len(d))]


def assert_pieces_are_those_of(tree, documents, expected):
    """Each document once at most, in order: its own nodes, and its whole path in pieces."""
    nodes = [expected[row] for row in tree.rows]
    pieces = torch.arange(len(nodes)).split(tree.pieces)
    seen, taken = [], 0
    for branch in tree.branches:
        path = [nodes[n] for piece in branch.pieces for n in pieces[piece]]
        ids = list(path[-1])
        assert path == nodes_by_dictionary([ids])
        assert path[-branch.own :] == nodes[taken : taken + branch.own]
        taken += branch.own
        assert (branch.looks_at is None) == (branch.own >= len(path) / 2)
        if branch.looks_at is not None:
            causal = torch.ones(len(path), len(path), dtype=torch.bool).tril()
            assert torch.equal(branch.looks_at, causal[-branch.own :])
        seen.append(ids)
    assert taken == len(nodes)
    assert all(ids in documents for ids in seen)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
def test_a_node_is_a_beginning(documents):
    expected = nodes_by_dictionary(documents)
    tree = tree_of(row_of(documents), [len(d) for d in documents])
    if tree is None:
        assert len(set(expected)) == len(expected)
        return
    assert len(tree.rows) == len(set(expected)) < len(expected)
    assert [expected[row] for row in tree.rows[tree.node_of]] == expected
    assert_pieces_are_those_of(tree, documents, expected)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12),
    st.sampled_from([1, 2, 4, 16]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_last_document_goes_on_with_fillers(documents, multiple, least):
    """Up to a multiple of nodes; else it is the tree without, or where too little is shared, the
    row."""
    row, lengths = row_of(documents), [len(d) for d in documents]
    shared = tree_of(row, lengths)
    if shared is not None and len(row[0]) - len(shared.rows) < least * len(row[0]):
        shared = None
    nodes = torch.arange(len(row[0])) if shared is None else shared.rows
    tree = tree_of(row, lengths, least=least, multiple=multiple)
    if tree is None:
        assert shared is None
        assert len(row[0]) % multiple == 0
        return
    num_fillers = len(tree.rows) - len(nodes)
    assert num_fillers == -len(nodes) % multiple
    assert torch.equal(tree.rows[: len(nodes)], nodes)
    assert (tree.rows[len(nodes) :] == nodes[-1]).all()
    assert torch.equal(tree.node_of, nodes if shared is None else shared.node_of)
    assert sum(tree.pieces) == sum(branch.own for branch in tree.branches) == len(tree.rows)
    for branch in tree.branches:
        num_tokens = sum(tree.pieces[n] for n in branch.pieces)
        assert branch.looks_at is None or branch.looks_at.shape == (branch.own, num_tokens)
    if shared is not None:
        assert [b.own for b in tree.branches[:-1]] == [b.own for b in shared.branches[:-1]]


@pytest.mark.parametrize("token", [0, 127_999, 2**31 - 1])
def test_ids_of_any_size(token):
    tree = tree_of(torch.tensor([[token, 5, token, 256]]), [2, 2])
    assert tree is not None
    assert tree.node_of[0] == tree.node_of[2]


def losses_and_gradients(model, documents, **how):
    model.zero_grad()
    torch.manual_seed(1)
    losses = token_losses(model, pack(documents), **how)
    (losses * torch.linspace(0.5, 1.5, len(losses))).sum().backward()
    named = model.named_parameters()
    return {"": losses.detach(), **{n: p.grad.clone() for n, p in named if p.grad is not None}}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, FAST_GRADIENT_FLOAT32), (torch.float64, FAST_FLOAT64)],
)
@pytest.mark.parametrize("preset", ["llama3-8b", "llama2-7b", "llama3.2-1b"])
@pytest.mark.parametrize("longest", [3, 1024], ids=["kernel", "products"])
@pytest.mark.parametrize("fillers", [False, True])
def test_as_documents_by_themselves(
    tiny_llama, monkeypatch, preset, dtype, tolerance, longest, fillers
):
    """Losses in the row's order, each with a weight of its own, and every gradient."""
    model = with_adapter(tiny_llama(preset)).to(dtype)
    speed_up(model, FastSection())  # whose norms stay in float64, which transformers' do not
    with monkeypatch.context() as patched:
        patched.setattr(attention, "LONGEST", longest)
        patched.setattr(loss, "makes_kernels", lambda *_: fillers)
        found = losses_and_gradients(model, DOCUMENTS, beginnings=True)
    model.zero_grad()
    losses = torch.cat([token_losses(model, pack([document])) for document in DOCUMENTS])
    (losses * torch.linspace(0.5, 1.5, len(losses))).sum().backward()
    assert torch.allclose(found.pop(""), losses.detach(), rtol=tolerance, atol=tolerance)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            difference = (found[name] - parameter.grad).norm() / parameter.grad.norm()
            assert difference < tolerance, name


def num_computed(model, documents, **how) -> int:
    """Tokens that reach the first layer."""
    rows = []
    layer = model.base_model.model.model.layers[0]
    with_hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    losses_and_gradients(model, documents, **how)
    with_hook.remove()
    return rows[0]


def test_each_node_is_computed_once(tiny_llama, library):
    """Where each size has kernels of its own, with fillers up to a multiple of 16."""
    nodes = len(set(nodes_by_dictionary([ids for ids, _ in DOCUMENTS])))
    model, fills = with_adapter(tiny_llama()), library == "onednn"
    assert nodes == 15
    assert num_computed(model, DOCUMENTS, beginnings=True) == (16 if fills else 15)
    assert num_computed(model, DOCUMENTS) == (32 if fills else 30)
    assert num_computed(model, DOCUMENTS, products=False) == 30
    assert num_computed(model, DOCUMENTS, beginnings=True, dense=True) == 30


@pytest.mark.parametrize(
    ("num_shared", "num_nodes"),
    [(8, {"mkl": 130, "onednn": 144}), (9, {"mkl": 121, "onednn": 128})],
)
def test_little_is_not_worth_a_layout_of_its_own(tiny_llama, library, num_shared, num_nodes):
    """Of 130 tokens, less than a sixteenth."""
    ids = [*range(10, 10 + num_shared)]
    documents = [(ids + [n] * (65 - num_shared), [True] * 65) for n in (30, 40)]
    found = num_computed(with_adapter(tiny_llama()), documents, beginnings=True)
    assert found == num_nodes[library]


def test_where_dropout_is_drawn_every_token_draws_its_own(tiny_llama, library):
    model = with_adapter(tiny_llama(), lora_dropout=0.3)
    assert draws_dropout(model)
    assert num_computed(model, DOCUMENTS, beginnings=True) == 30
    assert not draws_dropout(model.eval())
    assert num_computed(model, DOCUMENTS, beginnings=True) == (16 if library == "onednn" else 15)


def test_dropout_of_attention_is_seen(tiny_llama):
    model = with_adapter(tiny_llama())
    assert not draws_dropout(model)
    model.base_model.model.model.layers[1].self_attn.attention_dropout = 0.1
    assert draws_dropout(model)
