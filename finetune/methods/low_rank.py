"""LoRA and what was made of it: updates of a matrix that are products of two thin ones."""

from __future__ import annotations

from typing import Any

from finetune.config.adapter import AdapterSection
from finetune.methods.method import Matrix, Method, common, of_pattern, where


class Lora(Method):
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
            "init_lora_weights": True if adapter.init == "default" else adapter.init,
            "rank_pattern": dict(adapter.rank_pattern),
            "alpha_pattern": dict(adapter.alpha_pattern),
            "bias": "none",
            **where(adapter),
            **common(base_name),
        }

    def num_of(self, matrix: Matrix, adapter: AdapterSection) -> int:
        """r · (in + out), with the rank of this matrix."""
        rank = of_pattern(adapter.rank_pattern, matrix.name, adapter.r)
        return rank * (matrix.num_in + matrix.num_out)


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


class LoHa(Method):
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
