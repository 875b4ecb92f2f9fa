"""AdaLoRA's part of a training step: its penalty, its ranks that fall, and both in a checkpoint.

    loss of a step = token loss + orth_reg_weight · mean over all A and B of ||P·Pᵀ - I||

The arithmetic is PEFT's; when it acts, and that a run which goes on finds its scores again, is
ours. Source: Zhang et al. 2023, arXiv:2303.10512, equations 4 (penalty), 9 to 11 (scores), 13
(budget).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from finetune import artifact
from finetune.config.adapter import AdapterSection
from finetune.errors import InputError
from finetune.state_files import as_written, check_ranks, read_state

_SCORES, _RANKS = "rank_scores.safetensors", "ranks.json"


class RankSchedule(TrainerCallback):
    """Acts on one model while it trains.

    Args:
        model: with a fresh AdaLoRA adapter.
        adapter: its settings.
        num_steps: of the whole run.

    Raises:
        InputError: the run is too short for its phases.
    """

    def __init__(self, model: PeftModel, adapter: AdapterSection, num_steps: int) -> None:
        self._model: Any = model
        self._config: Any = model.peft_config["default"]
        first = num_steps // 10 if adapter.tinit is None else adapter.tinit
        last = num_steps * 3 // 10 if adapter.tfinal is None else adapter.tfinal
        if first + last >= num_steps:
            raise InputError(
                f"adapter.tinit {first} and adapter.tfinal {last} leave none of {num_steps} steps "
                "for ranks to fall in; give smaller ones, or train longer"
            )
        self._config.total_step, self._config.tinit, self._config.tfinal = num_steps, first, last

    def penalty(self) -> torch.Tensor:
        """How far the rows of A and the columns of B are from orthonormal; a scalar."""
        norms = []
        for layer in _layers(self._model):
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            for gram in (a @ a.T, b.T @ b):
                eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                norms.append(torch.linalg.matrix_norm(gram - eye))
        penalty: torch.Tensor = self._config.orth_reg_weight * torch.stack(norms).mean()
        return penalty

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the weights moved, before gradients are cleared: scores, and ranks to zero."""
        first = next(_layers(self._model)).lora_A["default"]
        if first.grad is None:  # a step of fillers alone
            return
        self._model.base_model.update_and_allocate(state.global_step + 1)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks that are left, by layer."""
        return {name: int(kept.sum()) for name, kept in _kept(self._model).items()}

    def save(self, folder: Path) -> None:
        """The scores so far, and what was masked."""
        allocator = self._model.base_model.rankallocator
        tensors = {f"ipt/{n}": t for n, t in allocator.exp_avg_ipt.items()}
        tensors |= {f"unc/{n}": t for n, t in allocator.exp_avg_unc.items()}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / _SCORES)
        artifact.write_json(folder / _RANKS, {"rank_pattern": self._config.rank_pattern})

    def load(self, folder: Path) -> None:
        """Puts scores and masks back.

        Raises:
            CheckFailed: they are of other matrices.
        """
        parameters = dict(self._model.base_model.model.named_parameters())
        step = artifact.read_manifest(folder)["facts"]["step"]
        with as_written(folder / _SCORES):
            scores = load_file(str(folder / _SCORES))
            if not scores and step < self._config.total_step - self._config.tfinal:
                raise ValueError("no scores, while ranks still fall by them")
            self._put_back(scores, parameters)
        saved = read_state(folder / _RANKS)
        with as_written(folder / _RANKS):
            ranks = {n: p.numel() for n, p in parameters.items() if ".lora_E." in n}
            check_ranks(saved["rank_pattern"], ranks)
        self._config.rank_pattern = saved["rank_pattern"]

    def _put_back(
        self, scores: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        allocator = self._model.base_model.rankallocator
        allocator.reset_ipt()
        kinds = {"ipt": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc}
        scored = {name: p for name, p in parameters.items() if ".lora_" in name}
        if scores and scores.keys() != {f"{kind}/{name}" for kind in kinds for name in scored}:
            raise ValueError("scores of other matrices")
        for key, tensor in scores.items():
            kind, _, name = key.partition("/")
            if tensor.shape != scored[name].shape or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{key} does not fit")
            tensor = tensor.to(scored[name].device, torch.float32)
            kinds[kind][name] = tensor
            allocator.ipt[name] = torch.zeros_like(tensor)  # is computed anew at every step


def is_adalora(config: Any) -> bool:
    """Whether PEFT's settings are AdaLoRA's."""
    return str(getattr(config.peft_type, "value", config.peft_type)) == "ADALORA"


def save_as_plain_lora(model: PeftModel, folder: Path) -> None:
    """Writes the adapter as a LoRA with a rank for each matrix: e and the scale go into A.

    A matrix without a rank left keeps one row of zeros, as LoRA has no rank 0.
    """
    tensors, ranks, kept = {}, {}, _kept(model)
    for name, layer in _named_layers(model):
        rows = kept[name] if bool(kept[name].any()) else torch.arange(len(kept[name])) == 0
        scale = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
        a = layer.lora_A["default"] * layer.lora_E["default"] * scale
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = a[rows].detach().cpu().contiguous()
        b = layer.lora_B["default"][:, rows]
        tensors[f"{key}.lora_B.weight"] = b.detach().cpu().contiguous()
        ranks[name] = int(rows.sum())
    save_file(tensors, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    _plain(model.peft_config["default"], ranks).save_pretrained(str(folder))


def _plain(config: Any, ranks: dict[str, int]) -> LoraConfig:
    return LoraConfig(
        r=config.target_r,
        lora_alpha=config.target_r,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),  # alpha over rank is 1
        target_modules=sorted(config.target_modules),
        layers_to_transform=config.layers_to_transform,
        lora_dropout=config.lora_dropout,
        bias="none",
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


def _kept(model: Any) -> dict[str, torch.Tensor]:
    """Layer -> which of its ranks are not masked, as booleans."""
    return {
        name: (layer.lora_E["default"] != 0).flatten().cpu() for name, layer in _named_layers(model)
    }


def _layers(model: Any) -> Any:
    return (layer for _, layer in _named_layers(model))


def _named_layers(model: Any) -> Any:
    """AdaLoRA's layers by the base's names."""
    return (
        (name, module)
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, AdaLoraLayer)
    )
