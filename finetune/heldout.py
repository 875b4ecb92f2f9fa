"""Held-out loss as a sum and a count in float64: one number for every batch size and world size.

    loss = sum over held-out trained tokens of -log p / their number      (nats per token)

The same function serves evaluation while training and `finetune eval`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetune.errors import CannotContinue, InputError
from finetune.fast.loss import Packed, pack, token_losses
from finetune.prepared import Document


@dataclass(frozen=True)
class HeldoutLoss:
    """Sums over held-out documents.

    Attributes:
        loss_sum: nats over all trained tokens, float64.
        num_tokens: trained tokens.
        rows: (loss sum, trained tokens) of each document, in order.
    """

    loss_sum: float
    num_tokens: int
    rows: tuple[tuple[float, int], ...]

    @property
    def loss(self) -> float:
        """Nats per trained token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def as_json(self) -> dict[str, float | int]:
        """The numbers of the command-line contract."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "tokens": self.num_tokens,
            "rows": len(self.rows),
        }


def to_device(packed: Packed, device: torch.device) -> Packed:
    """Moves the tensors of a packed row."""
    return Packed(
        packed.input_ids.to(device),
        packed.position_ids.to(device),
        packed.labels.to(device),
        packed.document_lengths,
    )


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode found is put back, of every module its own."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def score(
    model: torch.nn.Module, documents: Sequence[Document], batch_size: int, device: torch.device
) -> HeldoutLoss:
    """The loss of every document, several laid in one row at a time.

    Args:
        model: a causal Llama that uses `document_attention`.
        batch_size: documents in one forward pass; the numbers do not depend on it.

    Raises:
        InputError: no trained token in any document.
        CannotContinue: a document's loss is not finite.
    """
    return total_of(score_rows(model, documents, batch_size, device))


def score_rows(
    model: torch.nn.Module, documents: Sequence[Document], batch_size: int, device: torch.device
) -> list[tuple[float, int]]:
    """(loss sum, trained tokens) of every document; one rank's share of `score` may be empty."""
    rows: list[tuple[float, int]] = []
    with evaluating(model):
        for start in range(0, len(documents), batch_size):
            rows += _score_batch(model, documents[start : start + batch_size], device)
    return rows


def document_losses(
    model: torch.nn.Module, documents: Sequence[Document], device: torch.device
) -> list[float]:
    """The loss sum of each document by itself, whatever number it is."""
    with evaluating(model):
        return [loss for d in documents for loss in _loss_sums(model, [d], device)]


def total_of(rows: Sequence[tuple[float, int]]) -> HeldoutLoss:
    """The sums over all rows.

    Raises:
        InputError: no trained token in any of them.
    """
    num_tokens = sum(count for _, count in rows)
    if not num_tokens:
        raise InputError("the held-out rows have no trained token; nothing to score")
    return HeldoutLoss(math.fsum(loss for loss, _ in rows), num_tokens, tuple(rows))


def _score_batch(
    model: torch.nn.Module, documents: Sequence[Document], device: torch.device
) -> list[tuple[float, int]]:
    rows = []
    for document, total in zip(documents, _loss_sums(model, documents, device), strict=True):
        if not math.isfinite(total):
            raise CannotContinue(f"{document.example.where}: the held-out loss is {total}")
        rows.append((total, document.num_trained))
    return rows


def _loss_sums(
    model: torch.nn.Module, documents: Sequence[Document], device: torch.device
) -> list[float]:
    """The loss sum of each document, all laid in one row."""
    packed = to_device(pack([(d.input_ids, d.train_mask) for d in documents]), device)
    losses = token_losses(model, packed).double().cpu()
    return [part.sum().item() for part in losses.split([d.num_trained for d in documents])]
