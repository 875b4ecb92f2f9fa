"""The head of a model that answers with something else than logits, and the loss as such an answer.

Memory then does not grow with tokens times vocabulary. Wrappers (PEFT, DDP, autocast) stay in place
around it: the model itself is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from finetune.fast.lora import type_of_products
from finetune.fast.place import on_cpu
from finetune.fast.products import go_to_onednn, plus_times, times

# Logits at once, in float32 4 MiB, which a CPU's cache holds, or 128 MiB, so that a GPU has few
# parts; and rows of the vocabulary at once, however many the tokens are.
NUM_LOGITS, LEAST_ROWS = 1 << 20, 512
_ON_GPU, _LEAST_ON_GPU = 1 << 25, 4096


# Of the head, its own forward, and hidden states (1, tokens, width): (1, tokens, …).
Answer = Callable[[torch.nn.Module, Callable[..., Any], torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def answering_head(
    model: torch.nn.Module,
    answer: Answer,
) -> Iterator[None]:
    """While it lasts, the head returns what `answer` makes of the hidden states.

    Args:
        model: a causal model, possibly wrapped.
        answer: what the head says instead of logits.
    """
    bare: Any = getattr(model, "module", model)
    head: Any = bare.get_output_embeddings()
    logits_of = head.forward
    was_set = "forward" in vars(head)
    head.forward = lambda hidden: answer(head, logits_of, hidden)
    try:
        yield
    finally:
        if was_set:
            head.forward = logits_of
        else:
            del head.forward


def head_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, products: bool = True
) -> torch.Tensor:
    """-log p of each target under softmax(hidden · weight').

        loss_t = log Σ_v exp(z_tv) - z_t,x(t)        dh_t = g_t (softmax(z_t) - e_x(t)) W

    Logits are made for a part of the vocabulary at a time, as FlashAttention makes scores for a
    part of the keys (arXiv 2205.14135): Σ exp(z) and Σ exp(z) W go on from part to part, under the
    largest z so far. So the gradient is made in the forward pass and logits are kept nowhere. The
    target is not in the sums but beside them: of a likely one, 1 - p would be lost. Only a head
    that trains itself makes its logits again in the backward pass.

    Args:
        hidden: (tokens, width).
        weight: (vocab, width).
        targets: (tokens,) ids.
        products: by the faster library.

    Returns:
        (tokens,) nats, float32, or float64 where the products are.
    """
    dtype, tokens = type_of_products(hidden, weight.dtype), len(targets)
    # A product whose rows do not begin with a cache line is a third slower on a CPU.
    missing = -tokens % 16
    hidden, targets = F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing))
    losses: torch.Tensor = _HeadLosses.apply(hidden, weight, targets, dtype, products)
    return losses[:tokens]


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        products: bool,
    ) -> torch.Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            cast, narrow = weight.to(dtype), hidden.to(dtype)
            onednn = go_to_onednn(products, narrow)
            own = torch.empty(len(targets), dtype=wide, device=hidden.device)  # its logit
            top, others = torch.full_like(own, torch.finfo(wide).min), torch.zeros_like(own)
            grads = torch.zeros_like(narrow, dtype=wide) if ctx.needs_input_grad[0] else None
            for part, logits in _other_logits(narrow, cast, targets, own, onednn):
                top, before = torch.maximum(top, logits.amax(0)), top
                shrunk, likely = (before - top).exp_(), logits.sub_(top).exp_()
                others.mul_(shrunk).add_(likely.sum(0))
                if grads is not None:
                    grads.mul_(shrunk.unsqueeze(1))
                    grads = _plus_product(grads, likely.t(), cast[part], onednn)
                del logits, likely  # before the next ones are made
            top, before = torch.maximum(top, own), top
            shrunk, behind = (before - top).exp_(), own - top
            others.mul_(shrunk)
            losses, total = torch.log1p(others + behind.expm1()) - behind, others + behind.exp()
            rest = others / total  # 1 - p of the target
            if grads is not None:
                grads.mul_((shrunk / total).unsqueeze(1))
                grads.addcmul_(cast[targets].to(wide), rest.unsqueeze(1), value=-1)
                grads = grads.to(dtype)
        ctx.dtype, ctx.onednn = dtype, onednn
        ctx.needs_weight = ctx.needs_input_grad[1]
        kept = (hidden, weight, targets, top + total.log(), rest) if ctx.needs_weight else ()
        ctx.save_for_backward(grads, *kept)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads, *kept = ctx.saved_tensors
        dhidden = None if grads is None else (grads * dloss.unsqueeze(1)).to(grads.dtype)
        dweight = (
            _weight_gradient(ctx.dtype, ctx.onednn, dloss, *kept) if ctx.needs_weight else None
        )
        return dhidden, dweight, None, None, None


def _other_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    own: torch.Tensor,
    onednn: bool,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, tokens) logits of a part of the vocabulary, with -inf for the target's.

    That one goes to `own`, (tokens,), whose type all have. The next part takes the same memory,
    where the library lets it.
    """
    vocab, tokens = len(weight), len(hidden)
    rows = _rows_at_once(vocab, tokens, on_cpu(hidden))
    memory = torch.empty(0 if onednn else rows * tokens, dtype=own.dtype, device=hidden.device)
    for start in range(0, vocab, rows):
        part = slice(start, min(start + rows, vocab))
        num_rows = part.stop - start
        room = memory[: num_rows * tokens]
        # MKL is faster in this order; oneDNN would copy a left side that is not in order, as the
        # next product's is
        if onednn:
            logits = times(hidden, weight[part], onednn).t()
        elif own.dtype == hidden.dtype:
            logits = torch.mm(weight[part], hidden.t(), out=room.view(num_rows, tokens))
        else:
            logits = room.view(tokens, num_rows).copy_(torch.mm(hidden, weight[part].t())).t()
        inside = (targets >= start) & (targets < part.stop)
        place = (targets - start).clamp_(0, len(logits) - 1).unsqueeze(0)
        there = logits.gather(0, place)
        torch.where(inside, there[0], own, out=own)
        logits.scatter_(0, place, there.masked_fill_(inside, -torch.inf))
        yield part, logits
        del logits


def _rows_at_once(vocab: int, tokens: int, cpu: bool) -> int:
    """Of the vocabulary; parts of one size where it has such: one kernel serves them all."""
    at_once, least = (NUM_LOGITS, LEAST_ROWS) if cpu else (_ON_GPU, _LEAST_ON_GPU)
    most = min(max(at_once // max(tokens, 1), least), vocab)
    even = (rows for rows in range(most - most % 16, most // 2, -16) if vocab % rows == 0)
    return next(even, most)


def _plus_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, onednn: bool
) -> torch.Tensor:
    """total + left · right, the product in the type of `right`; may be `total` itself, changed."""
    if total.dtype == right.dtype:
        return plus_times(total, left, right.t(), onednn)
    return total.add_(torch.mm(left.to(right.dtype), right))


def _weight_gradient(
    dtype: torch.dtype,
    onednn: bool,
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    log_total: torch.Tensor,
    rest: torch.Tensor,
) -> torch.Tensor:
    """Σ_t g_t (softmax(z_t) - e_x(t))' h_t, in the weight's type, summed in float32."""
    gradient = torch.empty(weight.shape, dtype=dloss.dtype, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        cast, narrow = weight.to(dtype), hidden.to(dtype)
        for part, logits in _other_logits(narrow, cast, targets, torch.empty_like(dloss), onednn):
            factors = logits.sub_(log_total).exp_().mul_(dloss)
            gradient[part] = times(factors.to(dtype), narrow.t(), onednn)
        own = narrow.to(dloss.dtype) * (rest * dloss).neg().unsqueeze(1)
        gradient.index_put_((targets,), own, accumulate=True)
    return gradient.to(weight.dtype)


def plain_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The plain twin: torch's own cross entropy of logits that are all held."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none")
