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
from finetune.fast.attention import no_mask, register
from finetune.fast.blocks import speed_up
from finetune.fast.frozen import stand_in_for_packed
from finetune.fast.head import head_losses, plain_losses
from finetune.fast.loss import Layout, lay_out, may_be_laid_out
from finetune.fast.place import as_on_gpu
from finetune.fast.products import makes_kernels
from finetune.llama.architecture import Architecture, to_llama_config
from finetune.methods import method_of
from finetune.precision import uses_bf16_autocast
from finetune.skeleton import copyable, make_quantized, quantized_like
from finetune.workload import MicroBatch

FIRST, MIDDLE, LAST = "first", "middle", "last"  # of the layers


@dataclass(frozen=True)
class Footprint:
    """Bytes of a piece of the model while it trains.

    Attributes:
        kept: alive between its forward and its backward pass, its output included.
        kept_pinned: the same in memory that is pinned, where torch takes powers of two.
        peak: the most at once during both, its input not included.
    """

    kept: int
    kept_pinned: int
    peak: int


@dataclass(frozen=True)
class LayerFootprints:
    """Of the model's layers.

    Attributes:
        middle: of each but the last.
        last: of the last, where tokens that the loss does not read end.
    """

    middle: Footprint
    last: Footprint


def layer_footprints(
    config: RunConfig, arch: Architecture, batch: MicroBatch, device: str = "cpu"
) -> LayerFootprints:
    """Of decoder layers with their adapters, on a micro-batch.

    Args:
        device: `cpu` or `cuda`. Fake tensors of a GPU need a GPU; its kernels keep what those of
            the CPU keep, without the CPU's float32 copies for attention.
    """
    layer = build_layer(config, arch)
    layout = layout_of(layer, config, batch, device)
    places = (MIDDLE, LAST)
    with FakeTensorMode(allow_non_fake_inputs=True), AnyNumber(), as_on_gpu(device == "cuda"):
        of = (layer_pass(layer, config, arch, batch, layout, place, device) for place in places)
        return LayerFootprints(*map(_counted, of))


def head_footprint(
    config: RunConfig, arch: Architecture, supervised: int, device: str = "cpu"
) -> Footprint:
    """Of the head and the loss on a micro-batch's supervised tokens."""
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu(device == "cuda"):
        return _counted(head_pass(config, arch, supervised, device))


def layout_of(layer: torch.nn.Module, config: RunConfig, batch: MicroBatch, device: str) -> Layout:
    """As the loss lays a micro-batch out; documents that are not known share nothing."""
    if batch.row is None:
        read = torch.arange(batch.supervised)
        return Layout(batch.tokens, read, read)
    fast, dtype = config.fast, getattr(torch, config.base.dtype)
    free = may_be_laid_out(layer, not fast.attention)
    few_sizes = free and device == "cpu" and makes_kernels(fast.products, dtype)
    return lay_out(batch.row, free and fast.beginnings, few_sizes)


def layer_pass(
    layer: torch.nn.Module,
    config: RunConfig,
    arch: Architecture,
    batch: MicroBatch,
    layout: Layout,
    place: str,
    device: str,
) -> Callable[[], torch.Tensor]:
    """A forward pass of a layer of `build_layer`, on tensors as the mode around it makes them.

    Args:
        layout: of the batch, by `layout_of`.
        place: of the layer. Nobody asks the first for the gradient of a frozen embedding.
        device: that would train; the tensors may lie on another.
    """
    dtype, num_tokens = getattr(torch, config.base.dtype), layout.num_tokens
    _fill(layer, dtype)
    numbers = torch.randn(1, num_tokens, arch.dim, dtype=dtype)
    angles = torch.rand(1, num_tokens, arch.head_dim, dtype=dtype)
    here, is_packed = numbers.device, config.fast.attention
    shared = {"tree": layout.tree, "document_lengths": batch.lengths} if is_packed else {}
    mask = no_mask(here) if is_packed else _dense_mask(num_tokens, here)
    asked = place != FIRST or _asks_for_inputs(config)
    read = layout.read.to(here) if place == LAST else None

    def run() -> torch.Tensor:
        layer.zero_grad()
        with _products(config, device, here.type):
            return layer(
                numbers.detach().requires_grad_(asked),
                attention_mask=mask,
                position_embeddings=(angles, angles),
                read=read,
                **shared,
            )

    return run


def _dense_mask(num_tokens: int, device: torch.device) -> torch.Tensor:
    """Of the shape of `document_mask`: time and memory do not depend on what it hides."""
    return torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=device).tril()


