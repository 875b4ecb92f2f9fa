"""Packed documents against each document alone, other attentions, and a formula in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import ATTENTION_FLOAT32, PACKED_BFLOAT16, PACKED_FLOAT32
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finetune.fast import attention as attention_module
from finetune.fast.attention import document_attention, no_mask, register
from finetune.fast.loss import Packed, pack

PRESETS = ("llama3-8b", "llama2-7b", "llama3.1-8b", "llama3.2-1b", "llama2-70b")
LENGTHS = ([7, 1, 33, 20, 3], [1, 1, 1], [64], [2, 50])


@pytest.fixture(autouse=True, params=["products", "kernel"])
def way(request, monkeypatch) -> str:
    """Each test by both ways that there are on a CPU, with and without gradients."""
    monkeypatch.setattr(
        attention_module,
        "_goes_as_products",
        lambda query, lengths, dropout: request.param == "products",
    )
    return request.param


def ids_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1024, (n,), generator=generator).tolist() for n in lengths]


def packed_of(documents: list[list[int]]) -> Packed:
    return pack([(ids, [True] * len(ids)) for ids in documents])


def packed_logits(model: LlamaForCausalLM, packed: Packed, lengths: list[int] | None = None):
    return model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=no_mask(packed.input_ids.device),
        document_lengths=packed.document_lengths if lengths is None else lengths,
        use_cache=False,
    ).logits[0]


def logits_alone(model: LlamaForCausalLM, documents: list[list[int]]) -> torch.Tensor:
    """Plain calls, a document at a time, as any user of transformers makes them."""
    return torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in documents])


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert one.shape == other.shape
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_packed_row_has_the_logits_of_each_document_alone(tiny_llama, preset, lengths, attention):
    documents = ids_of(lengths)
    ours = packed_logits(tiny_llama(preset), packed_of(documents))
    assert difference(ours, logits_alone(tiny_llama(preset, attention), documents)) < PACKED_FLOAT32


@torch.no_grad()
def test_a_leak_would_be_seen(tiny_llama):
    """Boundaries lost, moved or read in another order: far beyond the tolerance."""
    documents = ids_of([7, 4, 20, 7])
    model, alone = tiny_llama(), logits_alone(tiny_llama("llama3-8b", "eager"), documents)
    for lengths in ([38], [7, 24, 7], [11, 20, 7], [7, 5, 19, 7], [7, 20, 4, 7]):
        assert difference(packed_logits(model, packed_of(documents), lengths), alone) > 0.1


@pytest.mark.parametrize("changed", [0, 1, 2])
@torch.no_grad()
def test_a_changed_document_moves_no_other(tiny_llama, changed):
    documents = ids_of([9, 17, 12])
    ends = [0, 9, 26, 38]
    others = ids_of([9, 17, 12], seed=1)
    moved = [others[n] if n == changed else ids for n, ids in enumerate(documents)]
    before, after = (packed_logits(tiny_llama(), packed_of(d)) for d in (documents, moved))
    for n in range(3):
        span = slice(ends[n], ends[n + 1])
        assert torch.equal(before[span], after[span]) == (n != changed)


def test_no_gradient_flows_from_one_document_to_another(tiny_llama):
    model, packed = tiny_llama(), packed_of(ids_of([9, 17, 12]))
    embedded = model.get_input_embeddings()(packed.input_ids).detach().requires_grad_()
    logits = model(
        inputs_embeds=embedded,
        position_ids=packed.position_ids,
        attention_mask=no_mask(embedded.device),
        document_lengths=packed.document_lengths,
        use_cache=False,
    ).logits[0]
    (gradient,) = torch.autograd.grad(logits[9:26].square().sum(), embedded)
    norms = gradient[0].norm(dim=-1)
    assert (norms[:9] == 0).all() and (norms[26:] == 0).all()
    assert (norms[9:26] > 0).all()


def test_within_a_document_no_token_sees_a_later_one(tiny_llama):
    documents = ids_of([9, 17])
    changed = [documents[0], [*documents[1][:10], 5, *documents[1][11:]]]
    with torch.no_grad():
        before, after = (packed_logits(tiny_llama(), packed_of(d)) for d in (documents, changed))
    assert documents[1][10] != 5
    same = (before == after).all(dim=-1)
    assert same[:19].all() and not same[19:].any()


def gradients(model: LlamaForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("preset", ["llama3-8b", "llama2-7b", "llama3.2-1b"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_each_document_alone(tiny_llama, preset, checkpointing):
    documents = ids_of([7, 1, 33, 20, 3])
    ours, eager = (copy.deepcopy(tiny_llama(preset, a)).train() for a in (None, "eager"))
    if checkpointing:
        ours.activation_checkpointing_enable({"use_reentrant": False})
    weights = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    packed = gradients(ours, (packed_logits(ours, packed_of(documents)) * weights).sum())
    alone = gradients(eager, (logits_alone(eager, documents) * weights).sum())
    for name, gradient in packed.items():
        assert gradient.abs().max() > 0
        assert difference(gradient, alone[name]) < PACKED_FLOAT32, name


def in_bfloat16(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Weights in bfloat16 and RoPE's frequencies in float32, as a checkpoint is loaded."""
    result = copy.deepcopy(model).bfloat16()
    result.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    return result


