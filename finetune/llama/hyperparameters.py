"""The documented hyperparameters of a Llama as one frozen dataclass, and what follows from them.

Names are those of Meta's `params.json` and `ModelArgs`. Everything here is arithmetic: sizes
and counts are closed forms, so a 405B model is counted without allocating anything.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from finetune.errors import InputError

_COUNTS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"),
    *("context", "max_batch_size", "max_seq_len"),
)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent stretching of RoPE.

    Wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched
    by `factor`, those shorter than `original_max_position_embeddings / high_freq_factor` stay,
    the ones between are interpolated.

    Source: meta-llama/llama-models, `apply_scaling`; transformers calls it `rope_type: llama3`.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def findings(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        found = []
        if self.factor < 1.0:
            found.append(f"rope_scaling.factor: {self.factor} is below 1; it stretches, so >= 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            found.append(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor {self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            found.append("rope_scaling.original_max_position_embeddings: must be at least 1")
        return found


@dataclass(frozen=True)
class PartCounts:
    """One number for each part of the model: parameters, or FLOPs for one token."""

    embedding: int
    attention: int
    mlp: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """The sum over the parts."""
        return self.embedding + self.attention + self.mlp + self.norm + self.head

    def as_dict(self) -> dict[str, int]:
        """The parts and their total under their names."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"total": self.total}


@dataclass(frozen=True)
class Architecture:
    """The shape of a Llama.

    Attributes:
        dim: width of the residual stream.
        n_layers: number of transformer blocks.
        n_heads: number of query heads; each is `dim / n_heads` wide.
        n_kv_heads: number of key and value heads (grouped-query attention); divides `n_heads`.
        vocab_size: rows of the embedding.
        multiple_of: the SwiGLU width is rounded up to a multiple of this.
        ffn_dim_multiplier: factor on the SwiGLU width before rounding; None is 1.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the RoPE frequencies.
        rope_scaling: Llama 3.1's stretching of RoPE, or None.
        context: longest documented sequence, in tokens.
        tie_word_embeddings: whether the head is the embedding.
        bos_token_id: first token of every document; None where no public source states it.
        eos_token_id: token or tokens that end a text; None where no public source states it.
        intermediate_size_override: the SwiGLU width itself, where a model states only that.
        max_batch_size: rows Meta's own inference code reserves its cache for (runtime only).
        max_seq_len: tokens Meta's own inference code reserves its cache for (runtime only).

    Raises:
        InputError: the numbers contradict each other; every finding is in it.

    Source: `ModelArgs` in meta-llama/llama (v1, v2), meta-llama/llama3 and
        meta-llama/llama-models, whose runtime defaults are max_batch_size 32, max_seq_len 2048.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    context: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    intermediate_size_override: int | None = None
    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        if found := self._findings():
            raise InputError(found)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def use_scaled_rope(self) -> bool:
        """Meta's name for: `rope_scaling` is set."""
        return self.rope_scaling is not None

    @property
    def intermediate_size(self) -> int:
        """Width of the SwiGLU layer.

        Two thirds of `4 * dim`, times the multiplier, rounded up to a multiple of `multiple_of`;
        each step truncates as Meta's code does.

        Source: `FeedForward.__init__` in meta-llama/llama and meta-llama/llama-models.
        """
        if self.intermediate_size_override is not None:
            return self.intermediate_size_override
        return swiglu_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ending tokens, as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def num_parameters(self) -> PartCounts:
        """Parameters by part; a tied head counts once, with the embedding."""
        kv_width = self.n_kv_heads * self.head_dim
        return PartCounts(
            embedding=self.vocab_size * self.dim,
            attention=self.n_layers * 2 * self.dim * (self.dim + kv_width),
            mlp=self.n_layers * 3 * self.dim * self.intermediate_size,
            norm=(2 * self.n_layers + 1) * self.dim,
            head=0 if self.tie_word_embeddings else self.vocab_size * self.dim,
        )

    def flops_per_token(self, num_attended_tokens: int = 0) -> PartCounts:
        """FLOPs of the forward pass for one token, by part; a backward pass is twice as much.

        Two for every weight of a matrix, and four per attended token and query channel
        (scores and weighted sum). A look-up costs nothing; norms, RoPE, softmax and SiLU are
        left out, as is usual.

        Args:
            num_attended_tokens: tokens this one looks at, itself included; the mean over a causal
                sequence of `n` tokens is `(n + 1) / 2`.
        """
        weights = self.num_parameters()
        scores = 4 * self.n_layers * self.dim * num_attended_tokens
        return PartCounts(
            embedding=0,
            attention=2 * weights.attention + scores,
            mlp=2 * weights.mlp,
            norm=0,
            head=2 * self.vocab_size * self.dim,
        )

    def _findings(self) -> list[str]:
        found = [
            f"{name}: {getattr(self, name)} is not allowed; it must be at least 1"
            for name in _COUNTS
            if getattr(self, name) < 1
        ]
        if min(self.dim, self.n_heads, self.n_kv_heads) >= 1:
            found += self._head_findings()
        if self.intermediate_size_override is not None and self.intermediate_size_override < 1:
            found.append(f"intermediate_size: {self.intermediate_size_override} must be at least 1")
        if self.ffn_dim_multiplier is not None and not self.ffn_dim_multiplier > 0:
            found.append(f"ffn_dim_multiplier: {self.ffn_dim_multiplier} must be above 0")
        if not 0 < self.norm_eps < 1:
            found.append(f"norm_eps: {self.norm_eps} must lie between 0 and 1")
        if not self.rope_theta > 1:
            found.append(f"rope_theta: {self.rope_theta} must be above 1")
        if self.rope_scaling is not None:
            found += self.rope_scaling.findings()
        return found + self._special_id_findings()

    def _head_findings(self) -> list[str]:
        found = []
        if self.dim % self.n_heads:
            found.append(f"n_heads: {self.n_heads} does not divide dim {self.dim}")
        elif self.head_dim % 2:
            found.append(f"dim / n_heads: a head width of {self.head_dim} is odd; RoPE needs pairs")
        if self.n_heads % self.n_kv_heads:
            found.append(f"n_kv_heads: {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        return found

    def _special_id_findings(self) -> list[str]:
        ids: list[tuple[str, int | None]] = [("bos_token_id", self.bos_token_id)]
        ids += [("eos_token_id", token_id) for token_id in self.eos_token_ids]
        return [
            f"{name}: {token_id} lies outside the vocabulary of {self.vocab_size}"
            for name, token_id in ids
            if token_id is not None and not 0 <= token_id < self.vocab_size
        ]


def swiglu_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Meta's formula for the width of the SwiGLU layer; see `Architecture.intermediate_size`."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)
