"""Initialisations of LoRA that take a part of the base's weights: PiSSA and OLoRA.

    W_rest = W - s·B0·A0      in memory only; then W_rest + s·B·A is trained

The adapter that is published is a plain LoRA of twice the rank on the untouched base,

    W + s·[B, -B0]·[A; A0] = W_rest + s·B·A

so that it loads anywhere, on the base that everyone has. A0 and B0 are kept in the run's `start/`:
a run that goes on takes the same part out of the base again, bit for bit, on any machine.

Sources: PiSSA, Meng et al. 2024, arXiv:2404.02948 (conversion: appendix C); OLoRA, Büyükakyüz
2024, arXiv:2406.01775.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from finetune import artifact
from finetune.config.adapter import CHANGES_BASE

_FILE = "start.safetensors"


def keep_start(model: PeftModel, folder: Path) -> None:
    """Publishes A0 and B0 of a model that PEFT has just initialised."""
    with artifact.staged(folder, {"kind": "start"}) as stage:
        save_file(_tensors(model), str(stage / _FILE))


def restore_start(model: PeftModel, folder: Path) -> None:
    """Puts A0 and B0 into an adapter and takes s·B0·A0 out of the base, in PEFT's arithmetic.

    Raises:
        CheckFailed: the folder is not as it was published.
    """
    artifact.verify(folder)
    set_peft_model_state_dict(model, load_file(str(folder / _FILE)))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer().weight
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rest = base.data.float() - layer.scaling["default"] * b.data @ a.data
            base.data = rest.to(base.dtype)


def changes_base(config: Any) -> bool:
    """Whether PEFT's settings name an initialisation that takes from the base."""
    return getattr(config, "init_lora_weights", True) in CHANGES_BASE


def save_as_plain_lora(model: PeftModel, start: Path, folder: Path) -> None:
    """Writes the adapter as a plain LoRA of twice the rank on the untouched base."""
    artifact.verify(start)
    first, now = load_file(str(start / _FILE)), _tensors(model)
    joined = {
        name: torch.cat([tensor, first[name]], 0)
        if ".lora_A." in name
        else torch.cat([tensor, -first[name]], 1)
        for name, tensor in now.items()
    }
    save_file(joined, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    _of_twice_the_rank(model.peft_config["default"]).save_pretrained(str(folder))


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The settings whose scale is the same at twice the rank; rsLoRA divides by the root of it."""
    plain = copy.deepcopy(config)
    factor = math.sqrt(2) if config.use_rslora else 2
    plain.init_lora_weights = True
    plain.inference_mode = True
    plain.r, plain.lora_alpha = config.r * 2, config.lora_alpha * factor
    plain.rank_pattern = {name: rank * 2 for name, rank in config.rank_pattern.items()}
    plain.alpha_pattern = {name: a * factor for name, a in config.alpha_pattern.items()}
    return plain


def _tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
