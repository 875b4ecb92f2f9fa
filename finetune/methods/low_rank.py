"""LoRA and what was made of it: updates of a matrix that are products of two thin ones."""

from __future__ import annotations

from typing import Any

from finetune.config.adapter import AdapterSection
from finetune.methods.method import Matrix, Method, of_pattern


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
            "target_modules": list(adapter.target_modules),
            "layers_to_transform": list(adapter.layers) or None,
            "bias": "none",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
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
