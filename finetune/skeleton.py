"""A Llama whose parts get their weights when their turn comes, and lose them afterwards.

The whole module tree, PEFT's layers and bitsandbytes' included, is built on torch's meta device,
where a tensor has a shape and no memory. `filled` puts one part's weights in from files. So a model
of any size runs layer by layer in the memory of one layer, by the libraries' own forward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaForCausalLM

from finetune.adapters import ADAPTER_FILES
from finetune.config.base import BaseSection
from finetune.fast.attention import register
from finetune.identity import settings_of
from finetune.layer_merge import SHARED
from finetune.llama.architecture import to_llama_config
from finetune.llama.weight_files import files_by_weight
from finetune.model import Base, quantization_config

PREFIX = "base_model.model."


class Weights:
    """The weights of a Hugging Face folder, read by the safetensors library.

    Every read maps the file anew: pages of an open map would count as this process's memory.

    Args:
        folder: the folder.
        change: applied to each tensor that is read, with its name.
    """

    def __init__(
        self, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self._files = files_by_weight(folder)
        self._change = change or (lambda _, tensor: tensor)

    def names(self) -> set[str]:
        """All of them."""
        return set(self._files)

    def shape(self, name: str) -> list[int]:
        """Of a weight."""
        with safe_open(str(self._files[name]), framework="pt") as file:
            shape: list[int] = file.get_slice(name).get_shape()
            return shape

    def tensor(self, name: str) -> torch.Tensor:
        """A whole weight."""
        with safe_open(str(self._files[name]), framework="pt") as file:
            return self._change(name, file.get_tensor(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of it, in memory of their own."""
        with safe_open(str(self._files[name]), framework="pt") as file:
            return self._change(name, file.get_slice(name)[start:stop].clone())


class AdapterSource(Protocol):
    """An adapter whose numbers are asked for one tensor at a time."""

    def config(self) -> PeftConfig:
        """PEFT's settings of it."""
        ...

    def names(self) -> set[str]:
        """Its tensors, as in PEFT's file."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One of them, in the type it is computed in."""
        ...


class AdapterFolder:
    """An adapter in PEFT's format, float32."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._weights = folder, str(folder / ADAPTER_FILES[1])

    def config(self) -> PeftConfig:
        """As PEFT reads them."""
        return PeftConfig.from_pretrained(str(self._folder))

    def names(self) -> set[str]:
        """Of all its tensors."""
        with safe_open(self._weights, framework="pt") as file:
            return set(file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """One of them, float32."""
        with safe_open(self._weights, framework="pt") as file:
            return file.get_tensor(name).float()


class Skeleton:
    """A Llama on the meta device, with or without an adapter.

    Attributes:
        dtype: what its own weights are computed in; an adapter's stay as their source has them.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, adapter: AdapterSource | None = None
    ) -> None:
        self.dtype = dtype
        self._model, self._adapter = model, adapter
        self._llama: LlamaForCausalLM = model if adapter is None else model.get_base_model()
        self._adapter_names = adapter.names() if adapter else set()

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self._llama.model.layers

    @property
    def norm(self) -> Any:
        """The final norm."""
        return self._llama.model.norm

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """What PEFT's layers expect of an adapter's file, without its prefix."""
        return {
            name_in_file(name): tuple(parameter.shape)
            for name, parameter in self._llama.named_parameters()
            if ".default" in name
        }

    @contextlib.contextmanager
    def filled(self, part: torch.nn.Module, weights: Weights) -> Iterator[Any]:
        """A part of the model with its weights in memory while the block runs."""
        prefix = next(n for n, module in self._llama.named_modules() if module is part)
        owners = dict(part.named_modules())
        places = [name.rpartition(".") for name, _ in part.named_parameters()]
        empty = [(owners[o], leaf, owners[o]._parameters[leaf]) for o, _, leaf in places]
        try:
            for (owner, _, leaf), (module, _, old) in zip(places, empty, strict=True):
                name = ".".join(filter(None, (prefix, owner, leaf)))
                module._parameters[leaf] = self._parameter(name, old, module, weights)
            yield part
        finally:
            for module, leaf, old in empty:
                module._parameters[leaf] = old

    def _parameter(
        self, name: str, old: Any, module: torch.nn.Module, weights: Weights
    ) -> torch.nn.Parameter:
        key = PREFIX + name_in_file(name)
        if key in self._adapter_names:
            assert self._adapter is not None
            return torch.nn.Parameter(self._adapter.tensor(key), requires_grad=False)
        tensor = weights.tensor(name.replace(".base_layer", "")).to(self.dtype)
        if type(old) is not torch.nn.Parameter:
            return quantized_like(old, tensor, module)
        return torch.nn.Parameter(tensor, requires_grad=False)


