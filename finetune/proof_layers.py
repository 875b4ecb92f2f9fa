"""Several Llamas side by side over the same rows, one decoder layer at a time.

Each is a skeleton and the weights it is filled with. Between two layers only the rows' hidden
states are kept; the head is computed for some rows of the vocabulary at a time, and every figure
over the vocabulary is a running one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from finetune.fast.attention import no_mask, register
from finetune.llama.architecture import to_llama_config
from finetune.model import Base
from finetune.skeleton import Skeleton, Weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LOGIT_BYTES = 64 << 20
_HEAD_ENTRIES = 1 << 25
_PACK_TOKENS = 1024  # a weight is multiplied once for so many, or once for a longer row


@dataclass
class Stream:
    """One model on its way through the rows.

    Attributes:
        skeleton: its layers.
        weights: what fills them.
        computed_in: type of the hidden states, and of weights while they multiply; None: the
            skeleton's own.
        hidden: (tokens, dim) of each pack of rows, after the layers so far.
    """

    skeleton: Skeleton
    weights: Weights
    computed_in: torch.dtype | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)


def run_layers(
    base: Base,
    streams: Sequence[Stream],
    rows: Sequence[Sequence[int]],
    inspect: Callable[[str, Any, Any], None],
) -> None:
    """Takes every stream from the ids to the normed hidden states.

    Args:
        base: for the architecture.
        streams: the first two are in memory together, layer by layer.
        rows: ids.
        inspect: called with the layer's name and the first two streams' layer, both filled; last
            with "model" and what has the final norm under its name.
    """
    rotary, packs = LlamaRotaryEmbedding(_config_of(base)), _packed(rows)
    lengths = [[len(ids) for ids in pack] for pack in packs]
    with torch.no_grad():
        for stream in streams:
            stream.hidden = [_embedded(stream, [i for ids in pack for i in ids]) for pack in packs]
        for index in range(base.architecture.n_layers):
            with contextlib.ExitStack() as stack:
                pair = [_enter(stack, stream, index) for stream in streams[:2]]
                inspect(f"model.layers.{index}", *pair)
                for stream, layer in zip(streams, pair, strict=False):
                    if stream.computed_in is None:
                        _advance(stream, layer, rotary, lengths)
            for number, stream in enumerate(streams):
                if number > 1 or stream.computed_in is not None:
                    _advance_alone(stream, index, rotary, lengths)
        with contextlib.ExitStack() as stack:
            norms = [_named_norm(stack, stream) for stream in streams[:2]]
            inspect("model", *norms)
        for stream in streams:
            with stream.skeleton.filled(stream.skeleton.norm, stream.weights) as norm:
                stream.hidden = [norm(hidden.unsqueeze(0))[0] for hidden in stream.hidden]


def _named_norm(stack: contextlib.ExitStack, stream: Stream) -> torch.nn.Module:
    norm = stack.enter_context(stream.skeleton.filled(stream.skeleton.norm, stream.weights))
    return torch.nn.ModuleDict({"norm": norm})


def _advance_alone(
    stream: Stream, index: int, rotary: LlamaRotaryEmbedding, packs: Sequence[Sequence[int]]
) -> None:
    """With no other layer in memory, as this one may be in a wider type than it is stored in."""
    with contextlib.ExitStack() as stack:
        layer = _enter(stack, stream, index)
        if stream.computed_in is not None:
            layer.to(stream.computed_in)  # the parameters that `filled` takes out again
        _advance(stream, layer, rotary, packs)


def _packed(rows: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Neighbouring rows, which attention keeps apart, in packs."""
    packs: list[list[Sequence[int]]] = []
    filled = _PACK_TOKENS
    for ids in rows:
        if filled + len(ids) > _PACK_TOKENS:
            packs.append([])
            filled = 0
        packs[-1].append(ids)
        filled += len(ids)
    return packs


def _config_of(base: Base) -> Any:
    config = to_llama_config(base.architecture)
    config._attn_implementation = register()
    return config


def _enter(stack: contextlib.ExitStack, stream: Stream, index: int) -> Any:
    part = stream.skeleton.layers[index]
    return stack.enter_context(stream.skeleton.filled(part, stream.weights))


def _embedded(stream: Stream, ids: Sequence[int]) -> torch.Tensor:
    rows = {token: stream.weights.rows(EMBEDDING, token, token + 1) for token in set(ids)}
    return torch.cat([rows[token] for token in ids]).to(stream.computed_in or stream.skeleton.dtype)


def _advance(
    stream: Stream, layer: Any, rotary: LlamaRotaryEmbedding, packs: Sequence[Sequence[int]]
) -> None:
    for number, (hidden, lengths) in enumerate(zip(stream.hidden, packs, strict=True)):
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        states = hidden.unsqueeze(0)
        output = layer(
            states,
            attention_mask=no_mask(hidden.device),
            position_ids=positions,
            position_embeddings=rotary(states, positions),
            document_lengths=list(lengths),
            use_cache=False,
        )
        stream.hidden[number] = (output[0] if isinstance(output, tuple) else output)[0]


