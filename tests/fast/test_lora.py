"""The adapter's linear layers against PEFT's own, against differences, and in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import projections_of
from peft import LoraConfig, get_peft_model
from tolerances import FAST_BFLOAT16, FAST_FLOAT32, FAST_FLOAT64
from torch import nn

from finetune.fast import lora
from finetune.fast.lora import project, project_swiglu, projection_of
from finetune.fast.pointwise import swiglu
from finetune.fast.products import times
from finetune.footprint import LiveBytes

pytestmark = pytest.mark.usefixtures("library")

NAMES = ("q", "k", "v")


class Three(nn.Module):
    def __init__(self, bias: bool = False, width: int = 16, outs=(12, 6, 20)) -> None:
        super().__init__()
        for name, out in zip(NAMES, outs, strict=True):
            setattr(self, name, nn.Linear(width, out, bias=bias))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [getattr(self, name)(x) for name in NAMES]


def adapted(dtype=torch.float64, bias=False, **settings):
    """Three layers on one input under PEFT, with B not zero and a scaling of its own."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "rank_pattern": {"v": 2}, **settings}
    model = get_peft_model(Three(bias).to(dtype), LoraConfig(target_modules=[*NAMES], **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            wide = parameter.data if dtype != torch.float64 else parameter.data.double()
            parameter.data = torch.randn_like(wide) * 0.3
    return model.train()


def layers_of(model) -> list[nn.Module]:
    return [getattr(model.base_model.model, name) for name in NAMES]


def outputs_and_gradients(run, model, x):
    """Of one pass: the outputs, and the gradients of x and of every trained parameter."""
    torch.manual_seed(3)
    outputs = run(x)
    sum((y.double() * torch.linspace(-1, 2, y.shape[-1])).sum() for y in outputs).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [*(y.detach() for y in outputs), x.grad, *(p.grad for p in trained)]
    x.grad = None
    for parameter in trained:
        parameter.grad = None
    return found


def largest_difference(found, expected) -> float:
    assert len(found) == len(expected)
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 5, 16)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("names", [NAMES, ("v",)], ids=str)
def test_values_and_gradients_are_pefts(shape, dropout, names):
    model = adapted(lora_dropout=dropout)
    layers = [getattr(model.base_model.model, name) for name in names]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and any(f".{n}." in name for n in names))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours = outputs_and_gradients(lambda x: project(x, projections_of(layers)), model, x)
    plain = outputs_and_gradients(lambda x: [layer(x) for layer in layers], model, x)
    assert [y.shape for y in ours] == [y.shape for y in plain]
    assert largest_difference(ours, plain) < FAST_FLOAT64


def test_gradients_are_the_differences_of_the_values():
    model = adapted()
    layers = layers_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *_: project(x, projections_of(layers)), (x, *trained), atol=1e-6
    )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, FAST_FLOAT32), (torch.bfloat16, FAST_BFLOAT16)]
)
def test_lower_types_are_near_float64(dtype, limit):
    model = adapted(dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    found = outputs_and_gradients(lambda x: project(x, projections_of(layers_of(model))), model, x)
    assert [t.dtype for t in found] == [dtype] * 4 + [torch.float32] * 6
    reference = copy.deepcopy(model).double()
    wide = x.detach().double().requires_grad_()
    expected = outputs_and_gradients(reference.base_model.model, reference, wide)
    assert largest_difference(found, expected) < limit


def test_autocast_decides_the_type_of_the_products():
    model, x = adapted(torch.float32), torch.randn(40, 16, requires_grad=True)
    wide = outputs_and_gradients(lambda x: project(x, projections_of(layers_of(model))), model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs_and_gradients(
            lambda x: project(x, projections_of(layers_of(model))), model, x
        )
    assert [t.dtype for t in cast] == [torch.bfloat16] * 3 + [torch.float32] * 7
    assert 1e-4 < largest_difference(cast, wide) < FAST_BFLOAT16


def test_the_gradient_of_a_sum_is_spread_out_for_the_products(monkeypatch):
    model, asked = adapted(torch.float32), []
    x = torch.randn(40, 16, requires_grad=True)
    ys = project(x, projections_of(layers_of(model)))
    monkeypatch.setattr(lora, "times", lambda *a: asked.extend(a[:2]) or times(*a))
    sum(y.sum() for y in ys).backward()
    assert asked and all(0 not in tensor.stride() for tensor in asked)


def test_an_input_that_needs_no_gradient_gets_none():
    model, x = adapted(), torch.randn(3, 16, dtype=torch.float64)
    sum(y.sum() for y in project(x, projections_of(layers_of(model)))).backward()
    assert x.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "change",
    [
        lambda: adapted(use_dora=True),
        lambda: adapted(lora_bias=True, bias=True),
        lambda: adapted(bias=True),
        lambda: _with_second_adapter(adapted()),
        lambda: _disabled(adapted()),
        lambda: _merged(adapted()),
        lambda: _with_trained_base(adapted()),
        lambda: _with_hook(adapted()),
        lambda: Three(),
    ],
    ids=["dora", "lora_bias", "bias", "two", "disabled", "merged", "base trains", "hook", "none"],
)
def test_what_is_not_plain_lora_is_left_to_peft(change):
    model = change()
    layers = (
        [getattr(model, name) for name in NAMES] if isinstance(model, Three) else layers_of(model)
    )
    assert None in projections_of(layers)
    assert None not in projections_of(layers_of(adapted()))


def _with_second_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=[*NAMES]))
    model.base_model.set_adapter(["default", "other"])
    return model


