"""Linear layers without our adapters by oneDNN, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import with_adapter
from asked import Asked
from test_blocks import distance, losses_and_gradients
from test_lora import kept_bytes, largest_difference
from tolerances import FAST_FLOAT32, FAST_GRADIENT_FLOAT32
from torch import nn

from finetune.config import FastSection
from finetune.fast.blocks import speed_up
from finetune.fast.linear import goes_to_onednn, linear
from finetune.fast.place import as_on_gpu

pytestmark = pytest.mark.usefixtures("library")

LAYER = nn.Linear(16, 12, bias=False)


def gradients(run, x, weight):
    """Of one pass: the output, and the gradients that are asked for."""
    y = run(x, weight)
    asked = [tensor for tensor in (x, weight) if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 2, 12)).sum(), asked)]


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 5, 16)], ids=str)
@pytest.mark.parametrize(("of_x", "of_weight"), [(True, False), (False, True), (True, True)])
def test_values_and_gradients_are_near_float64(shape, of_x, of_weight):
    x, weight = torch.randn(shape), LAYER.weight.detach().clone()
    x.requires_grad_(of_x), weight.requires_grad_(of_weight)
    found = gradients(linear, x, weight)
    wide = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight))
    expected = gradients(nn.functional.linear, *wide)
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert largest_difference(found, expected) < FAST_FLOAT32


def test_the_input_is_kept_for_a_weight_that_trains_alone():
    x, weight = torch.randn(1000, 16, requires_grad=True), LAYER.weight.detach()
    assert kept_bytes(lambda x: [linear(x, nn.Parameter(weight, False))], x) == 0
    assert kept_bytes(lambda x: [linear(x, nn.Parameter(weight))], x) == x.nbytes


def test_the_gradient_of_a_sum_is_that_of_any_other():
    x, weight = torch.randn(40, 16, requires_grad=True), LAYER.weight.detach()
    (dx,) = torch.autograd.grad(linear(x, weight).sum(), x)
    assert largest_difference([dx], [weight.double().sum(0).expand(40, 16)]) < FAST_FLOAT32


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16)], ids=str)
def test_a_method_may_add_to_the_result_in_place(shape):
    """As AdaLoRA does, which a view of a function's result would forbid."""
    x, weight = torch.randn(shape, requires_grad=True), LAYER.weight.detach()
    y = linear(x, weight)
    y += 2 * x[..., :12]
    (dx,) = torch.autograd.grad(y.sum(), x)
    two = torch.tensor([2.0] * 12 + [0.0] * 4, dtype=torch.float64)
    assert largest_difference([dx], [(weight.double().sum(0) + two).expand(shape)]) < FAST_FLOAT32


def test_which_products_go(library):
    x, onednn = torch.randn(3, 16), library == "onednn"
    assert goes_to_onednn(LAYER, x, True) is onednn
    assert not goes_to_onednn(LAYER, x, False)
    assert not goes_to_onednn(nn.Linear(16, 12), x, True), "a bias"
    assert not goes_to_onednn(LAYER, x.double(), True)
    assert not goes_to_onednn(LAYER, x[:0], True), "no rows"
    with torch.autocast("cpu", torch.bfloat16):
        assert not goes_to_onednn(LAYER, x, True), "products in bfloat16"
    with as_on_gpu(True):
        assert not goes_to_onednn(LAYER, x, True)


@pytest.mark.parametrize(
    "settings",
    [None, {"target_modules": ["q_proj", "v_proj"]}, {"use_dora": True}],
    ids=["all weights", "q and v", "dora"],
)
def test_a_models_layers_go_all(tiny_llama, library, settings):
    model = copy.deepcopy(tiny_llama()).train()
    model = model if settings is None else with_adapter(model, **settings)
    plain, parts = copy.deepcopy(model), FastSection()
    without = parts.model_copy(update={"products": False})
    speed_up(model, parts)
    speed_up(plain, without)
    with Asked() as asked:
        found = losses_and_gradients(model, parts)
    assert distance(found, losses_and_gradients(plain, without)) < FAST_GRADIENT_FLOAT32
    by_mkl = {"aten::mm", "aten::addmm", "aten::addmm_"} & asked.counts.keys()
    assert ("mkldnn::_linear_pointwise" in asked.counts) is (library == "onednn")
    assert bool(by_mkl) is (library != "onednn")
