"""Adapters over weights packed in 4 bits: against PEFT's own layers and against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import projections_of, with_adapter
from peft import LoraConfig, get_peft_model
from test_blocks import ALIKE, DOCUMENTS, OFF, distance, losses_and_gradients
from test_lora import (
    NAMES,
    Three,
    kept_bytes,
    largest_difference,
    layers_of,
    outputs_and_gradients,
)
from tolerances import FAST_BFLOAT16, FAST_FLOAT32, FAST_GRADIENT_FLOAT32
from torch import nn

from finetune.config import FastSection
from finetune.fast.blocks import speed_up
from finetune.fast.frozen import PackedStandIn, stand_in_for_packed
from finetune.fast.lora import project
from finetune.fast.offload import offloaded
from finetune.footprint import LiveBytes

bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
pytestmark = pytest.mark.usefixtures("library")

WIDTH, OUTS = 128, (192, 128, 128)
TYPES = [(torch.float32, FAST_FLOAT32), (torch.bfloat16, FAST_BFLOAT16)]


def packed(linear: nn.Linear, dtype, kind="nf4", double=True, bias=False) -> nn.Module:
    """bitsandbytes' layer of the same numbers."""
    settings = {"compute_dtype": dtype, "compress_statistics": double, "quant_type": kind}
    out, width = linear.weight.shape
    layer = bitsandbytes.nn.Linear4bit(width, out, bias=bias, **settings)
    weight = linear.weight.detach().to(dtype)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=layer
    )
    layer.support_avx512bf16_for_cpu = False  # as `load_model` leaves it
    return layer.to("cpu")


def pack_linears(model: nn.Module, dtype=torch.float32, **how) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, packed(child, dtype, **how))
    model.is_loaded_in_4bit = True  # where PEFT looks
    return model


def adapted(dtype=torch.float32, *, bias=False, how=None, **settings):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": [*NAMES], **settings}
    base = pack_linears(Three(bias, WIDTH, OUTS), dtype, bias=bias, **(how or {}))
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.3
    return model.train()


def in_float64(model) -> nn.Module:
    """The same adapters over the unpacked numbers."""
    base = Three(False, WIDTH, OUTS).double()
    for name, layer in zip(NAMES, layers_of(model), strict=True):
        weight = layer.base_layer.weight
        numbers = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        getattr(base, name).weight.data = numbers.double()
    wide = get_peft_model(base, model.peft_config["default"])
    ours, theirs = model.named_parameters(), dict(wide.named_parameters())
    for name, parameter in ours:
        if "lora_" in name:
            theirs[name].data = parameter.data.double()
    return wide.train()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), TYPES)