def _disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def _merged(model):
    model.merge_adapter()
    return model


def _with_trained_base(model):
    model.base_model.model.k.base_layer.weight.requires_grad_(True)
    return model


def _with_hook(model):
    model.base_model.model.k.register_forward_hook(lambda *_: None)
    return model


def kept_bytes(run, x) -> int:
    """Of the tensors that a forward pass keeps for the backward pass, each storage once."""
    kept = {}

    def note(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = run(x)
    del outputs
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_is_kept_than_by_peft(dtype):
    model = adapted(dtype)
    x = torch.randn(1000, 16, dtype=dtype, requires_grad=True)
    ours = kept_bytes(lambda x: project(x, projections_of(layers_of(model))), x)
    plain = kept_bytes(model.base_model.model, x)
    size = torch.finfo(dtype).bits // 8
    assert ours == 1000 * (16 + 4 + 4 + 2) * size  # x once, and x A'
    assert ours < plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_and_its_projection_are_the_two_in_turn_and_keep_what_made_the_input(dtype):
    model = adapted(dtype)
    (projection,) = projections_of(layers_of(model)[:1])
    trained = [projection.down, projection.up]
    gate, up = (torch.randn(7, 16, dtype=dtype, requires_grad=True) for _ in range(2))

    def gradients(run):
        ys = run()
        return [ys, *torch.autograd.grad(ys.square().sum(), [gate, up, *trained])]

    at_once = gradients(lambda: project_swiglu(gate, up, projection))
    in_turn = gradients(lambda: project(swiglu(gate, up), [projection])[0])
    assert all(torch.equal(a, b) for a, b in zip(at_once, in_turn, strict=True))
    size, hidden = dtype.itemsize, 4
    assert kept_bytes(lambda x: project_swiglu(x, up, projection), gate) == 7 * (32 + hidden) * size
    assert kept_bytes(lambda x: project(swiglu(x, up), [projection]), gate) == 7 * 52 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_that_is_made_again_is_there_once_and_not_for_long(dtype):
    """In parts of gate: it, up, the result and the hidden ones are kept. In the backward pass come
    the result's gradient and the input's, in whose place gate's is written, and up's."""
    projection = projection_of(layers_of(adapted(dtype))[0])
    gate, up = (torch.randn(20_000, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    hidden, result = 4 / 16, 12 / 16
    with LiveBytes() as live:
        y = project_swiglu(gate * 1, up * 1, projection)
        kept, live.peak = live.now, live.now
        y.backward(torch.ones_like(y))
    assert kept / gate.nbytes == pytest.approx(2 + result + hidden, rel=0.01)
    # the last hidden gradient is there still, and y's gradient; rounding to float32 on the way
    most = 2 + result + hidden + result + 2 + 2 * hidden
    assert live.peak / gate.nbytes < most + 0.3
