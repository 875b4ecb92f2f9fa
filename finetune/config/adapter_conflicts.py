"""What an adapter's method asks of the base, the data and the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from finetune.config.adapter import CHANGES_BASE, ON_QUANTIZED_BASE, SOFT_PROMPTS
from finetune.config.conflict import Conflict

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig


def adapter_conflicts(config: RunConfig) -> Iterator[Conflict]:
    """Every combination with `adapter:` that cannot be."""
    yield from _quantized_base(config)
    yield from _init(config)
    yield from _soft_prompts(config)


def _quantized_base(config: RunConfig) -> Iterator[Conflict]:
    adapter, storage = config.adapter, config.base.quantization
    if storage != "none" and adapter.method == "none":
        yield Conflict(
            ("base.quantization", "adapter.method"),
            f"found {storage} with adapter.method: none; quantised weights cannot"
            " be trained: allowed: none, or an adapter (adapter.method: lora)",
        )
    elif storage != "none" and adapter.method not in ON_QUANTIZED_BASE[storage]:
        yield Conflict(
            ("base.quantization", "adapter.method"),
            f"found {storage} with adapter.method: {adapter.method}; allowed: none, or"
            f" adapter.method: {', '.join(ON_QUANTIZED_BASE[storage])}",
        )


def _init(config: RunConfig) -> Iterator[Conflict]:
    """PiSSA, OLoRA and CorDA move a part of W into the adapter: W has to be numbers, the adapter
    B·A. LoftQ makes up for what quantising took: there has to be some."""
    adapter, storage = config.adapter, config.base.quantization
    paths = ("adapter.init", "adapter.method", "base.quantization")
    if adapter.init in CHANGES_BASE and adapter.method == "dora":
        yield Conflict(
            paths,
            f"found {adapter.init} with adapter.method: dora, whose update cannot be told apart"
            " from the base again: allowed: default, gaussian",
        )
    if adapter.init in CHANGES_BASE and storage != "none":
        yield Conflict(
            paths,
            f"found {adapter.init} with base.quantization: {storage}, whose weights cannot give a"
            " part to the adapter: allowed: default, gaussian",
        )
    if adapter.init == "loftq" and storage != "nf4":
        yield Conflict(
            ("adapter.init", "base.quantization"),
            f"found loftq with base.quantization: {storage}; it makes up for what nf4 takes:"
            " allowed: base.quantization: nf4, or adapter.init: default, gaussian",
        )


def _soft_prompts(config: RunConfig) -> Iterator[Conflict]:
    method = config.adapter.method
    if method not in SOFT_PROMPTS:
        return
    if config.data.packing:
        yield Conflict(
            ("data.packing", "adapter.method"),
            f"found true with adapter.method: {method}, whose vectors stand before every document"
            " by itself: allowed: false",
        )
    if method == "prefix_tuning" and config.train.activation_checkpointing:
        yield Conflict(
            ("train.activation_checkpointing", "adapter.method"),
            "found true with adapter.method: prefix_tuning, whose keys and values would be lost"
            " when activations are computed again: allowed: false",
        )