@pytest.mark.parametrize("preset", ["llama3-8b", "llama2-7b"])
@pytest.mark.parametrize("attention", [None, "eager"])
@torch.no_grad()
def test_bfloat16_is_as_near_as_its_rounding(tiny_llama, preset, attention):
    documents = ids_of([7, 1, 33, 20, 3])
    logits = packed_logits(in_bfloat16(tiny_llama(preset)), packed_of(documents))
    assert logits.dtype == torch.bfloat16
    other = tiny_llama(preset, attention)
    other = in_bfloat16(other) if attention else other
    alone = logits_alone(other, documents).float()
    error = (logits.float() - alone).square().mean().sqrt() / alone.square().mean().sqrt()
    assert 0 < error < PACKED_BFLOAT16


@torch.no_grad()
def test_autocast_is_as_near_as_bfloat16(tiny_llama):
    documents = ids_of([7, 1, 33, 20, 3])
    alone = logits_alone(tiny_llama(), documents)
    with torch.autocast("cpu", torch.bfloat16):
        logits = packed_logits(tiny_llama(), packed_of(documents)).float()
    error = (logits - alone).square().mean().sqrt() / alone.square().mean().sqrt()
    assert 0 < error < PACKED_BFLOAT16


HEADS = [(8, 2), (4, 4), (6, 1)]


def random_qkv(num_heads: int, num_kv_heads: int, num_tokens: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, heads, num_tokens, 16) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]):
    """softmax(q·k / sqrt(d)) v in float64, one query and one head at a time."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.detach()[0].double() for t in (q, k, v))
    out = torch.zeros(q.shape[1], q.shape[0], 16, dtype=torch.float64)
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            for head in range(q.shape[0]):
                seen = slice(start, t + 1)
                scores = k[head // group, seen] @ q[head, t] / math.sqrt(16)
                out[t, head] = (scores - scores.max()).exp() @ v[head // group, seen]
                out[t, head] /= (scores - scores.max()).exp().sum()
        start += length
    return out[None]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", [[5, 1, 14], [20], [1] * 20], ids=str)
def test_attention_is_the_formula(num_heads, num_kv_heads, lengths):
    q, k, v = random_qkv(num_heads, num_kv_heads, 20)
    out, weights = document_attention(None, q, k, v, None, document_lengths=lengths)
    assert weights is None
    assert out.is_contiguous()
    assert difference(out.detach().double(), by_formula(q, k, v, lengths)) < ATTENTION_FLOAT32


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_attention_is_that_of_a_dense_mask_of_blocks(num_heads, num_kv_heads, scaling):
    lengths = [5, 1, 14]
    blocks = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()
    inputs = random_qkv(num_heads, num_kv_heads, 20)
    q, k, v = inputs
    repeat = num_heads // num_kv_heads
    dense = F.scaled_dot_product_attention(
        q, *(t.repeat_interleave(repeat, dim=1) for t in (k, v)), attn_mask=blocks, scale=scaling
    ).transpose(1, 2)
    ours, _ = document_attention(None, q, k, v, None, scaling=scaling, document_lengths=lengths)
    assert difference(ours, dense) < ATTENTION_FLOAT32
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    expected = torch.autograd.grad((dense * weights).sum(), inputs)
    for gradient, other in zip(
        torch.autograd.grad((ours * weights).sum(), inputs), expected, strict=True
    ):
        assert difference(gradient, other) < ATTENTION_FLOAT32


def test_bfloat16_inputs_give_bfloat16_and_are_rounded_once():
    q, k, v = random_qkv(8, 2, 20, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = document_attention(None, q, k, v, None, document_lengths=[5, 15])
    exact = by_formula(q, k, v, [5, 15])
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("lengths", [[], [19], [5, 16], [21], [20, 1]], ids=str)
def test_lengths_that_do_not_fill_the_row_are_refused(lengths):
    with pytest.raises(AssertionError, match="do not fill the row"):
        document_attention(None, *random_qkv(4, 4, 20), None, document_lengths=lengths)


def test_a_second_row_is_refused():
    q, k, v = (t.expand(2, -1, -1, -1) for t in random_qkv(4, 4, 20))
    with pytest.raises(AssertionError, match="one row"):
        document_attention(None, q, k, v, None, document_lengths=[20])


def test_no_dense_mask_is_built_for_a_packed_row(tiny_llama):
    seen = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        seen.append(tuple(attention_mask.shape))
        return document_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    packed_logits(tiny_llama("llama3-8b", "recording"), packed_of(ids_of([9, 17])))
    assert seen == [(1, 1, 1, 1)] * 2


@torch.no_grad()
def test_without_document_lengths_it_is_transformers_own(tiny_llama):
    """Left-padded rows, as in generation: the same logits and the same greedy text as eager."""
    ours, eager = tiny_llama(), tiny_llama("llama3-8b", "eager")
    rows = ids_of([12, 5])
    padded = torch.tensor([rows[0], [0] * 7 + rows[1]])
    mask = torch.tensor([[1] * 12, [0] * 7 + [1] * 5])
    kwargs = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(padded, **kwargs).tolist() for model in (ours, eager)]
    assert texts[0] == texts[1]
    alone = ours.generate(torch.tensor([rows[1]]), **(kwargs | {"attention_mask": None}))
    assert texts[0][1][7:] == alone[0].tolist()
    q, k, v = random_qkv(8, 2, 20)
    layer = ours.model.layers[0].self_attn
    expected, _ = sdpa_attention_forward(layer, q, k, v, None)
    assert torch.equal(document_attention(layer, q, k, v, None)[0], expected)


def test_registering_twice_is_harmless():
    assert register() == register() == "plumbtune_documents"
