"""Methods that turn, scale or shift a matrix without a product of two thin ones."""

from __future__ import annotations

from typing import Any

from finetune.config.adapter import AdapterSection
from finetune.llama.architecture import Architecture
from finetune.methods.method import Matrix, MatrixMethod, Method, common, targeted, where

NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


class Oft(MatrixMethod):
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
        found = super().findings(adapter, arch)
        return found or _undivided("oft_block_size", adapter, arch)


class Boft(MatrixMethod):
    """BOFT: W' = diag(s)·W·R, R block-diagonal and orthogonal (a Cayley transform), s trained.

    Paper: Liu et al. 2023, arXiv:2311.06243. One butterfly factor: PEFT turns more of them into
    one wherever its CUDA extension is not built, so that a config would mean two things.
    Cost: in · b + out parameters a matrix, b = boft_block_size (skew parts are kept in full), and
    in² float32 numbers that do not train.
    When: OFT with small blocks whose rows may change their size too.
    """

    name = "boft"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's BOFTConfig."""
        from peft import BOFTConfig

        return BOFTConfig(
            boft_block_size=adapter.boft_block_size,
            boft_n_butterfly_factor=1,
            **where(adapter),
            **common(base_name),
        )

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """A block for each group of columns, and a factor a row."""
        return matrix.num_in * adapter.boft_block_size + matrix.num_out

    def num_frozen(self, adapter: AdapterSection, arch: Architecture) -> int:
        """PEFT's permutation of every matrix's inputs, as a matrix."""
        return sum(matrix.num_in**2 for matrix in targeted(adapter, arch))

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """PEFT refuses a block that does not divide, in words of its own."""
        found = super().findings(adapter, arch)
        return found or _undivided("boft_block_size", adapter, arch)


class Hra(MatrixMethod):
    """HRA: W' = W·H1·…·Hr, a chain of Householder reflections, H = I - 2·u·uᵀ / (uᵀ·u).

    Paper: Yuan et al. 2024, arXiv:2405.17484. It starts with equal pairs, each its own inverse.
    Cost: r · in parameters a matrix, r even.
    When: an orthogonal update of low rank; between OFT and LoRA.
    """

    name = "hra"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's HRAConfig."""
        from peft import HRAConfig

        return HRAConfig(r=adapter.r, **where(adapter), **common(base_name))

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """One direction for each reflection."""
        return adapter.r * matrix.num_in

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """An odd number of reflections does not start as the base."""
        found = super().findings(adapter, arch)
        if adapter.r % 2:
            found.append(f"adapter.r: found {adapter.r}; reflections come in pairs: an even number")
        return found


class Ia3(MatrixMethod):
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


class Miss(MatrixMethod):
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


class LnTuning(Method):
    """LN tuning: the weights of every RMSNorm are trained, and nothing else.

    Paper: Zhao et al. 2023, arXiv:2312.11420.
    Cost: (2 · layers + 1) · dim parameters.
    When: the least there is to train; a change of tone more than of knowledge.
    """

    name = "ln_tuning"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's LNTuningConfig."""
        from peft import LNTuningConfig

        return LNTuningConfig(target_modules=list(NORMS), **common(base_name))

    def num_trainable(self, adapter: AdapterSection, arch: Architecture) -> int:
        """Two norms a layer, and the last one."""
        return (2 * arch.n_layers + 1) * arch.dim

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """Every Llama has its norms."""
        return []


def _undivided(key: str, adapter: AdapterSection, arch: Architecture) -> list[str]:
    """The targeted widths that blocks of this size do not fill."""
    size = getattr(adapter, key)
    widths = {matrix.num_in: matrix.name for matrix in targeted(adapter, arch)}
    return [
        f"adapter.{key}: found {size}; {name} has {width} columns, no multiple of it"
        for width, name in widths.items()
        if width % size
    ]
