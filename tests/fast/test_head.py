"""The loss in blocks against torch's cross entropy, against differences, and in memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import FAST_BFLOAT16, FAST_FLOAT32, FAST_FLOAT64

from finetune.fast import head
from finetune.fast.head import answering_head, head_losses

pytestmark = pytest.mark.usefixtures("library")

TYPES = [
    (torch.float64, FAST_FLOAT64),
    (torch.float32, FAST_FLOAT32),
    (torch.bfloat16, FAST_BFLOAT16),
]


def inputs(tokens=11, width=8, vocab=50, dtype=torch.float64, trains=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(trains), targets


def in_parts_of(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(head, "NUM_LOGITS", 1)
    monkeypatch.setattr(head, "LEAST_ROWS", rows)


@pytest.mark.parametrize("rows", [1, 7, 49, 50, 1 << 12])  # of 50
@pytest.mark.parametrize(("dtype", "limit"), TYPES)
@pytest.mark.parametrize("trains", [False, True])
def test_losses_and_gradients_are_those_of_the_whole(monkeypatch, rows, dtype, limit, trains):
    in_parts_of(monkeypatch, rows)
    hidden, weight, targets = inputs(dtype=dtype, trains=trains)
    losses = head_losses(hidden, weight, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    outer = torch.linspace(-1, 2, len(targets), dtype=losses.dtype)  # each token's own factor
    (losses * outer).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    plain = F.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="none")
    (plain * outer.double()).sum().backward()
    pairs = [(losses, plain), (hidden.grad, wide[0].grad)]
    pairs += [(weight.grad, wide[1].grad)] if trains else []
    assert trains or weight.grad is None
    for found, expected in pairs:
        assert (found.double() - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_gradients_are_the_differences_of_the_values(monkeypatch, rows):
    in_parts_of(monkeypatch, rows)
    hidden, weight, targets = inputs(tokens=3, vocab=7)
    assert torch.autograd.gradcheck(lambda h, w: head_losses(h, w, targets), (hidden, weight))


@pytest.mark.parametrize(("dtype", "limit"), TYPES[1:])
@pytest.mark.parametrize("length", [0.25, 0.5, 1.0])
def test_what_a_sure_token_still_teaches_is_not_lost(dtype, limit, length):
    """Near 1, 1 - p of a rounded p is noise, and so is a gradient made of it."""
    _, weight, targets = inputs(dtype=dtype, width=64)
    with torch.no_grad():  # whole numbers, whose logits no type rounds
        weight.copy_(weight.round().clamp(-1, 1))
    hidden = (length * weight[targets]).detach().requires_grad_()  # towards the target
    losses = head_losses(hidden, weight, targets)
    losses.sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = wide[0] @ wide[1].t()
    others = logits.scatter(1, targets.unsqueeze(1), -torch.inf).logsumexp(1)
    exact = F.softplus(others - logits.gather(1, targets.unsqueeze(1))[:, 0])
    exact.sum().backward()
    assert exact.max() < math.exp(-12 * length)
    pairs = [(losses, exact), (hidden.grad, wide[0].grad), (weight.grad, wide[1].grad)]
    for found, expected in pairs:
        assert (found.double() - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    hidden, weight, targets = inputs(tokens=tokens)
    losses = head_losses(hidden, weight, targets)
    assert losses.shape == (tokens,)
    losses.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape
    assert tokens or (weight.grad == 0).all()


def test_logits_of_any_size_have_a_finite_loss():
    hidden, weight, targets = inputs(dtype=torch.float32)
    with torch.no_grad():
        hidden.mul_(1e4)
    losses = head_losses(hidden, weight, targets)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_seen_in_its_token_alone(bad):
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[4, 0] = bad
    losses = head_losses(hidden, weight, targets)
    assert (~torch.isfinite(losses)).tolist() == [n == 4 for n in range(11)]


def peak_bytes(tokens: int, vocab: int) -> int:
    """The most that a forward and a backward pass hold at once, beside their inputs."""
    from finetune.footprint import LiveBytes

    hidden, weight, targets = inputs(tokens, 8, vocab, torch.float32, trains=False)
    with LiveBytes() as live:
        head_losses(hidden, weight, targets).sum().backward()
    return live.peak


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    in_parts_of(monkeypatch, 32)
    small, large = peak_bytes(4096, 1 << 9), peak_bytes(4096, 1 << 13)
    assert large < 1.2 * small
    assert large < 4096 * (1 << 13) * 4 / 100  # of the logits of all tokens


def test_the_head_is_itself_again_afterwards(tiny_llama):
    model = tiny_llama()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="on purpose"), answering_head(model, _failing):
            model(ids)
        assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(model.lm_head)


def _failing(*_):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(
    ("vocab", "tokens", "rows"),
    [
        (32_000, 736, 1280),  # of 1,424 at most
        (128_256, 736, 768),
        (32_000, 1, 32_000),
        (32_000, 0, 32_000),
        (32_000, 1 << 20, 400),  # of 512 at most
        (151_665, 736, 1424),  # an odd vocabulary has a rest
        (50, 736, 50),
    ],
)
def test_parts_are_of_one_size_where_the_vocabulary_has_such(vocab, tokens, rows):
    assert head._rows_at_once(vocab, tokens, True) == rows


@pytest.mark.parametrize(
    ("vocab", "tokens", "rows"),
    [
        (128_256, 500, 64_128),  # of 67,108 at most
        (128_256, 4096, 8016),  # of 8,192: 16 parts, not 334
        (128_256, 1 << 20, 2672),
        (32_000, 500, 32_000),
    ],
)
def test_a_gpu_has_few_parts(vocab, tokens, rows):
    assert head._rows_at_once(vocab, tokens, False) == rows
