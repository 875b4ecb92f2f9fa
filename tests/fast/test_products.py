"""Products by both libraries against float64, in every order of memory that is asked for."""

from __future__ import annotations

import pytest
import torch
from asked import Asked
from tolerances import FAST_FLOAT32
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.fast import products
from finetune.fast.frozen import FrozenWeight
from finetune.fast.head import head_losses
from finetune.fast.lora import Projection, project
from finetune.fast.products import go_to_onednn, makes_kernels, plus_times, times

AMD = {"cpu_name": "AMD EPYC 9B45", "avx512_f": True}


def matrix(rows: int, columns: int, order: str) -> torch.Tensor:
    """Random numbers that no shorter type holds."""
    if order == "transposed":
        return matrix(columns, rows, "plain").t()
    if order == "part":
        return matrix(rows + 3, columns + 5, "plain")[2:-1, 4:-1]
    return torch.randn(rows, columns)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("order_of_x", ["plain", "transposed", "part"])
@pytest.mark.parametrize("order_of_weight", ["plain", "transposed", "part"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 9), (7, 1, 16), (40, 64, 33)], ids=str)
def test_both_libraries_are_near_float64(order_of_x, order_of_weight, shape):
    torch.manual_seed(0)
    rows, inner, out = shape
    x, weight = matrix(rows, inner, order_of_x), matrix(out, inner, order_of_weight)
    total = torch.randn(rows, out)
    product = x.double() @ weight.double().t()
    for onednn in (False, True):
        assert difference(times(x, weight, onednn), product) < FAST_FLOAT32
        for scale in (1.0, 0.3):
            found = plus_times(total.clone(), x, weight, onednn, scale)
            assert difference(found, total.double() + scale * product) < FAST_FLOAT32


def test_operands_stay_as_they_are():
    operands = torch.randn(5, 4), torch.randn(3, 4)
    before = [t.clone() for t in operands]
    times(*operands, onednn=True)
    plus_times(torch.zeros(5, 3), *operands, onednn=True, scale=0.3)
    assert all(map(torch.equal, operands, before))


@pytest.mark.parametrize(
    ("cpu", "faster"),
    [
        (AMD, True),
        (AMD | {"avx512_f": False}, False),
        (AMD | {"cpu_name": "Intel(R) Xeon(R) Platinum 8481C"}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
    ids=["Zen with AVX-512", "Zen without", "Intel", "Arm", "unknown"],
)
def test_which_machines_have_vectors_that_mkl_leaves_alone(monkeypatch, cpu, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert products.onednn_is_faster.__wrapped__() is faster


def test_without_either_library_nothing_changes(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        with monkeypatch.context() as patch:
            patch.setattr(library, "is_available", lambda: False)
            assert not products.onednn_is_faster.__wrapped__()


def test_only_what_mkl_would_have_multiplied_goes_there(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    some = torch.ones(2, 3)
    assert go_to_onednn(True, some)
    assert not go_to_onednn(False, some)
    for other in (some.bfloat16(), some.double(), some.to("meta"), some[:0]):
        assert not go_to_onednn(True, other)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert not go_to_onednn(True, some)


@pytest.mark.parametrize("products_wanted", [True, False])
def test_a_step_asks_the_library_it_is_said_to(library, products_wanted):
    layers = [adapted_layer(64, 32) for _ in range(2)]
    x, weight = torch.randn(8, 64, requires_grad=True), torch.randn(50, 32)
    with Asked() as asked:
        y, z = project(x, layers, products_wanted)
        head_losses(y + z, weight, torch.arange(8), products_wanted).sum().backward()
    by_onednn = library == "onednn" and products_wanted
    assert ("mkldnn::_linear_pointwise" in asked.counts) is by_onednn
    assert bool({"aten::mm", "aten::addmm_"} & asked.counts.keys()) is not by_onednn


def adapted_layer(width: int, out: int) -> Projection:
    down, up = torch.randn(4, width, requires_grad=True), torch.randn(out, 4, requires_grad=True)
    return Projection(FrozenWeight(torch.randn(out, width)), down, up, 2.0, None)


def test_results_without_numbers_have_the_same_shape():
    with FakeTensorMode():
        x, weight = torch.ones(5, 4), torch.ones(3, 4)
        product = times(x, weight, onednn=True)
        added = plus_times(product, x, weight, onednn=True)
    assert product.shape == added.shape == (5, 3)
    assert added.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "wanted", "library", "makes"),
    [
        (torch.float32, True, True, True),
        (torch.float32, True, False, False),
        (torch.float32, False, True, False),
        (torch.float64, True, True, False),
        (torch.bfloat16, False, True, False),
    ],
)
def test_where_kernels_are_made_for_sizes(monkeypatch, dtype, wanted, library, makes):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: library)
    assert makes_kernels(wanted, dtype) is makes


def test_kernels_of_bfloat16_are_onednns_where_torch_says_so():
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert makes_kernels(True, torch.bfloat16) is bool(supported)
