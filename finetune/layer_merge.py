"""One merged weight at a time, with PEFT's own arithmetic and the memory of one layer.

A model of a single linear layer (or embedding) gets PEFT's layer for it, the layer's tensors of the
adapter file, and PEFT's own merge. Nothing of the arithmetic is written here, so every method that
PEFT can merge is merged as PEFT does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from finetune.errors import CheckFailed

SHARED = ("base_model.vera_A", "base_model.vera_B")
"""Tensors that every layer takes its part of: the first rows and columns, as many as it has."""


def merged_weight(
    config: PeftConfig, tensors: Mapping[str, torch.Tensor], module: str, weight: torch.Tensor
) -> torch.Tensor:
    """The weight of one layer with the adapter in it, in float32; in float64 where the base's is.

    Args:
        config: PEFT's settings of the adapter, as `PeftConfig.from_pretrained(folder)` reads them.
        tensors: the adapter file's tensors whose names contain `module`, and those of SHARED.
        module: the layer's name in the base, `model.layers.0.self_attn.q_proj`.
        weight: the base's: (out, in) of a linear layer, (ids, dim) of the embedding, (dim,) of a
            norm; it is not changed.

    Raises:
        CheckFailed: tensors are missing, left over or of another shape; or numbers not finite.
    """
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # PEFT draws a start that is overwritten at once
        peft_model = get_peft_model(one_layer(module, weight), settings_for(config, module))
    _load_strictly(peft_model, tensors, module)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckFailed(f"{module}: {error}") from error
    found: torch.Tensor = merged.get_submodule(module).weight.detach()
    return found


def tensors_of(tensors: Mapping[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors that `merged_weight` needs for a layer; none where it is unchanged."""
    own = {name: t for name, t in tensors.items() if f".{module}." in name}
    return own | {name: tensors[name] for name in SHARED if own and name in tensors}


def one_layer(module: str, weight: torch.Tensor) -> torch.nn.Module:
    """A model whose only layer has the name that patterns and layer numbers are matched against."""
    with torch.device("meta"):
        layer = _bare_layer(module, weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    numbers = weight.detach().to(dtype, copy=True)
    layer.weight = torch.nn.Parameter(numbers, requires_grad=False)
    root = torch.nn.Module()
    *parents, last = module.split(".")
    place = root
    for name in parents:
        place.add_module(name, torch.nn.Module())
        place = place.get_submodule(name)
    place.add_module(last, layer)
    return root


def _bare_layer(module: str, weight: torch.Tensor) -> Any:
    if weight.dim() == 1:
        return torch.nn.RMSNorm(len(weight))
    num_out, num_in = weight.shape
    if module.endswith("embed_tokens"):
        return torch.nn.Embedding(num_out, num_in)
    return torch.nn.Linear(num_in, num_out, bias=False)


def settings_for(config: PeftConfig, module: str) -> Any:
    """An adapter's settings for such a model."""
    settings = copy.deepcopy(config)
    settings.task_type = None  # a bare layer has none
    settings.inference_mode = True
    settings.base_model_name_or_path = None
    return settings


def _load_strictly(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], module: str
) -> None:
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    tensors = {
        name: tensor[tuple(map(slice, shapes[name]))]
        if name in SHARED and name in shapes
        else tensor
        for name, tensor in tensors.items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != found:
        differing = [
            f"{name} is {found.get(name, 'missing')}, needed {shapes.get(name, 'nowhere')}"
            for name in sorted(set(shapes) | set(found))
            if shapes.get(name) != found.get(name)
        ]
        raise CheckFailed(f"{module}: the adapter's tensors do not fit: {'; '.join(differing)}")
    dtypes = {name: tensor.dtype for name, tensor in expected.items()}
    set_peft_model_state_dict(model, {name: t.to(dtypes[name]) for name, t in tensors.items()})