class Divergence:
    """KL(p ‖ q) and the differences of two models' logits, added up over blocks of the vocabulary.

    With a, b the logits of p, q:  KL = sum e^(a - log Z_a) (a - b) - log Z_a + log Z_b.
    All in float64; one number a token is kept of each sum.

    Args:
        num_tokens: rows of the logits that will be added.
    """

    def __init__(self, num_tokens: int) -> None:
        minus_infinity = torch.full((num_tokens,), -torch.inf, dtype=torch.float64)
        self.top_p, self.top_q = minus_infinity, minus_infinity.clone()
        self.sum_p = torch.zeros(num_tokens, dtype=torch.float64)
        self.sum_q, self.weighted = self.sum_p.clone(), self.sum_p.clone()
        self.total, self.squares, self.difference = (self.sum_p.clone() for _ in range(3))
        self.best_p = torch.zeros(num_tokens, dtype=torch.long)
        self.best_q = self.best_p.clone()
        self.worst = torch.zeros(num_tokens, dtype=torch.float64)
        self.num_entries = 0

    def add(self, p: torch.Tensor, q: torch.Tensor) -> None:
        """Takes the next block of the vocabulary: two (tokens, block) logits."""
        p, q = p.double(), q.double()
        apart = p - q
        best_p, top_p = self._better(p, self.best_p, self.top_p)
        self.best_q, top_q = self._better(q, self.best_q, self.top_q)
        weight, kept = (p - top_p[:, None]).exp(), (self.top_p - top_p).exp()
        self.sum_p = self.sum_p * kept + weight.sum(1)
        self.weighted = self.weighted * kept + (weight * apart).sum(1)
        self.sum_q = self.sum_q * (self.top_q - top_q).exp() + (q - top_q[:, None]).exp().sum(1)
        self.best_p, self.top_p, self.top_q = best_p, top_p, top_q
        self.total += p.sum(1)
        self.squares += p.square().sum(1)
        self.difference += apart.abs().sum(1)
        self.worst = torch.maximum(self.worst, apart.abs().amax(1))
        self.num_entries += p.shape[1]

    def _better(
        self, logits: torch.Tensor, best: torch.Tensor, top: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found, place = logits.max(1)
        return torch.where(found > top, place + self.num_entries, best), torch.maximum(found, top)

    def kl(self) -> torch.Tensor:
        """(tokens,) nats."""
        log_p, log_q = self.top_p + self.sum_p.log(), self.top_q + self.sum_q.log()
        return self.weighted / self.sum_p - log_p + log_q

    def spread(self, lengths: Sequence[int]) -> float:
        """The standard deviation of a row's logits of p, over rows, by their tokens."""
        parts = zip(self.total.split(list(lengths)), self.squares.split(list(lengths)), strict=True)
        weighed = 0.0
        for (total, squares), length in zip(parts, lengths, strict=True):
            count = length * self.num_entries
            mean = total.sum() / count
            variance = (squares.sum() - count * mean.square()) / max(count - 1, 1)
            weighed += float(variance.clamp(min=0).sqrt()) * length
        return weighed / sum(lengths)

    def as_json(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The proof's figures."""
        largest = float(self.worst.max())
        tokens = sum(lengths)
        return {
            "tokens": tokens,
            "max_logit_difference": largest,
            "mean_logit_difference": float(self.difference.sum()) / (tokens * self.num_entries),
            "relative_logit_difference": largest / self.spread(lengths),
            "kl": max(float(self.kl().mean()), 0.0),
            "same_next_token": int((self.best_p == self.best_q).sum()),
        }


def compare_heads(
    base: Base, streams: Sequence[Stream], pairs: Sequence[tuple[int, int]]
) -> list[Divergence]:
    """The divergences of pairs of streams; every block of every head is read once."""
    hidden = [torch.cat(stream.hidden) for stream in streams]
    tokens, vocab = len(hidden[0]), base.architecture.vocab_size
    name = EMBEDDING if base.architecture.tie_word_embeddings else HEAD
    # Logits of a block are there in float64 for two models, and a few intermediates.
    step = max(_LOGIT_BYTES // (8 * tokens), 256)
    step = min(step, max(_HEAD_ENTRIES // base.architecture.dim, 1))
    found = [Divergence(tokens) for _ in pairs]
    with torch.no_grad():
        for start in range(0, vocab, step):
            logits = [
                F.linear(
                    states, stream.weights.rows(name, start, min(start + step, vocab)).to(states)
                )
                for states, stream in zip(hidden, streams, strict=True)
            ]
            for divergence, (p, q) in zip(found, pairs, strict=True):
                divergence.add(logits[p], logits[q])
    return found
