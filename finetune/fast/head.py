"""The head of a model that answers with something else than logits, block by block of tokens.

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

NUM_LOGITS = 1 << 24  # at once: 64 MiB in float32


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


def head_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target under softmax(hidden · weight').

        loss_t = log Σ_v exp(z_tv) - z_t,x(t)        dh_t = g_t (softmax(z_t) - e_x(t)) W

    A block's gradient is made where its logits are, in the forward pass: they are computed once and
    kept nowhere. Only a head that trains itself computes them again in the backward pass.

    Args:
        hidden: (tokens, width).
        weight: (vocab, width).
        targets: (tokens,) ids.

    Returns:
        (tokens,) nats, float32, or float64 where the products are.
    """
    dtype = type_of_products(hidden, weight)
    result: torch.Tensor = _HeadLosses.apply(hidden, weight, targets, dtype)
    return result


def block_of(num_tokens: int, vocab_size: int) -> int:
    """Tokens whose logits are held at once; blocks are of one size, as far as that goes."""
    most = max(NUM_LOGITS // vocab_size, 1)
    return -(-num_tokens // max(-(-num_tokens // most), 1)) or 1


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        size = block_of(len(targets), len(weight))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            cast, narrow = weight.to(dtype), hidden.to(dtype)
            grads = torch.empty_like(narrow) if ctx.needs_input_grad[0] else None
            for start in range(0, len(targets), size):
                block = slice(start, start + size)
                errors = _errors(narrow[block], cast, targets[block], losses[block])
                if grads is not None:
                    torch.mm(errors.to(dtype), cast, out=grads[block])
                del errors  # before the next block's are made
        ctx.dtype = dtype
        ctx.needs_weight = ctx.needs_input_grad[1]
        kept = (hidden, weight, targets) if ctx.needs_weight else ()
        ctx.save_for_backward(grads, *kept)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads, *kept = ctx.saved_tensors
        dhidden = None if grads is None else (grads * dloss.unsqueeze(1)).to(grads.dtype)
        dweight = _weight_gradient(ctx.dtype, dloss, *kept) if ctx.needs_weight else None
        return dhidden, dweight, None, None


def _errors(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor
) -> torch.Tensor:
    """softmax(z) - e_x of a block, in float32 or float64; writes the block's losses."""
    logits = torch.mm(hidden, weight.t()).to(losses.dtype)
    index = targets.unsqueeze(1)
    torch.log_softmax(logits, 1, out=logits)
    torch.neg(logits.gather(1, index), out=losses.unsqueeze(1))
    logits.exp_()
    return logits.scatter_add_(1, index, torch.full_like(logits[:, :1], -1))


def _weight_gradient(
    dtype: torch.dtype,
    dloss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Σ_t g_t (softmax(z_t) - e_x(t))' h_t, in the weight's type, summed in float32."""
    size, scratch = block_of(len(targets), len(weight)), torch.empty_like(dloss)
    gradient = torch.zeros(weight.shape, dtype=dloss.dtype, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        cast, narrow = weight.to(dtype), hidden.to(dtype)
        for start in range(0, len(targets), size):
            block = slice(start, start + size)
            errors = _errors(narrow[block], cast, targets[block], scratch[block])
            errors.mul_(dloss[block].unsqueeze(1))
            gradient.add_(torch.mm(errors.to(dtype).t(), narrow[block]))
            del errors
    return gradient.to(weight.dtype)


def plain_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The plain twin: torch's own cross entropy of logits that are all held."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none")
