"""Memory of a training step's activations, counted by running it on tensors that have none.

torch's fake tensors have a shape, a type and a device, and no numbers. One decoder layer with its
adapter, and the head, run forward and backward on them exactly as `train` runs them; whatever is
alive at a time is summed. So a layer of 405B is counted on a laptop, for any method.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from finetune.config import RunConfig
from finetune.config.adapter import SOFT_PROMPTS
from finetune.fast.attention import as_on_gpu, no_mask, register
from finetune.fast.blocks import speed_up
from finetune.fast.head import head_losses, plain_losses
from finetune.llama.architecture import Architecture, to_llama_config
from finetune.methods import method_of
from finetune.precision import uses_bf16_autocast


@dataclass(frozen=True)
class Footprint:
    """Bytes of a piece of the model while it trains.

    Attributes:
        kept: alive between its forward and its backward pass, its output included.
        peak: the most at once during both, its input not included.
    """

    kept: int
    peak: int


def layer_footprint(
    config: RunConfig, arch: Architecture, lengths: list[int], device: str = "cpu"
) -> Footprint:
    """Of one decoder layer with its adapter.

    Args:
        lengths: tokens of each document of a micro-batch.
        device: `cpu` or `cuda`. Fake tensors of a GPU need a GPU; its kernels keep what those of
            the CPU keep, without the CPU's float32 copies for attention.
    """
    layer = build_layer(config, arch)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu(device == "cuda"):
        return _counted(layer_pass(layer, config, arch, lengths, device))


def head_footprint(
    config: RunConfig, arch: Architecture, supervised: int, device: str = "cpu"
) -> Footprint:
    """Of the head and the loss on a micro-batch's supervised tokens."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _counted(head_pass(config, arch, supervised, device))


def layer_pass(
    layer: torch.nn.Module, config: RunConfig, arch: Architecture, lengths: list[int], device: str
) -> Callable[[], torch.Tensor]:
    """A forward pass of a layer of `build_layer`, on tensors as the mode around it makes them.

    Args:
        device: that would train; the tensors may lie on another.
    """
    _fill(layer)
    dtype, tokens = getattr(torch, config.base.dtype), sum(lengths)
    hidden = torch.randn(1, tokens, arch.dim, dtype=dtype, requires_grad=True)
    angles = torch.rand(1, tokens, arch.head_dim, dtype=dtype)

    def run() -> torch.Tensor:
        with _products(config, device, hidden.device.type):
            return layer(
                hidden,
                attention_mask=no_mask(hidden.device),
                position_embeddings=(angles, angles),
                document_lengths=lengths,
            )

    return run


def head_pass(
    config: RunConfig, arch: Architecture, supervised: int, device: str
) -> Callable[[], torch.Tensor]:
    """A forward pass of head and loss, likewise."""
    dtype, trains = getattr(torch, config.base.dtype), config.adapter.method == "none"
    hidden = torch.randn(supervised, arch.dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(arch.vocab_size, arch.dim, dtype=dtype, requires_grad=trains)
    targets = torch.zeros(supervised, dtype=torch.int64)

    def run() -> torch.Tensor:
        with _products(config, device, hidden.device.type):
            if config.fast.loss and not _has_wrapped_head(config, arch):
                return head_losses(hidden, weight, targets)
            return plain_losses(torch.nn.functional.linear(hidden, weight), targets)

    return run


def _has_wrapped_head(config: RunConfig, arch: Architecture) -> bool:
    """Whether PEFT stands around the head: tokens that train, in an embedding that is the head."""
    return config.adapter.method == "trainable_tokens" and arch.tie_word_embeddings


def _products(config: RunConfig, device: str, tensors: str) -> Any:
    """The context of a forward pass: autocast where the config has it on `device`."""
    autocast = uses_bf16_autocast(config, device)
    return torch.autocast(tensors, torch.bfloat16, enabled=autocast)


def build_layer(config: RunConfig, arch: Architecture) -> Any:
    """A decoder layer as `train` has it, in training mode."""
    llama_config = to_llama_config(replace(arch, n_layers=1))
    llama_config._attn_implementation = register()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(llama_config).to(getattr(torch, config.base.dtype))
        layers, adapter, fast = model.model.layers, config.adapter, config.fast
        if adapter.method != "none" and adapter.method not in SOFT_PROMPTS:
            # initialisations look at numbers; a layer's memory does not depend on them
            plain = adapter.model_copy(update={"init": type(adapter).model_fields["init"].default})
            model.name_or_path = "base"  # else PEFT warns of a renaming
            model = get_peft_model(model, method_of(plain).peft_config(plain, "base"))
    if config.base.quantization != "none":
        fast = fast.model_copy(update={"lora": False})  # bitsandbytes' layers run PEFT's own code
    speed_up(model, fast)
    return layers[0].train()


def _fill(layer: torch.nn.Module) -> None:
    """Weights, fake where the mode around it is, in the place of those without memory."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.02)
                module._parameters[name] = torch.nn.Parameter(made, parameter.requires_grad)


def _counted(run: Callable[[], torch.Tensor]) -> Footprint:
    with LiveBytes() as live:
        output = run()
        kept = live.now
        output.sum().backward()
        return Footprint(kept, live.peak)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made while it is on and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _held(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _held(leaf) and id(leaf.untyped_storage()) not in before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def _held(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
