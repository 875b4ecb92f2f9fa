"""LoRA and what was made of it: updates of a matrix that are products of two thin ones."""

from __future__ import annotations

import math
from typing import Any

from finetune.config.adapter import AdapterSection
from finetune.llama.architecture import Architecture
from finetune.methods.method import Matrix, MatrixMethod, common, of_pattern, targeted, where

# LoftQ is put in afterwards: PEFT's own needs CUDA (finetune.data_starts).
_PEFT_INIT: dict[str, bool] = {"default": True, "loftq": True}


class Lora(MatrixMethod):
    """LoRA: W' = W + s·B·A,  A: (r, in), B: (out, r),  s = lora_alpha / r (rsLoRA: / sqrt(r)).

    Paper: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    Cost: r · (in + out) parameters a matrix.
    When: the first choice. rsLoRA where r is above about 32, so that the update does not fade.
    """

    name = "lora"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(**self._settings(adapter, base_name))

    def _settings(self, adapter: AdapterSection, base_name: str) -> dict[str, Any]:
        return {
            "r": adapter.r,
            "lora_alpha": adapter.lora_alpha,
            "lora_dropout": adapter.lora_dropout,
            "use_rslora": adapter.use_rslora,
            "init_lora_weights": _PEFT_INIT.get(adapter.init, adapter.init),
            "rank_pattern": dict(adapter.rank_pattern),
            "alpha_pattern": dict(adapter.alpha_pattern),
            "bias": "none",
            **where(adapter),
            **common(base_name),
        }

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """r · (in + out), with the rank of this matrix."""
        return _rank_of(matrix, adapter) * (matrix.num_in + matrix.num_out)

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """Directions of W, or of what it reads, are no more than its smaller side."""
        found = super().findings(adapter, arch)
        if found or adapter.init in ("default", "gaussian"):
            return found
        for matrix in targeted(adapter, arch):
            if (rank := _rank_of(matrix, adapter)) > min(matrix.num_in, matrix.num_out):
                return [
                    f"adapter.r: found {rank} with adapter.init: {adapter.init}; {matrix.name} is "
                    f"{matrix.num_out} by {matrix.num_in} and has no more directions than that"
                ]
        return []


def _rank_of(matrix: Matrix, adapter: AdapterSection) -> int:
    return of_pattern(adapter.rank_pattern, matrix.name, adapter.r)


class Dora(Lora):
    """DoRA: W' = m · (W + s·B·A) / ||W + s·B·A||, the norm of each row, m: (out,) trained.

    Paper: Liu et al. 2024, arXiv:2402.09353. The norm takes no part in the gradient (section 4.3).
    Cost: r · (in + out) + out parameters a matrix; the norms make every step slower.
    When: small ranks, where direction and size of the update want to move apart.
    """

    name = "dora"

    def _settings(self, adapter: AdapterSection, base_name: str) -> dict[str, Any]:
        return {**super()._settings(adapter, base_name), "use_dora": True}

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """LoRA's, and the magnitude of every row."""
        return super().num_of(matrix, adapter) + matrix.num_out


class LoraPlus(Lora):
    """LoRA+: LoRA whose B learns faster than its A, by `loraplus_lr_ratio`.

    Paper: Hayou et al. 2024, arXiv:2402.12354 (ratio about 16). Weights and cost: LoRA's.
    When: LoRA learns too slowly at the largest learning rate that A bears.
    """

    name = "lora+"


class AdaLora(MatrixMethod):
    """AdaLoRA: W' = W + s·B·diag(e)·A, s = lora_alpha / init_r; the least useful of all e are set
    to 0 on the way, until `target_r` a matrix are left on average.

    Penalty: orth_reg_weight · mean over all A and B of ||A·Aᵀ - I||, the Frobenius norm.
    Paper: Zhang et al. 2023, arXiv:2303.10512. Published as a plain LoRA with a rank for each
    matrix: e is multiplied into A.
    Cost: init_r · (in + out + 1) parameters a matrix while training; a score for each of them.
    When: the rank each matrix needs is not known, and what is served has to be small.
    """

    name = "adalora"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's AdaLoraConfig; its schedule is set when the run's steps are known."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=adapter.init_r,
            target_r=adapter.target_r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            deltaT=adapter.deltaT,
            orth_reg_weight=adapter.orth_reg_weight,
            total_step=1,
            **where(adapter),
            **common(base_name),
        )

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """A, B and e."""
        return adapter.init_r * (matrix.num_in + matrix.num_out + 1)

    def findings(self, adapter: AdapterSection, arch: Architecture) -> list[str]:
        """Ranks fall, or there is nothing to choose."""
        found = super().findings(adapter, arch)
        if adapter.target_r >= adapter.init_r:
            found.append(
                f"adapter.target_r: found {adapter.target_r}; it is less than init_r "
                f"({adapter.init_r}), or lora does the same for less"
            )
        return found


class Vera(MatrixMethod):
    """VeRA: W' = W + diag(b)·B·diag(d)·A; A and B are random, frozen, and shared by all matrices.

    Paper: Kopiczko et al. 2023, arXiv:2310.11454 (rank 256 and more, a rate some ten times
    LoRA's). Each matrix takes the part of A (r, widest in) and B (widest out, r) that it needs.
    Cost: r + out parameters a matrix; A and B are in the file too, so that it loads anywhere.
    When: very many adapters of one base.
    """

    name = "vera"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's VeraConfig."""
        from peft import VeraConfig

        return VeraConfig(r=adapter.r, save_projection=True, **where(adapter), **common(base_name))

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """d and b."""
        return adapter.r + matrix.num_out

    def num_frozen(self, adapter: AdapterSection, arch: Architecture) -> int:
        """A and B."""
        matrices = targeted(adapter, arch)
        return adapter.r * (max(m.num_in for m in matrices) + max(m.num_out for m in matrices))


class LoHa(MatrixMethod):
    """LoHa: W' = W + s·(B1·A1) ∘ (B2·A2), entry by entry, s = lora_alpha / r; rank up to r².

    Paper: Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098.
    Cost: 2 · r · (in + out) parameters a matrix.
    When: an update of high rank for few parameters; slower than LoRA, B·A is built in full.
    """

    name = "loha"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's LoHaConfig."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=adapter.r, alpha=adapter.lora_alpha, **where(adapter), **common(base_name)
        )

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """Two pairs of thin matrices."""
        return 2 * adapter.r * (matrix.num_in + matrix.num_out)


class LoKr(MatrixMethod):
    """LoKr: W' = W + s·(C ⊗ B), Kronecker product of two small matrices, s = lora_alpha / r.

    in and out are each split into two factors near their square roots; B (the larger factors) is a
    product of rank r where r is less than half of its larger side, else one matrix (then s = 1).
    Paper: Yeh et al. 2023, LyCORIS, arXiv:2309.14859; Edalati et al. 2022, arXiv:2212.10650.
    Cost: about sqrt(in · out) parameters for each of the two.
    When: the smallest files that still touch every entry of W.
    """

    name = "lokr"

    def peft_config(self, adapter: AdapterSection, base_name: str) -> Any:
        """PEFT's LoKrConfig."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=adapter.r, alpha=adapter.lora_alpha, **where(adapter), **common(base_name)
        )

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """C in full, and B in full or as a product."""
        out_small, out_large = _near_root(matrix.num_out)
        in_small, in_large = _near_root(matrix.num_in)
        is_product = adapter.r < max(out_large, in_large) / 2
        large = adapter.r * (out_large + in_large) if is_product else out_large * in_large
        return out_small * in_small + large


def _near_root(number: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to its square root, the smaller first."""
    small = next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)
    return small, number // small
