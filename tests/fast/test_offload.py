"""Activations that wait elsewhere: the same gradients, weights that stay, and what is still held.

Without a GPU they leave the CPU for copies of their own, which shows all but the pinned memory.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from adapted import with_adapter

from finetune.config import FastSection
from finetune.fast import offload
from finetune.fast.blocks import speed_up
from finetune.fast.loss import pack, token_losses
from finetune.fast.offload import offloaded

DOCUMENTS = [(list(range(1, 40)), [True] * 39), (list(range(3, 90)), [True] * 87)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(offload, "_SMALL", 1)


def losses_and_gradients(model, context, device):
    model.zero_grad()
    packed = pack(DOCUMENTS)
    rows = ("input_ids", "position_ids", "labels")
    packed = replace(packed, **{name: getattr(packed, name).to(device) for name in rows})
    with context:
        losses = token_losses(model, packed)
    losses.sum().backward()
    return losses.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_not_a_bit_changes(tiny_llama, device, recompute, fast):
    model = with_adapter(tiny_llama()).to(device).train()
    if fast:
        speed_up(model, FastSection())
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    plain = losses_and_gradients(model, torch.enable_grad(), device)
    found = losses_and_gradients(model, offloaded(model, device), device)
    assert torch.equal(found[0], plain[0])
    assert len(found[1]) == len(plain[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True))


def saved_by(model, context) -> list[torch.Tensor | offload.Away]:
    """Everything that autograd saves, as `context` packs it."""
    seen = []
    pack_saved = context.pack_hook
    context.pack_hook = lambda tensor: seen.append(pack_saved(tensor)) or seen[-1]
    losses_and_gradients(model, context, "cpu")
    return seen


def test_weights_stay_and_all_else_leaves(tiny_llama):
    model = with_adapter(tiny_llama()).train()
    speed_up(model, FastSection())
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = saved_by(model, offloaded(model, "cpu"))
    stayed = [saved for saved in seen if isinstance(saved, torch.Tensor)]
    assert stayed and all(tensor.untyped_storage().data_ptr() in own for tensor in stayed)
    assert len(seen) > len(stayed)


def test_what_lies_on_another_device_stays(tiny_llama):
    model = with_adapter(tiny_llama()).train()
    assert all(isinstance(saved, torch.Tensor) for saved in saved_by(model, offloaded(model)))


def test_the_originals_are_free_after_the_forward_pass(tiny_llama):
    """Of the layers nothing lives on the device but what the loss still holds."""
    from finetune.footprint import LiveBytes

    def alive_after_forward(context) -> int:
        model = with_adapter(tiny_llama()).train()
        gc.collect()
        with LiveBytes() as live, context(model):
            losses = token_losses(model, pack(DOCUMENTS))
        assert losses.requires_grad
        return live.now

    away: list[int] = []

    def counting(model):
        context = offloaded(model, "cpu")
        pack_saved = context.pack_hook

        def packed(tensor):
            saved = pack_saved(tensor)
            if isinstance(saved, offload.Away):
                away.append(saved.copy.nbytes)
            return saved

        context.pack_hook = packed
        return context

    plain = alive_after_forward(lambda _: torch.enable_grad())
    left = alive_after_forward(counting) - sum(away)
    assert left < plain / 4