def name_in_file(name: str) -> str:
    """A parameter's name as PEFT writes it: without the adapter's, and DoRA's without `weight`."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


def plain_skeleton(base: Base, dtype: torch.dtype) -> Skeleton:
    """A Llama of the base's architecture, without an adapter."""
    return Skeleton(_empty_llama(base), dtype)


def attached_skeleton(
    base: Base,
    adapter: Path | AdapterSource,
    dtype: torch.dtype = torch.float32,
    quantized: BaseSection | None = None,
) -> Skeleton:
    """The same under PEFT's own layers of an adapter.

    Args:
        quantized: a section whose quantisation the linear layers get, as in training.
    """
    llama = _empty_llama(base)
    if quantized is not None:
        make_quantized(llama, quantized)
    if not isinstance(adapter, Path):
        return _attached(llama, adapter, dtype)
    with settings_of(adapter, [name for name, _ in llama.named_modules()]):
        return _attached(llama, AdapterFolder(adapter), dtype)


def _attached(llama: LlamaForCausalLM, source: AdapterSource, dtype: torch.dtype) -> Skeleton:
    config: Any = source.config()
    config.inference_mode = True
    llama.name_or_path = config.base_model_name_or_path or ""  # else PEFT warns of a renaming
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # the file's weights follow; nothing to initialise
    with copyable(llama):
        model: Any = get_peft_model(
            llama, config, autocast_adapter_dtype=True, low_cpu_mem_usage=True
        )
    for name in SHARED:
        if name in source.names():  # one for all layers, and so there from the start
            getattr(model.base_model, name.removeprefix("base_model."))["default"] = source.tensor(
                name
            )
    return Skeleton(model.eval(), dtype, source)


def _empty_llama(base: Base) -> LlamaForCausalLM:
    config = to_llama_config(base.architecture)
    config._attn_implementation = register()
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def make_quantized(llama: LlamaForCausalLM, section: BaseSection) -> None:
    """Puts bitsandbytes' layers, without numbers, in the place of the linear ones."""
    from transformers.integrations import replace_with_bnb_linear

    settings = quantization_config(section)
    replace_with_bnb_linear(llama, ["lm_head"], quantization_config=settings)
    # PEFT looks at these to choose its own layers for bitsandbytes'.
    llama.is_loaded_in_8bit = section.quantization == "int8"
    llama.is_loaded_in_4bit = not llama.is_loaded_in_8bit


@contextlib.contextmanager
def copyable(llama: LlamaForCausalLM) -> Iterator[None]:
    """Plain parameters in the place of 4-bit ones.

    DoRA copies a layer to measure its rows, and bitsandbytes' parameters without numbers cannot be.
    """
    packed = [(m, m.weight) for m in llama.modules() if type(m).__name__ == "Linear4bit"]
    for layer, weight in packed:
        plain = torch.nn.Parameter(torch.empty_like(weight.data), requires_grad=False)
        plain.__dict__.update(weight.__dict__)  # PEFT reads the settings of the codes from it
        layer.weight = plain
    yield
    for layer, weight in packed:
        layer.weight = weight


def quantized_like(old: Any, tensor: torch.Tensor, module: torch.nn.Module) -> Any:
    """A tensor in bitsandbytes' codes, with the settings of the empty parameter it replaces."""
    if type(old).__name__ == "Int8Params":
        return type(old)(tensor, requires_grad=False, has_fp16_weights=False).to("cpu")
    settings = {
        key: old.__dict__[key] for key in ("blocksize", "compress_statistics", "quant_type")
    }
    return type(old)(tensor, requires_grad=False, module=module, **settings).to("cpu")
