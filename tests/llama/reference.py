"""A Llama in float64 from its documented formulas, in Meta's layout: the oracle of the tests.

It shares no code with the package or with transformers: RoPE turns neighbouring channels as
complex numbers, attention is written out head by head, sizes come from the tensors.

Sources: Touvron et al. 2023 (LLaMA: pre-normalisation by RMSNorm, SwiGLU, RoPE); Zhang and
Sennrich 2019 (RMSNorm); Su et al. 2021 (RoPE, equation 34); Shazeer 2020 (SwiGLU); Ainslie et
al. 2023 (grouped-query attention); Grattafiori et al. 2024 and the Llama 3.1 model code for the
scaling of RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """Llama 3.1's stretching of RoPE."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ReferenceLlama:
    """Logits of a Llama from Meta's tensors.

    Attributes:
        weights: Meta's names -> tensors; without output.weight the head is the embedding.
        n_heads: query heads; the key heads follow from the shapes.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the RoPE frequencies.
        scaling: Llama 3.1's, or None.
    """

    weights: Mapping[str, Tensor]
    n_heads: int
    norm_eps: float
    rope_theta: float
    scaling: Scaling | None = None

    def logits(self, ids: list[int]) -> Tensor:
        """Logits (tokens, vocab) in float64 of one document."""
        hidden = self._weight("tok_embeddings")[torch.tensor(ids)]
        for layer in range(self._num_layers()):
            name = f"layers.{layer}"
            normed = self._norm(hidden, f"{name}.attention_norm")
            hidden = hidden + self._attention(normed, f"{name}.attention")
            normed = self._norm(hidden, f"{name}.ffn_norm")
            hidden = hidden + self._swiglu(normed, f"{name}.feed_forward")
        head = "output" if "output.weight" in self.weights else "tok_embeddings"
        return self._norm(hidden, "norm") @ self._weight(head).T

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"].to(torch.float64)

    def _num_layers(self) -> int:
        return sum(name.endswith("ffn_norm.weight") for name in self.weights)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * g"""
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.norm_eps) * self._weight(name)

    def _swiglu(self, x: Tensor, name: str) -> Tensor:
        """W2 (silu(W1 x) * W3 x)"""
        gate = x @ self._weight(f"{name}.w1").T
        silu = gate / (1.0 + torch.exp(-gate))
        return (silu * (x @ self._weight(f"{name}.w3").T)) @ self._weight(f"{name}.w2").T

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """Causal attention; query heads in groups share one key and value head."""
        num_tokens = x.shape[0]
        queries = (x @ self._weight(f"{name}.wq").T).reshape(num_tokens, self.n_heads, -1)
        head_dim = queries.shape[-1]
        keys = (x @ self._weight(f"{name}.wk").T).reshape(num_tokens, -1, head_dim)
        values = (x @ self._weight(f"{name}.wv").T).reshape(num_tokens, -1, head_dim)
        queries, keys = self._rotate(queries), self._rotate(keys)
        group = self.n_heads // keys.shape[1]
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        outputs = []
        for head in range(self.n_heads):
            scores = queries[:, head] @ keys[:, head // group].T / math.sqrt(head_dim)
            scores = scores.masked_fill(future, -math.inf)
            outputs.append(torch.softmax(scores, dim=-1) @ values[:, head // group])
        return torch.cat(outputs, dim=-1) @ self._weight(f"{name}.wo").T

    def _rotate(self, x: Tensor) -> Tensor:
        """Channels (2i, 2i+1) of every head as a complex number, turned by position * freq_i."""
        num_tokens, _, head_dim = x.shape
        frequencies = torch.tensor(self.frequencies(head_dim), dtype=torch.float64)
        angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies[None, :]
        turns = torch.polar(torch.ones_like(angles), angles)[:, None, :]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], head_dim // 2, 2).contiguous())
        return torch.view_as_real(pairs * turns).reshape(x.shape)

    def frequencies(self, head_dim: int) -> list[float]:
        """Radians a token of every pair of channels."""
        plain = [self.rope_theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        return [self._scaled(f) for f in plain] if self.scaling else plain

    def _scaled(self, frequency: float) -> float:
        """Long waves are stretched, short ones stay, those between are interpolated."""
        assert self.scaling is not None
        wavelength = 2 * math.pi / frequency
        turns = self.scaling.original_context / wavelength  # within the original context
        low, high = self.scaling.low_freq_factor, self.scaling.high_freq_factor
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        return share * frequency + (1 - share) * frequency / self.scaling.factor


def reference_of(
    weights: Mapping[str, Tensor], params: Mapping[str, object], scaling: Scaling | None = None
) -> ReferenceLlama:
    """A reference from Meta's tensors and params.json."""
    return ReferenceLlama(
        weights,
        n_heads=int(str(params["n_heads"])),
        norm_eps=float(str(params["norm_eps"])),
        rope_theta=float(str(params.get("rope_theta", 10000.0))),
        scaling=scaling,
    )
