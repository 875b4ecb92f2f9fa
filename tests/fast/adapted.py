"""A Llama with an adapter that does something."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model

from finetune.fast.lora import projection_of

ALL = [*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")]


def with_adapter(model, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, **settings}
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def projections_of(layers):
    """Of each layer; None where it is not plain LoRA."""
    return [projection_of(layer) for layer in layers]