def _asks_for_inputs(config: RunConfig) -> bool:
    """Whether gradients go on below the first layer: to what trains there, or for recomputing."""
    trains = config.adapter.method in (*SOFT_PROMPTS, "none", "trainable_tokens")
    return trains or config.train.activation_checkpointing


def head_pass(
    config: RunConfig, arch: Architecture, supervised: int, device: str
) -> Callable[[], torch.Tensor]:
    """A forward pass of head and loss, likewise."""
    dtype, trains = getattr(torch, config.base.dtype), config.adapter.method == "none"
    hidden = torch.randn(supervised, arch.dim, dtype=dtype, requires_grad=True)
    # as small as real ones: far from the largest logit, products are of denormal numbers, and slow
    weight = torch.empty(arch.vocab_size, arch.dim, dtype=dtype).normal_(std=0.02)
    weight.requires_grad_(trains)
    targets = torch.zeros(supervised, dtype=torch.int64)

    def run() -> torch.Tensor:
        with _products(config, device, hidden.device.type):
            if config.fast.loss and not _has_wrapped_head(config, arch):
                return head_losses(hidden, weight, targets, config.fast.products)
            return plain_losses(torch.nn.functional.linear(hidden, weight), targets)

    return run


def _has_wrapped_head(config: RunConfig, arch: Architecture) -> bool:
    """Whether PEFT stands around the head: tokens that train, in an embedding that is the head."""
    return config.adapter.method == "trainable_tokens" and arch.tie_word_embeddings


def _products(config: RunConfig, device: str, tensors: str) -> Any:
    """The context of a forward pass: autocast where the config has it on `device`."""
    autocast = uses_bf16_autocast(config, device)
    return torch.autocast(tensors, torch.bfloat16, enabled=autocast)


def build_layer(config: RunConfig, arch: Architecture, is_run: bool = False) -> Any:
    """A decoder layer as `train` has it, in training mode.

    Args:
        is_run: with numbers, so that what is quantised has to be bitsandbytes' own layers.
    """
    llama_config = to_llama_config(replace(arch, n_layers=1))
    llama_config._attn_implementation = register()
    quantization = config.base.quantization
    with torch.device("meta"), AnyNumber():
        model: Any = LlamaForCausalLM(llama_config).to(getattr(torch, config.base.dtype))
        if quantization != "none" and is_run:
            make_quantized(model, config.base)
        elif quantization in ("nf4", "fp4"):
            stand_in_for_packed(model.model.layers)
        layers, adapter, fast = model.model.layers, config.adapter, config.fast
        if adapter.method != "none" and adapter.method not in SOFT_PROMPTS:
            # initialisations look at numbers; a layer's memory does not depend on them
            plain = adapter.model_copy(update={"init": type(adapter).model_fields["init"].default})
            model.name_or_path = "base"  # else PEFT warns of a renaming
            with copyable(model):
                model = get_peft_model(model, method_of(plain).peft_config(plain, "base"))
    if quantization == "int8":
        fast = fast.model_copy(update={"lora": False})  # those layers run PEFT's own code
    speed_up(model, fast)
    return layers[0].train()


def _fill(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights, fake where the mode around is, in the place of those that are not there yet."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = _made_like(parameter, module, dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _made(buffer)


def _made_like(
    parameter: torch.nn.Parameter, module: torch.nn.Module, dtype: torch.dtype
) -> torch.nn.Parameter:
    if type(parameter) is torch.nn.Parameter:
        return torch.nn.Parameter(_made(parameter), parameter.requires_grad)
    made = _made(parameter.data.to(dtype))
    packed: torch.nn.Parameter = quantized_like(parameter, made, module).to(made.device)
    return packed


def _made(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return made.normal_(std=0.02) if made.is_floating_point() else made.zero_()


def _counted(run: Callable[[], torch.Tensor]) -> Footprint:
    with LiveBytes() as live:
        output = run()
        kept, kept_pinned = live.now, live.pinned()
        output.sum().backward()
        return Footprint(kept, kept_pinned, live.peak)


class AnyNumber(TorchDispatchMode):
    """Answers where PEFT asks a tensor that has no numbers for one: whether a layer is not dropped
    (LoHa, LoKr), which row comes next (BOFT). Memory does not depend on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))


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

    def pinned(self) -> int:
        """What they would take in pinned memory."""
        return sum(pinned(storage.nbytes()) for storage in self._known)

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


def pinned(size: int) -> int:
    """Bytes of a block of pinned memory that holds so many (torch's CachingHostAllocator)."""
    return 1 << (size - 1).bit_length() if size else 0


def _held(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
