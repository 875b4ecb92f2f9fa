"""What evaluation needs of every trained token, without ever holding the logits of all of them.

    loss = log Σ_v exp(z_v) - z_x    and whether x is the likeliest id

The head of the model is asked block by block and answers with these two numbers instead of logits,
so that memory does not grow with tokens times vocabulary. Wrappers (PEFT, DDP, autocast) stay in
place around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.fast.head import Answer, answering_head, plain_losses
from finetune.fast.loss import Packed, rows_for, supervised, supervised_logits

NUM_LOGITS = 1 << 24  # at once: 64 MiB in float32


@dataclass(frozen=True)
class TokenScores:
    """Of the supervised tokens of a packed row, in order.

    Attributes:
        losses: (supervised,) nats, float64, on the CPU.
        right: (supervised,) bool: the token is the likeliest one.
    """

    losses: torch.Tensor
    right: torch.Tensor


def token_scores(model: torch.nn.Module, packed: Packed) -> TokenScores:
    """Loss and rank of every supervised token; call it under `torch.no_grad()`.

    Args:
        model: a causal Llama that uses `document_attention`, possibly wrapped (PEFT, DDP).
    """
    bare: Any = getattr(model, "module", model)
    vocab_size = bare.config.vocab_size
    found = []
    for row in rows_for(model, packed):
        with answering_head(model, _scores_of(supervised(row.labels)[1], vocab_size)):
            found.append(supervised_logits(model, row).cpu().double())
    scores = torch.cat(found)
    return TokenScores(scores[:, 0], scores[:, 1].bool())


def _scores_of(targets: torch.Tensor, vocab_size: int) -> Answer:
    """(1, supervised, 2) in place of logits: loss and hit."""

    def answer(head: Any, logits_of: Any, hidden: torch.Tensor) -> torch.Tensor:
        size = _block_of(len(targets), vocab_size)
        blocks = zip(hidden[0].split(size), targets.split(size), strict=True)
        return torch.cat([_scored(logits_of(states), ids) for states, ids in blocks]).unsqueeze(0)

    return answer


def _block_of(num_tokens: int, vocab_size: int) -> int:
    """Tokens whose logits are held at once; blocks are of one size, as far as that goes."""
    most = max(NUM_LOGITS // vocab_size, 1)
    return -(-num_tokens // max(-(-num_tokens // most), 1)) or 1


def _scored(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(tokens, 2) of (tokens, vocab); in float32, or in float64 where the model is."""
    losses = plain_losses(logits, targets)
    return torch.stack([losses, (logits.argmax(-1) == targets).to(losses.dtype)], -1)
