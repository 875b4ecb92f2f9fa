"""Held-out loss as a sum and a count in float64: one number for every batch size and world size.

    loss = sum over held-out trained tokens of -log p / their number      (nats per token)

The same function serves evaluation while training and `finetune eval`. Not counted: prompts, BOS,
the first token of a document. Counted: the token that ends an answer.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetune.errors import CannotContinue, InputError
from finetune.fast.loss import pack, to_device
from finetune.fast.scores import token_scores
from finetune.prepared import Document

_LARGEST_EXPONENT = 709.0  # of a float64


@dataclass(frozen=True)
class Span:
    """Trained tokens of a document that follow each other: one answer.

    Attributes:
        loss_sum: nats, float64.
        num_tokens: trained tokens.
        num_right: of these, the likeliest ones.
    """

    loss_sum: float
    num_tokens: int
    num_right: int


@dataclass(frozen=True)
class RowScore:
    """One document.

    Attributes:
        spans: its answers, in order; none where nothing of it is trained.
    """

    spans: tuple[Span, ...]

    @property
    def loss_sum(self) -> float:
        """Nats over its trained tokens."""
        return math.fsum(span.loss_sum for span in self.spans)

    @property
    def num_tokens(self) -> int:
        """Its trained tokens."""
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_right(self) -> int:
        """Its trained tokens that are the likeliest ones."""
        return sum(span.num_right for span in self.spans)


@dataclass(frozen=True)
class HeldoutLoss:
    """Sums over held-out documents.

    Attributes:
        loss_sum: nats over all trained tokens, float64.
        num_tokens: trained tokens.
        num_right: of these, the likeliest ones.
        rows: each document, in order.
    """

    loss_sum: float
    num_tokens: int
    num_right: int
    rows: tuple[RowScore, ...]

    @property
    def loss(self) -> float:
        """Nats per trained token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < _LARGEST_EXPONENT else math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of trained tokens that are the likeliest ones."""
        return self.num_right / self.num_tokens

    def as_json(self) -> dict[str, float | int | None]:
        """The numbers of the command-line contract; JSON has no infinity."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "token_accuracy": self.token_accuracy,
            "tokens": self.num_tokens,
            "rows": len(self.rows),
        }


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
) -> list[RowScore]:
    """Every document by itself; one rank's share of `score` may be empty."""
    rows: list[RowScore] = []
    with evaluating(model):
        for start in range(0, len(documents), batch_size):
            rows += _score_batch(model, documents[start : start + batch_size], device)
    return rows


def document_losses(
    model: torch.nn.Module, documents: Sequence[Document], device: torch.device
) -> list[float]:
    """The loss sum of each document by itself, whatever number it is."""
    with evaluating(model):
        return [row.loss_sum for d in documents for row in _scored(model, [d], device)]


def total_of(rows: Sequence[RowScore]) -> HeldoutLoss:
    """The sums over all rows.

    Raises:
        InputError: no trained token in any of them.
    """
    num_tokens = sum(row.num_tokens for row in rows)
    if not num_tokens:
        raise InputError("the held-out rows have no trained token; nothing to score")
    loss_sum = math.fsum(row.loss_sum for row in rows)
    return HeldoutLoss(loss_sum, num_tokens, sum(row.num_right for row in rows), tuple(rows))


def _score_batch(
    model: torch.nn.Module, documents: Sequence[Document], device: torch.device
) -> list[RowScore]:
    rows = _scored(model, documents, device)
    for document, row in zip(documents, rows, strict=True):
        if not math.isfinite(row.loss_sum):
            raise CannotContinue(f"{document.example.where}: the held-out loss is {row.loss_sum}")
    return rows


def _scored(
    model: torch.nn.Module, documents: Sequence[Document], device: torch.device
) -> list[RowScore]:
    """Each document, all laid in one row."""
    packed = to_device(pack([(d.input_ids, d.train_mask) for d in documents]), device)
    scores = token_scores(model, packed)
    lengths = [length for document in documents for length in document.answer_lengths]
    parts = zip(scores.losses.split(lengths), scores.right.split(lengths), strict=True)
    spans = iter([Span(loss.sum().item(), len(loss), int(hit.sum())) for loss, hit in parts])
    return [RowScore(tuple(itertools.islice(spans, len(d.answer_lengths)))) for d in documents]