def test_values_and_gradients_are_pefts_and_near_float64(kind, double, dtype, limit):
    model = adapted(dtype, how={"kind": kind, "double": double})
    x = torch.randn(2, 20, WIDTH, dtype=dtype, requires_grad=True)
    found = outputs_and_gradients(lambda x: project(x, projections_of(layers_of(model))), model, x)
    plain = outputs_and_gradients(lambda x: [layer(x) for layer in layers_of(model)], model, x)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in plain]
    assert largest_difference(found, plain) < limit
    wide, x = in_float64(model), x.detach().double().requires_grad_()
    assert largest_difference(found, outputs_and_gradients(wide.base_model.model, wide, x)) < limit


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("documents", [DOCUMENTS, ALIKE], ids=["any", "alike"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_packed_llama_trains_as_with_the_libraries_layers(
    tiny_llama, dropout, documents, recomputed
):
    model = with_adapter(pack_linears(copy.deepcopy(tiny_llama())), lora_dropout=dropout)
    plain = copy.deepcopy(model)
    model.enable_input_require_grads()
    speed_up(model, FastSection())
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert None not in projections_of(m for n, m in model.named_modules() if n.endswith("_proj"))
    found = losses_and_gradients(model, FastSection(), documents)
    expected = losses_and_gradients(plain, OFF, documents)
    assert distance(found, expected) < FAST_GRADIENT_FLOAT32


def test_autocast_decides_the_type_of_the_products(tiny_llama):
    model = with_adapter(pack_linears(copy.deepcopy(tiny_llama())))
    plain = losses_and_gradients(copy.deepcopy(model), OFF)
    speed_up(model, FastSection())
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_and_gradients(model, FastSection())
    assert {g.dtype for g in found[1].values()} == {torch.float32}
    assert 1e-4 < distance(found, plain) < 8 * FAST_BFLOAT16


@pytest.mark.parametrize(
    "change",
    [
        lambda: adapted(use_dora=True),
        lambda: adapted(bias=True),
        lambda: _with(adapted(), "compute_dtype", None),
        lambda: _without_state(adapted()),
        lambda: _in_the_layout_of_inference(adapted(torch.bfloat16)),
        lambda: _in_8_bits(),
    ],
    ids=["dora", "bias", "no type", "no state", "another layout", "int8"],
)
def test_what_is_not_plain_is_left_to_peft(change):
    assert None in projections_of(layers_of(change()))
    assert None not in projections_of(layers_of(adapted()))


def _with(model, name: str, value):
    for layer in layers_of(model):
        setattr(layer.base_layer, name, value)
    return model


def _without_state(model):
    """As FSDP leaves the weights; bitsandbytes' layers put it back."""
    for layer in layers_of(model):
        layer.base_layer.weight.quant_state = None
    return model


def _in_the_layout_of_inference(model):
    for layer in layers_of(model):
        layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    return model


def _in_8_bits():
    base = Three(False, WIDTH, OUTS)
    for name in NAMES:
        linear = getattr(base, name)
        layer = bitsandbytes.nn.Linear8bitLt(WIDTH, len(linear.weight), bias=False)
        layer.weight = bitsandbytes.nn.Int8Params(linear.weight.detach(), requires_grad=False)
        setattr(base, name, layer.to("cpu"))
    base.is_loaded_in_8bit = True
    return get_peft_model(base, LoraConfig(r=4, target_modules=[*NAMES]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_unpacked_weight_is_kept_and_two_are_never_there(dtype):
    model, size = adapted(dtype, r=1), dtype.itemsize
    x = torch.randn(1, WIDTH, dtype=dtype, requires_grad=True)
    kept = kept_bytes(lambda x: project(x, projections_of(layers_of(model))), x)
    assert kept == (WIDTH + 1 + 1 + 1) * size
    dense = [out * WIDTH * size for out in OUTS]
    with LiveBytes() as live:
        outputs = project(x, projections_of(layers_of(model)))
        forward, live.peak = live.peak, live.now
        sum(y.sum() for y in outputs).backward()
    for peak in (forward, live.peak):
        assert max(dense) <= peak < max(dense) + min(dense) / 2


def test_packed_weights_stay_where_activations_are_offloaded():
    model = adapted()
    x = torch.randn(10, WIDTH, requires_grad=True)
    expected = outputs_and_gradients(
        lambda x: project(x, projections_of(layers_of(model))), model, x
    )
    with offloaded(model, "cpu"):
        found = outputs_and_gradients(
            lambda x: project(x, projections_of(layers_of(model))), model, x
        )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plans_stand_in_takes_the_memory_of_the_packed_layer(dtype):
    real, planned = adapted(dtype), Three(False, WIDTH, OUTS).to(dtype)
    stand_in_for_packed(planned)
    assert isinstance(planned.q, PackedStandIn)
    planned = get_peft_model(planned, LoraConfig(r=4, target_modules=[*NAMES])).train()
    found = []
    for model in (real, planned):
        x = torch.randn(500, WIDTH, dtype=dtype, requires_grad=True)
        with LiveBytes() as live:
            outputs = project(x, projections_of(layers_of(model)))
            kept = live.now
            sum(y.sum() for y in outputs).backward()
            found.append((kept, live.peak))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=0.02)  # beside the scales of the blocks
