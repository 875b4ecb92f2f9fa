"""Methods that turn, scale or shift a matrix without a product of two thin ones."""

from __future__ import annotations

from typing import Any

from finetune.config.adapter import AdapterSection
from finetune.llama.architecture import Architecture
from finetune.methods.method import Matrix, Method, common, targeted, where


class Oft(Method):
    """OFT: W' = W·R, R block-diagonal and orthogonal, each block a Cayley transform of a skew Q.

    Paper: Qiu et al. 2023, arXiv:2306.07280; PEFT sums the first terms of the Neumann series for
    the inverse (OFTv2, Qiu et al. 2025, arXiv:2506.19847).
    Cost: in · (b - 1) / 2 parameters a matrix, b = oft_block_size.
    When: what the base knows should stay; angles between the rows of a block are kept.
    """

    name = "oft"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's OFTConfig."""
        from peft import OFTConfig

        return OFTConfig(
            r=0, oft_block_size=adapter.oft_block_size, **where(adapter), **common(base_name)
        )

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """The upper triangle of a skew block, for each block of columns."""
        size = adapter.oft_block_size
        return matrix.num_in // size * (size * (size - 1) // 2)

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """PEFT would take another block size with a warning."""
        size, found = adapter.oft_block_size, super().findings(adapter, arch)
        widths = {} if found else {m.num_in: m.name for m in targeted(adapter, arch)}
        return found + [
            f"adapter.oft_block_size: found {size}; {name} has {width} columns, no multiple of it"
            for width, name in widths.items()
            if width % size
        ]


class Ia3(Method):
    """(IA)3: y' = l ∘ (W·x); on down_proj, which reads the inner activations, y' = W·(l ∘ x).

    Paper: Liu et al. 2022, arXiv:2205.05638: keys, values and inner activations (the default).
    Cost: out parameters a matrix (down_proj: in).
    When: very little data, or very many adapters; the rate is about ten times LoRA's.
    """

    name = "ia3"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's IA3Config."""
        from peft import IA3Config

        targets = list(adapter.target_modules)
        inner = [name for name in targets if name == "down_proj"]
        return IA3Config(target_modules=targets, feedforward_modules=inner, **common(base_name))

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """One factor a row, or a column of down_proj."""
        return matrix.num_in if matrix.name.endswith("down_proj") else matrix.num_out


class Miss(Method):
    """MiSS: y' = W·x + Dᵀ·S(x), S sums x over its positions modulo r; D: (r, out).

    Paper: Kang and Yin 2024, arXiv:2409.15371.
    Cost: r · out parameters a matrix, less than half of LoRA's at the same r.
    When: memory counts: no second thin matrix, no product of two.
    """

    name = "miss"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's MissConfig."""
        from peft import MissConfig

        return MissConfig(r=adapter.r, **where(adapter), **common(base_name))

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """One row of `out` for each of the r sums."""
        return adapter.r * matrix.num_out
